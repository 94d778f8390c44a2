"""Exercises: what is asked, what it is checked with, and where the reference answer stands."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

from peft_teach.course.subject import Subject


@dataclass(frozen=True)
class Probe:
    """One thing that a check does with an answer, under several settings.

    run(subject, setting) yields (what, value) and compares nothing; the same probe runs on the
    learner's answer, on the oracle and on every mistake. tol: relative to the largest expected
    value; None takes the one of the value's dtype.
    """

    name: str
    run: Callable[[Subject, dict], Iterator[tuple[str, Any]]]
    settings: tuple[dict, ...]
    tol: float | None = None


@dataclass(frozen=True)
class Exercise:
    """`key` is chapter.answer; kind: function, module, property or answer; `module` holds the reference answer under the same name.

    needs: keys whose answers this one may build on. unit: of an answer that is a number.
    oracle: makes the real library's answer to the same question. hints: three (title, text),
    growing. form: what an answer looks like. why: why the solution works. settings: the values that an assignment may vary.
    """

    key: str
    kind: str
    module: str
    points: int
    minutes: tuple[int, int]
    difficulty: int
    oracle: Callable[[], Any] = field(repr=False)
    probes: tuple[Probe, ...] = field(repr=False)
    hints: tuple[tuple[str, str], ...] = field(repr=False, default=())
    why: str = field(repr=False, default="")
    importance: int = 3
    needs: tuple[str, ...] = ()
    unit: str = ""
    form: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def chapter(self) -> str:
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        return self.key.partition(".")[2]

    def answer(self, written: Any) -> Any:
        """What is checked, of what stands in the module: a function of the settings gives its value."""
        return written(**self.settings) if self.kind == "answer" else written

    def reference(self) -> Any:
        """The package's own answer."""
        return self.answer(getattr(importlib.import_module(self.module), self.name))

    def source(self) -> str:
        """The text of the reference answer."""
        from peft_teach.course.blank import definition

        return definition(inspect.getsource(importlib.import_module(self.module)), self.name)

    @property
    def signature(self) -> str:
        """Of the function or class, as text; of an answer, its unit."""
        if self.kind == "answer":
            return f"{self.name} = …" + (f"  ({self.unit})" if self.unit else "")
        text = ", ".join(str(p.replace(annotation=p.empty)) for p in self.parameters())
        return f"{self.name}({text})"

    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.reference()).parameters.values())


@functools.cache
def _all() -> dict[str, Exercise]:
    package = importlib.import_module("peft_teach.course.checks")
    modules = [importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    return {e.key: e for module in sorted(modules, key=lambda m: m.CHAPTER) for e in module.EXERCISES}


def exercises() -> list[Exercise]:
    """All there are, chapter by chapter, in the order of the book."""
    return list(_all().values())


def find(key: str) -> Exercise:
    """The exercise with this key; KeyError with the nearest names for an unknown one."""
    if key in _all():
        return _all()[key]
    keys = list(_all())
    tail = str(key).rpartition(".")[2].lower()
    near = [k for k in keys if k.rpartition(".")[2].lower() == tail] + difflib.get_close_matches(str(key), keys, n=3, cutoff=0.5)
    close = ", ".join(dict.fromkeys(near)) or ", ".join(keys)
    raise KeyError(f"there is no exercise {key!r}. The nearest: {close}")
