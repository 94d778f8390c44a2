"""How things are timed here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Callable


@dataclass
class Row:
    """One answer. median and best of the repeats, in `unit`; a ratio is peer's time over ours."""

    question: str
    goal: str
    median: float
    best: float
    unit: str

    def __str__(self) -> str:
        return f"{self.question}: {self.median:.3g} {self.unit} (best {self.best:.3g}; goal {self.goal})"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(question: str, goal: str, peer: Callable[[], object], ours: Callable[[], object], repeats: int = 40) -> Row:
    """Peer and ours in turn, each first in every other pair, after one warm-up; the ratio is taken pair by pair."""
    peer(), ours()
    ratios = []
    for i in range(repeats):
        if i % 2:
            theirs, mine = seconds(peer), seconds(ours)
        else:
            mine, theirs = seconds(ours), seconds(peer)
        ratios.append(theirs / mine)
    return Row(question, goal, statistics.median(ratios), max(ratios), "× peft's speed")
