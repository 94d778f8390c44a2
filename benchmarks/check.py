"""P18: one check in a notebook, after the first, which imports peft: ≤ 0.5 s passing, ≤ 2 s failing."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.timing import Row, seconds
from peft_teach.course import exercises
from peft_teach.course.checking import judge
from peft_teach.course.mistakes import mistakes
from peft_teach.course.subject import Subject

FIRST = """
from benchmarks.timing import seconds
from peft_teach.course.checking import judge
from peft_teach.course.exercise import find
from peft_teach.course.subject import Subject

first = find("lora_layer.delta_weight")
print(seconds(lambda: judge(first, Subject.local(first.reference(), first.key))))
"""


def measure() -> list[Row]:
    run = [sys.executable, "-c", FIRST]  # in a process that has not imported peft yet
    importing = statistics.median(float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(3))
    rows = [Row("P18 the first check, which imports peft", "≤ 8 s", importing, importing, "s")]
    passing, failing = [], []
    for exercise in exercises():
        again = lambda answer, e=exercise: seconds(lambda: judge(e, Subject.local(answer, e.key)))  # noqa: E731
        again(exercise.reference())  # the oracle's own traces are made once
        passing.append(statistics.median(again(exercise.reference()) for _ in range(5)))
        failing += [again(exercise.answer(m.build())) for m in mistakes(exercise.key)]
    rows.append(Row("P18 a passing check, the slowest exercise", "≤ 0.5 s", max(passing), min(passing), "s"))
    rows.append(Row("P18 a failing check, the slowest of all mistakes", "≤ 2 s", max(failing), min(failing), "s"))
    rows.append(Row("P18 a failing check, the median mistake", "≤ 2 s", statistics.median(failing), min(failing), "s"))
    return rows
