"""Numbers in a chapter: predicted, measured, and set by the assignment."""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any

from peft_teach.course import state
from peft_teach.course.exercise import find
from peft_teach.course.show import Card


def budget(full: Any, tiny: Any) -> Any:
    """`full`, or `tiny` where only the way is tried, not the result (PEFT_TEACH_BUDGET=tiny)."""
    return tiny if os.environ.get("PEFT_TEACH_BUDGET") == "tiny" else full


def measured(name: str, value: float, expect: float, tol: float, unit: str = "") -> None:
    """Print a number that depends on the machine, with ≈, and assert that it lies near `expect`.

    tol: how far it may be off, as a share of `expect` (0.5: between half and one and a half).
    AssertionError outside of that range, ValueError for expect = 0, of which nothing is a share.
    """
    if expect == 0:
        raise ValueError("expect must not be 0: tol is a share of it")
    value = float(getattr(value, "detach", lambda: value)())  # of a tensor with a gradient, too
    print(f"{name} ≈ {value:.4g}{' ' + unit if unit else ''}")
    if budget(True, False) and not (math.isfinite(value) and abs(value - expect) <= tol * abs(expect)):
        low, high = sorted((expect - tol * expect, expect + tol * expect))
        raise AssertionError(
            f"{name} came out as {value:.4g} {unit}; on the machines that were tried it lay between "
            f"{low:.4g} and {high:.4g}. If nothing above was changed, this is worth a report."
        )


class Settings(dict):
    """Values of an exercise, as attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no setting {name!r}; there is: {', '.join(self)}")

    def __repr__(self) -> str:
        return "\n".join(f"{k} = {v}" for k, v in self.items())


def settings(key: str) -> Settings:
    """The values that this exercise is about; an assignment may have others than the book."""
    return Settings(find(key).settings)


def _same(a: Any, b: Any) -> bool:
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)  # noqa: E731
    if number(a) and number(b):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def predict(key: str, value: Any = ...) -> Card:
    """Write down what you expect before the cell that shows it; `reveal` compares."""
    if value is ...:
        return Card(f"○ {key}: no prediction yet", ["Put your guess in place of the dots. A wrong one teaches more than none."])
    try:
        state.write(f"predict.{key}", plain=json.loads(json.dumps(value)))  # for after a restart
    except TypeError:
        pass
    _predictions[key] = value
    return Card(f"○ {key}: you predict {value!r}")


_predictions: dict[str, Any] = {}


def reveal(key: str, actual: Any, close: float = 0.0) -> Card:
    """What came out, beside what was predicted. close: up to which share of it a guess is near enough."""
    guess = _predictions.get(key, state.read(f"predict.{key}").get("plain"))
    if isinstance(guess, str) and isinstance(actual, (int, float)):
        with contextlib.suppress(ValueError):  # "0.3 %" is meant as a number
            guess = float(guess.strip(" %"))
    if guess is None:
        return Card(f"○ {key}: it is {actual!r}", ["You made no prediction."])
    if _same(guess, actual):
        return Card(f"✓ {key}: as you predicted, {actual!r}")
    if close and isinstance(guess, (int, float)) and abs(guess - actual) <= close * abs(actual):
        return Card(f"✓ {key}: you predicted {guess!r}, it is {actual!r}")
    return Card(f"✗ {key}: not as predicted", [("predicted", repr(guess)), ("it is", repr(actual))])
