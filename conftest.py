"""The whole run: notebooks the way the builder runs them, first lines that name device and versions,
last lines that count what was held."""

import os

os.environ.setdefault("PEFT_TEACH_BUILD", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

COUNTED = ("peft", "transformers", "bitsandbytes", "safetensors", "hypothesis", "nbval")


def pytest_report_header(config):
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def told(name):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    devices = ["cpu"] + [f"cuda ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [
        f"devices: {', '.join(devices)}, {torch.get_num_threads()} threads, {platform.machine()}",
        f"versions: Python {platform.python_version()}, torch {torch.__version__}, " + ", ".join(map(told, COUNTED)),
    ]


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", [])
    told = {}
    for report in passed:
        for name, count in report.user_properties:
            told[name] = told.get(name, 0) + count
    cells = sum(".ipynb::" in report.nodeid for report in passed)
    counts = [f"{n} {name}" for name, n in told.items()] + ([f"{cells} notebook cells compared"] if cells else [])
    if counts:
        terminalreporter.write_line("held: " + ", ".join(counts))
