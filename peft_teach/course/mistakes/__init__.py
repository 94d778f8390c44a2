"""Typical wrong answers, kept as data: the smallest edit of the reference that makes each of them.

They test the checks, tell a learner what his values look like, and fill trap galleries and quizzes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from peft_teach.course.use import run_source


@dataclass(frozen=True)
class Mistake:
    """A wrong answer to the exercise `key`.

    edit: (old, new), a change of the whole module that holds the answer; `old` occurs exactly once.
    cause: the misconception, as the end of "your values equal those you get when …".
    why, breaks, shows: for a gallery: how one comes to it, what it spoils, how it would show.
    """

    key: str
    edit: tuple[str, str]
    cause: str
    why: str = ""
    breaks: str = ""
    shows: str = ""

    def source(self) -> str:
        """The module's text with the edit."""
        from peft_teach.course.exercise import find

        return edited(find(self.key).module, self.edit)

    def build(self) -> Any:
        """The wrong answer itself."""
        return run_once(self.source(), self.key.partition(".")[2])


def edited(module: str, edit: tuple[str, str]) -> str:
    """The module's text with the edit. ValueError unless what is replaced occurs exactly once."""
    text = inspect.getsource(importlib.import_module(module))
    old, new = edit
    if text.count(old) != 1:
        raise ValueError(f"this occurs {text.count(old)} times in {module}, not once:\n{old}")
    return text.replace(old, new)


@functools.lru_cache(maxsize=None)
def run_once(source: str, name: str) -> Any:
    """What `name` is in this text; the same text is run only once."""
    return run_source(source, name, "a mistake in")


@functools.cache
def mistakes(key: str) -> tuple[Mistake, ...]:
    """The mistakes of one exercise."""
    chapter = key.partition(".")[0]
    return tuple(m for m in importlib.import_module(f"{__name__}.{chapter}").MISTAKES if m.key == key)
