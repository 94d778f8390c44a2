"""`make bench [ARGS="layer"]`: run the questions, print each answer, write results.json and results.md.

A question is a file with `measure() -> list[Row]`. Timings on shared machines are noisy: what counts
are ratios that were taken in turn (A, B, A, B, …) in one process.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PEFT_TEACH_BUILD", "1")

QUESTIONS = ("layer", "check", "chapter")
HERE = Path(__file__).parent


def main() -> int:
    import torch

    asked = sys.argv[1:] or QUESTIONS
    if set(asked) - set(QUESTIONS):
        print(f"there is: {', '.join(QUESTIONS)}", file=sys.stderr)
        return 2
    path = HERE / "results.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    machine = {
        "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    for name in asked:
        rows = import_module(f"benchmarks.{name}").measure()
        for row in rows:
            print(row)
        known[name] = {"machine": machine, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    lines = ["# Benchmarks", "", "Made by `make bench`. Medians; the machine stands in results.json.", "",
             "| question | goal | median | best | unit |", "|---|---|---|---|---|"]
    lines += [f"| {r['question']} | {r['goal']} | {r['median']:.3g} | {r['best']:.3g} | {r['unit']} |"
              for name in QUESTIONS if name in known for r in known[name]["rows"]]
    (HERE / "results.md").write_text("\n".join(lines) + "\n", "utf-8")
    return 0


sys.exit(main())
