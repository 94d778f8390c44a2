"""A chapter's time and peak memory, executed alone as CI does: ≤ 45 s and ≤ 3.5 GiB on 2 cores."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.timing import Row, seconds
from peft_teach.course.notebooks import chapters, execute, find_root, make

# The kernel's own high-water mark, asked for in a last cell (Linux and macOS count differently).
PEAK = "import resource, sys; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"


def measure() -> list[Row]:
    import nbformat

    rows = []
    for chapter in chapters(find_root(Path(__file__).parent)):
        times, peaks = [], []
        for _ in range(3):
            notebook = make(chapter, blanked=False)
            notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
            times.append(seconds(lambda n=notebook: execute(n, chapter.source.parent)))
            peaks.append(int(notebook.cells[-1].outputs[0]["text"]) / 2**30)
        rows.append(Row(f"chapter {chapter.source.stem}, executed alone", "≤ 45 s", statistics.median(times), min(times), "s"))
        rows.append(Row(f"chapter {chapter.source.stem}, peak memory", "≤ 3.5 GiB", statistics.median(peaks), min(peaks), "GiB"))
    return rows
