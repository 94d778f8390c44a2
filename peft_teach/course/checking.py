"""A check: run the probes on the answer and on the real library, find the first difference, say why.

    probes × settings ──▶ trace of the answer ──┐
                     └──▶ trace of the oracle ──┴─▶ first difference ──▶ symptom
                     └──▶ traces of the mistakes ──▶ those with the same values ──▶ cause
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
from torch import Tensor

from peft_teach.course import state
from peft_teach.course.blank import bodies
from peft_teach.course.codec import Opaque
from peft_teach.course.exercise import Exercise, Probe, exercises, find
from peft_teach.course.mistakes import Mistake, mistakes
from peft_teach.course.show import Card
from peft_teach.course.subject import LIMIT_SECONDS, OutOfTime, Subject, SubjectError
from peft_teach.course.use import came_from_use, source_of

# Rounding differs with the order of operations; measured on single layers: float64 2e-15,
# float32 6e-7, bfloat16 7e-3, relative to the largest value. Ten times that is no fault.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class NotCovered(Exception):
    """Raised by a probe: the answer leaves this case out, and may. It counts as passed, with a note."""


# ---------------------------------------------------------------- the verdict


@dataclass
class Verdict:
    """What came of a check.

    status: "not attempted", "incorrect", "error" (it raised) or "correct".
    cause: the misconception that gives exactly these values, or None; candidates: all that do.
    """

    key: str
    status: str
    score: float
    max_score: float
    message: str = ""
    cause: str | None = None
    candidates: list[str] = field(default_factory=list)
    probe: str = ""
    setting: dict = field(default_factory=dict)
    seconds: float = 0.0
    passed_probes: int = 0
    all_probes: int = 0
    lines: list = field(default_factory=list, repr=False)
    folded: list = field(default_factory=list, repr=False)

    @property
    def passed(self) -> bool:
        return self.status == "correct"

    def as_dict(self) -> dict[str, Any]:
        """For programs: plain data."""
        names = "key status score max_score cause candidates message probe setting seconds".split()
        return {name: getattr(self, name) for name in names}

    def card(self) -> Card:
        mark = {"correct": "✓", "not attempted": "○"}.get(self.status, "✗")
        title = f"{mark} {self.key}: {self.status}"
        if self.status != "not attempted":
            title += f" · {self.passed_probes} of {self.all_probes} public checks passed"
        title += f" · {self.score:g} of {self.max_score:g} points"
        return Card(title, self.lines, self.folded)

    def __repr__(self) -> str:
        return self.card().text()

    def _repr_html_(self) -> str:
        return self.card().html()


# ---------------------------------------------------------------- traces


@dataclass(frozen=True)
class Trace:
    """What a probe yielded under one setting, and the error that ended it, if one did."""

    items: tuple[tuple[str, Any], ...]
    error: SubjectError | None = None
    left_out: str = ""


def trace(subject: Subject, probe: Probe, setting: dict, oracle: bool = False) -> Trace:
    items, steps = [], probe.run(subject, setting)
    with _no_trace():
        while True:
            subject.channel.deadline = time.monotonic() + LIMIT_SECONDS
            try:
                items.append(next(steps))
            except StopIteration:
                return Trace(tuple(items))
            except NotCovered as reason:
                return Trace(tuple(items), left_out=str(reason))
            except SubjectError as error:
                return Trace(tuple(items), error)
            except OutOfTime:
                raise
            except Exception as error:
                # A probe computes with what it was given: odd values make it stumble, and so the answer fails.
                # The oracle's values are never odd.
                if oracle:
                    raise
                return Trace(tuple(items), SubjectError(type(error).__name__, f"the check could not go on with what it got: {error}"))


@contextlib.contextmanager
def _no_trace() -> Iterator[None]:
    """Leave random state, grad mode, default dtype, default device and thread count as they were."""
    import numpy

    before = random.getstate(), numpy.random.get_state(), torch.get_default_dtype(), torch.get_num_threads()
    device = torch.get_default_device()
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            if device.type != "cpu":
                torch.set_default_device("cpu")
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(1)  # on tensors this small, a second thread only waits
            yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_default_dtype(before[2])
        torch.set_num_threads(before[3])
        if device.type != "cpu":
            torch.set_default_device(device)


@functools.lru_cache(maxsize=4096)
def _oracle_trace(key: str, probe: str, number: int) -> Trace:
    exercise = find(key)
    p = next(p for p in exercise.probes if p.name == probe)
    return trace(Subject.local(exercise.oracle(), key, oracle=True), p, p.settings[number], oracle=True)


@functools.lru_cache(maxsize=4096)
def _mistake_trace(mistake: Mistake, probe: str, number: int) -> Trace:
    exercise = find(mistake.key)
    p = next(p for p in exercise.probes if p.name == probe)
    try:
        answer = exercise.answer(mistake.build())
    except Exception as error:
        return Trace((), SubjectError(type(error).__name__, str(error)))
    return trace(Subject.local(answer, mistake.key), p, p.settings[number])


# ---------------------------------------------------------------- comparison


@dataclass
class Difference:
    """The first place where a trace is not the expected one."""

    what: str
    kind: str  # error, missing, type, dtype, shape, value
    got: Any = None
    expected: Any = None
    error: SubjectError | None = None


def compare(got: Trace, expected: Trace, tol: float | None) -> Difference | None:
    for i, (what, value) in enumerate(expected.items):
        if i == len(got.items) and got.left_out:
            return None
        if i == len(got.items):
            return Difference(what, "error", expected=value, error=got.error)
        kind = difference(got.items[i][1], value, tol)
        if kind:
            return Difference(what, kind, got.items[i][1], value)
    if got.error is not None:
        return Difference("the end", "error", error=got.error)
    return None


def difference(got: Any, expected: Any, tol: float | None) -> str:
    """"" if the values agree, else what is wrong: type, dtype, shape or value."""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor):
            return "type"
        if got.shape != expected.shape:
            return "shape"
        if got.dtype != expected.dtype:
            return "dtype"
        if not expected.is_floating_point():
            return "" if torch.equal(got, expected) else "value"
        room = TOLERANCE.get(expected.dtype, 1e-5) if tol is None else tol
        g, e = got.double(), expected.double()
        scale = e.abs().max().item() if e.numel() else 0.0
        return "" if bool(((g - e).abs() <= room * max(scale, 1e-30)).all()) else "value"
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return "" if type(got) is type(expected) and got == expected else "value"
    if isinstance(expected, (int, float)):
        if isinstance(got, Tensor) and got.numel() == 1:
            got = got.item()
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            return "type"
        room = 1e-6 if tol is None else tol
        try:
            return "" if math.isclose(got, expected, rel_tol=room, abs_tol=room if tol else 1e-12) else "value"
        except OverflowError:  # 10**400
            return "value"
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return "type"
        if len(got) != len(expected):
            return "shape"
        return next((d for d in map(lambda g, e: difference(g, e, tol), got, expected) if d), "")
    return "" if got == expected else "value"


def _alike(a: Trace, b: Trace, tol: float | None) -> bool:
    """Do two wrong traces tell the same story?"""
    if len(a.items) != len(b.items) or (a.error is None) != (b.error is None):
        return False
    if a.error is not None and (a.error.type, a.error.message) != (b.error.type, b.error.message):
        return False
    return all(x[0] == y[0] and _both(x[1], y[1], tol) for x, y in zip(a.items, b.items))


def _both(a: Any, b: Any, tol: float | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.isnan().any() or b.isnan().any()):
        return a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    return not difference(a, b, tol)


# ---------------------------------------------------------------- diagnosis


def diagnose(exercise: Exercise, traces: dict[tuple[str, int], Trace], failed: list[str]) -> list[str]:
    """The causes whose values are the answer's own, best first.

    A cause has to give the answer's values under every setting of the first probe that failed, and
    be right wherever the answer is right. Those that fit on all probes come first; in a property or
    an answer, where a value is a word, only they count.
    """
    probes = {p.name: p for p in exercise.probes}
    numbers = {name: [n for n in range(len(p.settings)) if (name, n) in traces] for name, p in probes.items()}

    def fits(mistake: Mistake, name: str) -> bool:
        return all(_alike(traces[name, n], _mistake_trace(mistake, name, n), probes[name].tol) for n in numbers[name])

    def right(mistake: Mistake, name: str) -> bool:
        return all(
            compare(_mistake_trace(mistake, name, n), _oracle_trace(exercise.key, name, n), probes[name].tol) is None
            for n in numbers[name]
        )

    possible = [m for m in mistakes(exercise.key) if fits(m, failed[0])]
    best = [m for m in possible if all(fits(m, name) for name in probes)]
    if not best and exercise.kind in ("function", "module"):
        best = [m for m in possible if all(right(m, name) for name in probes if name not in failed)]
        best = [m for m in best if all(fits(m, name) for name in failed)] or best
    return list(dict.fromkeys(m.cause for m in best))


def ratio(got: Any, expected: Any, tol: float = 1e-3) -> float | None:
    """c if got = c · expected everywhere, else None."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor) and got.shape == expected.shape):
        return None
    g, e = got.double().flatten(), expected.double().flatten()
    if not g.numel() or not torch.isfinite(g).all() or e.abs().max() == 0:
        return None
    c = (g @ e / (e @ e)).item()
    return c if (g - c * e).abs().max() <= tol * max(abs(c), 1e-3) * e.abs().max() else None


def formulas(c: float, setting: dict) -> list[str]:
    """Which simple expressions in the numbers of the setting give this factor?"""
    tries = {"-1": -1.0, "2": 2.0, "1/2": 0.5}
    if "lora_alpha" in setting and "r" in setting:
        r, a = float(setting["r"]), float(setting["lora_alpha"])
        tries |= {"r/lora_alpha": r / a, "√r/lora_alpha": r**0.5 / a, "1/lora_alpha": 1 / a, "lora_alpha": a,
                  "r": r, "1/r": 1 / r, "√r": r**0.5, "1/√r": r**-0.5, "lora_alpha/r": a / r, "lora_alpha/√r": a / r**0.5,
                  "(r/lora_alpha)²": (r / a) ** 2, "r/lora_alpha²": r / a**2}
    if "scaling" in setting:
        s = setting["scaling"]
        tries |= {"scaling": s, "1/scaling": 1 / s}
    if setting.get("lora_dropout"):
        p = setting["lora_dropout"]
        tries |= {"1/(1 − lora_dropout)": 1 / (1 - p), "1 − lora_dropout": 1 - p}
    return [name for name, v in tries.items() if math.isclose(v, c, rel_tol=2e-3, abs_tol=1e-9)]


def symptom(got: Any, expected: Any) -> str:
    """What a wrong value looks like, without a guess at why."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor)) or got.shape != expected.shape:
        return ""
    g, e = got.double(), expected.double()
    if g.isnan().any():
        return f"{int(g.isnan().sum())} of {g.numel()} values are NaN"
    if (g == 0).all() and not (e == 0).all():
        return "all your values are 0"
    c = ratio(got, expected)
    if c is not None and abs(c - 1) > 1e-3:
        return f"your values are {c:.4g} × the expected ones, everywhere"
    if g.dim() >= 2 and g.shape[-1] == g.shape[-2] and torch.allclose(g.mT, e, rtol=1e-4, atol=1e-6):
        return "your values are the expected ones, transposed"
    wrong = (g - e).abs() > 1e-4 * e.abs().max()
    if not wrong.any():
        return f"all are nearly right: off by at most {((g - e).abs().max() / e.abs().max()).item():.1g} of the largest"
    if wrong.double().mean() < 0.75:
        return f"{int(wrong.sum())} of {wrong.numel()} values differ, the others are right"
    shift = g - e
    if shift.dim() >= 2 and shift.shape[-2] > 1 and torch.allclose(shift, shift[..., :1, :].expand_as(shift), rtol=1e-3, atol=1e-6):
        return "every row is off by the same vector"
    return ""


# ---------------------------------------------------------------- judging


def judge(exercise: Exercise, subject: Subject, named: bool = True) -> Verdict:
    """Run the exercise's probes on a subject. named: say the cause in the message, not only in `.cause`."""
    began = time.monotonic()
    verdict = Verdict(exercise.key, "incorrect", 0.0, exercise.points)
    verdict.all_probes = len(exercise.probes)
    try:
        _judge(exercise, subject, named, verdict)
    except OutOfTime:
        verdict.status = "error"
        verdict.lines.append(
            f"stopped after {LIMIT_SECONDS:.0f} s: does something loop for ever? A cell that hangs is "
            "stopped with Kernel → Interrupt (or the key i, twice)"
        )
    except SubjectError as error:  # describing the answer failed, or its process ended
        verdict.status = "error"
        verdict.lines.append(("raised", str(error)))
    verdict.seconds = time.monotonic() - began
    printed = "".join(subject.channel.printed)
    if printed and verdict.status != "not attempted":
        verdict.folded.append(("what your code printed", printed[:2000]))
    verdict.message = verdict.message or "\n".join(
        ": ".join(line) if isinstance(line, tuple) else line for line in verdict.lines
    )
    return verdict


def _judge(exercise: Exercise, subject: Subject, named: bool, verdict: Verdict) -> None:
    described = subject.describe()
    to_write = [where.rpartition(".")[2] for where, _ in bodies(exercise.source())]
    empty = [name for name in to_write if name in described["blank"]]
    if described["type"] == "value" and described["blank"] or (to_write and len(empty) == len(to_write)):
        verdict.status = "not attempted"
        verdict.lines = ["Nothing is written here yet."]
        return
    problem = _interface(exercise, described)
    if problem:
        verdict.lines = [problem]
        return

    traces: dict[tuple[str, int], Trace] = {}
    failed: list[str] = []
    notes: list[str] = []
    left_out: list[str] = []
    first: tuple[Probe, dict, Difference] | None = None
    for probe in exercise.probes:
        worst = None
        for number, setting in enumerate(probe.settings):
            traces[probe.name, number] = found = trace(subject, probe, setting)
            if worst is None:
                worst = compare(found, _oracle_trace(exercise.key, probe.name, number), probe.tol)
                if worst is not None:
                    worst_setting = setting
            if found.left_out and found.left_out not in notes:
                notes.append(found.left_out)
        if worst is None and any(traces[probe.name, n].left_out for n in range(len(probe.settings))):
            verdict.all_probes -= 1  # neither right nor wrong
            left_out.append(probe.name)
        elif worst is None:
            verdict.passed_probes += 1
        else:
            failed.append(probe.name)
            first = first or (probe, worst_setting, worst)

    if first is None:
        verdict.status, verdict.score = "correct", float(exercise.points)
        verdict.lines += notes
        return
    probe, setting, found = first
    verdict.score = round(exercise.points * verdict.passed_probes / verdict.all_probes, 2)
    verdict.probe, verdict.setting = probe.name, setting
    if found.kind == "error" and not (found.error and found.error.type == "NotImplementedError"):
        verdict.status = "error"
    verdict.candidates = diagnose(exercise, traces, failed)
    seen = symptom(found.got, found.expected) if found.kind == "value" else ""
    seen = seen or _advice(exercise, found)
    if not verdict.candidates:
        factor = _named_factor(exercise, probe, traces, found.what)
        verdict.candidates = [factor] if factor else []
    verdict.cause = verdict.candidates[0] if len(verdict.candidates) == 1 else None

    lines = [("check", probe.name)]
    shown = ", ".join(f"{k} = {v}" for k, v in setting.items() if k != "seed")
    lines += [("tried", shown)] if shown else []
    lines += _lines(found, exercise)
    lines += [("symptom", seen)] if seen else []
    if empty:
        lines.append(("still blank", ", ".join(empty)))
    if verdict.candidates and named:
        lines.append(("cause" if len(verdict.candidates) == 1 else "cause, one of", "\n".join(_cause(exercise, c, found.kind) for c in verdict.candidates[:4])))
    elif verdict.candidates:
        lines.append(f'Look for what could give that. Stuck? hint("{exercise.key}") names the cause.')
    elif exercise.kind == "property" and named and found.got is False:
        lines.append("A right layer is accused. Is dropout off? Does equal mean up to rounding, measured by the largest output?")
    passed = [p.name for p in exercise.probes if p.name not in failed + left_out]
    if passed:
        lines.append(("right so far", _listed(passed)))
    if failed[1:]:
        lines.append(("not right either, perhaps for the same reason", _listed(failed[1:])))
    if found.error is not None and found.error.trace:
        verdict.folded.append(("traceback", found.error.trace))
    verdict.lines = lines


def _listed(names: list[str]) -> str:
    return " · ".join(names[:5]) + (f" · and {len(names) - 5} more" if len(names) > 5 else "")


def _cause(exercise: Exercise, cause: str, kind: str = "value") -> str:
    if exercise.kind == "property":
        return f"your test answers exactly like one that {cause}"
    if exercise.kind == "answer":
        return f"that is what comes out when {cause}"
    if cause.startswith("your "):
        return cause
    return f"{'what you see is what happens' if kind == 'error' else 'your values equal those you get'} when {cause}"


# What torch says, in words that say what to do.
_ADVICE = (
    (("before Module.__init__",), "super().__init__() comes first in __init__"),
    (("leaf Variable that requires grad", "non-leaf"), "a tensor that asks for a gradient is changed in place. For a parameter that belongs under torch.no_grad(), as in nn.init's functions; of anything else, make a new tensor"),
    (("cannot be multiplied", "Expected size for first two dimensions", "size mismatch"), "two shapes don't fit. A is (r, in), B is (out, r), and vectors x come as rows, (…, in): x @ A.T"),
    (("same dtype", "expected m1 and m2", "to have the same dtype"), "two dtypes meet: bring x to the dtype of A first"),
    (("does not require grad and does not have a grad_fn",), "nothing that is trained reaches the output: is something detached, or no nn.Parameter?"),
    (("as parameter",), "a name that holds an nn.Parameter can only be given another nn.Parameter: change its numbers instead, under torch.no_grad()"),
    (("has no setter", "can't set attribute"), "the class has a property of that name: delete the property if you want a plain attribute"),
)


def _advice(exercise: Exercise, found: Difference) -> str:
    text = found.error.message if found.error else ""
    if exercise.kind == "property" and "leaf Variable" in text:
        return "what get gives is a copy: change the copy without a gradient, then write it with layer.put"
    for needles, advice in _ADVICE:
        if any(needle in text for needle in needles):
            return advice
    if isinstance(found.got, Opaque) and found.got.type == "method":
        return "it is a method: write @property above it, or make it a plain attribute"
    if isinstance(found.got, Opaque) and isinstance(found.expected, Tensor) and found.what.startswith("shape of"):
        return "a tensor is asked for: an nn.Parameter, or a property that returns one"
    return ""


def _named_factor(exercise: Exercise, probe: Probe, traces: dict, what: str) -> str | None:
    """A factor that one expression explains under every setting: a cause that is on nobody's list."""
    common: set[str] | None = None
    seen: set[float] = set()
    for number, setting in enumerate(probe.settings):
        got, expected = dict(traces[probe.name, number].items), dict(_oracle_trace(exercise.key, probe.name, number).items)
        c = ratio(got.get(what), expected.get(what))
        if c is None:
            return None
        seen.add(round(c, 4))
        names = set(formulas(c, setting))
        common = names if common is None else common & names
    if not common or len(probe.settings) < 2 or seen <= {0.0, 1.0}:
        return None
    return f"your values are {min(common, key=len)} times what they should be ({what})"


def _interface(exercise: Exercise, described: dict) -> str:
    """What is wrong with the answer's outside, or ""."""
    if exercise.kind == "answer":
        return "" if described["type"] == "value" else f"{exercise.name} should be a value, not a {described['type']}"
    wanted = "class" if exercise.kind == "module" else "function"
    if described["type"] != wanted:
        return (f"{exercise.name} should be the {wanted} itself, as in check(\"{exercise.key}\", {exercise.name}); "
                f"it is a {described['type']}" + (" or an object made from one" if wanted == "class" else ""))
    names = [p["name"] for p in described["parameters"]]
    if any(p.get("open") for p in described["parameters"]):
        return ""
    missing = [p.name for p in exercise.parameters() if p.name not in names]
    expected = {p.name for p in exercise.parameters()}
    extra = [p["name"] for p in described["parameters"] if p["required"] and p["name"] not in expected]
    if missing or extra:
        return (f"the signature is not the one asked for: {exercise.signature}"
                + (f". Missing: {', '.join(missing)}" if missing else "")
                + (f". Unknown, and without a default: {', '.join(extra)}" if extra else ""))
    return ""


def _lines(found: Difference, exercise: Exercise | None = None) -> list:
    """What came out and what was expected."""
    if found.error is not None:
        error = found.error
        if error.type == "NotImplementedError" and ": " in error.message:
            key, _, where = error.message.partition(": ")
            if exercise is not None and key == exercise.key:
                return [("looked at", found.what), f"{where} is still blank"]
            return [("looked at", found.what),
                    f'{where} is still blank, and this answer calls it. Write it first, or take it from the '
                    f'course for now:\n{where} = use("{key}")']
        lines = [("looked at", found.what), ("raised", f"{error.type}: {error.message}")]
        return lines + ([("in", error.where)] if error.where else [])
    lines = [("looked at", found.what)]
    if _unfilled(found.got):
        return lines + [("yours", "still `...`")]
    if found.got is None and found.what.startswith("the gradient"):
        return lines + [("yours", "None: it has no gradient"), ("expected", f"a tensor {tuple(found.expected.shape)}")]
    hide = exercise is not None and exercise.kind == "answer"  # an answer is not given away by its check
    if found.kind in ("type", "shape") and hide:
        return lines + [("yours", found.got.type if isinstance(found.got, Opaque) else repr(found.got)), ("asked for", exercise.form)]
    if found.kind == "type":
        got = found.got.type if isinstance(found.got, Opaque) else type(found.got).__name__
        kind = f"a tensor {tuple(found.expected.shape)}" if isinstance(found.expected, Tensor) else f"{found.expected!r}"
        return lines + [("yours", f"{'None: is a return missing?' if found.got is None else 'a ' + got}"), ("expected", kind)]
    if found.kind in ("shape", "dtype") and isinstance(found.expected, Tensor):
        told = (lambda t: str(tuple(t.shape))) if found.kind == "shape" else (lambda t: str(t.dtype))
        return lines + [("yours", f"{found.kind} {told(found.got)}"), ("expected", f"{found.kind} {told(found.expected)}")]
    if isinstance(found.expected, Tensor):
        gap = (found.got.double() - found.expected.double()).abs().nan_to_num(nan=math.inf)
        at = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)] if gap.dim() else []
        lines += [("yours", corner(found.got, at)), ("expected", corner(found.expected, at))]
        return lines + [("furthest off", f"by {gap.max().item():.4g}, at {at}")]
    unit = f" {exercise.unit}" if exercise is not None and exercise.unit else ""
    say = lambda v: (f"{v:.6g}" if isinstance(v, float) else repr(v)) + unit  # noqa: E731
    if found.got is None:
        return lines + [("yours", "None: is a return missing?"), ("expected", say(found.expected))]
    return lines + [("yours", say(found.got)), ("asked for", exercise.form) if hide else ("expected", say(found.expected))]


def _unfilled(value: Any) -> bool:
    return isinstance(value, Opaque) and value.type == "ellipsis" or isinstance(value, tuple) and any(map(_unfilled, value))


def corner(tensor: Tensor, at: list[int]) -> str:
    """A few numbers around one place."""
    if tensor.dim() == 0:
        return f"{tensor.item():.4g}"
    while tensor.dim() > 2:
        tensor, at = tensor[at[0]], at[1:]
    if tensor.dim() == 1:
        tensor, at = tensor[None], [0, *at]
    top = max(0, min(at[0] - 1, tensor.shape[0] - 3))
    left = max(0, min(at[1] - 1, tensor.shape[1] - 4))
    part = tensor[top : top + 3, left : left + 4].double()
    rows = ["  ".join(f"{v:9.4g}" for v in row) for row in part.tolist()]
    more = f"  (rows {top}–{top + part.shape[0] - 1}, columns {left}–{left + part.shape[1] - 1})" if part.numel() < tensor.numel() else ""
    return "\n".join(rows) + more


# ---------------------------------------------------------------- for the learner


def check(key: str, answer: Any) -> Verdict:
    """Check an answer against the real library, and remember how it went.

    KeyError for an unknown key. Nothing that the answer raises gets out; random state, grad mode
    and default dtype stay as they were.
    """
    exercise = find(key)
    record = state.read(key)
    attempts = record.get("attempts", 0)
    if exercise.kind != "answer" and _is_reference(exercise, answer):
        return Verdict(key, "incorrect", 0.0, exercise.points, "this is the reference: write your own",
                       all_probes=len(exercise.probes),
                       lines=[f"This is the package's own {exercise.name}. Write yours; it is checked against peft."])
    subject = Subject.local(answer, key)
    verdict = judge(exercise, subject, named=attempts > 0)
    if verdict.status == "not attempted":
        return verdict
    changes: dict[str, Any] = {"attempts": attempts + 1, "status": verdict.status, "last_cause": None if verdict.passed else verdict.candidates}
    if verdict.score >= record.get("score", 0.0):
        changes |= {"score": verdict.score, "max_score": verdict.max_score}
    if verdict.passed:
        changes["passed"] = True
        if exercise.kind == "answer":
            value = subject.value()
            changes["value"] = value.tolist() if isinstance(value, Tensor) else value
        found = None if came_from_use(answer) else source_of(answer, key)
        if found:
            from peft_teach import __version__

            changes |= {"name": found[0], "source": found[1], "version": __version__}
    state.write(key, **changes)
    return verdict


def _is_reference(exercise: Exercise, answer: Any) -> bool:
    reference = exercise.reference()
    return answer is reference or (inspect.isclass(answer) and reference in inspect.getmro(answer))


def hint(key: str, n: int | None = None) -> Card:
    """The n-th of three hints, or the next one that was not seen; after a failed try, its cause too."""
    exercise = find(key)
    record = state.read(key)
    if n is None:
        n = min(record.get("hints", 0) + 1, len(exercise.hints))
    if not isinstance(n, int) or not 1 <= n <= len(exercise.hints):
        raise ValueError(f"n must be a number between 1 and {len(exercise.hints)}, got {n!r}")
    state.write(key, hints=max(n, record.get("hints", 0)))
    title, text = exercise.hints[n - 1]
    lines = [text]
    causes = record.get("last_cause") or []
    if causes:
        lines.append(("your last try" if len(causes) == 1 else "your last try, one of", "\n".join(_cause(exercise, c) for c in causes[:4])))
    after = f'hint("{key}", {n + 1}) says more.'
    if n == len(exercise.hints):
        after = f'That was the last. solution("{key}"' + (") is open." if record.get("attempts", 0) >= 2 else ", give_up=True) opens the answer.")
    return Card(f"Hint {n} of {len(exercise.hints)}: {title}", lines + [after])


def solution(key: str, give_up: bool = False) -> Card:
    """The reference answer and why it works; after two tries, or with give_up=True."""
    exercise = find(key)
    record = state.read(key)
    attempts = record.get("attempts", 0)
    if attempts < 2 and not give_up and not record.get("passed"):
        return Card("○ Not yet", [f'It opens after two tries (so far {attempts}), or with solution("{key}", give_up=True).'])
    state.write(key, saw_solution=True)
    return Card(f"{key}: the reference answer", [exercise.why] if exercise.why else [], code=exercise.source())


def progress(chapter: str | None = None) -> Card:
    """A map of the chapters, or of one, with what is passed and the points."""
    lines, total, most = [], 0.0, 0.0
    chapters: dict[str, list[Exercise]] = {}
    for exercise in exercises():
        if chapter not in (None, exercise.chapter):
            continue
        chapters.setdefault(exercise.chapter, []).append(exercise)
    for name, its in chapters.items():
        records = [state.read(e.key) for e in its]
        points, full = sum(r.get("score", 0.0) for r in records), sum(e.points for e in its)
        total, most = total + points, most + full
        lines.append((name, f"{sum(bool(r.get('passed')) for r in records)} of {len(its)} exercises, {points:g} of {full} points"))
        for e, r in zip(its, records):
            mark = "✓" if r.get("passed") else "✗" if r.get("attempts") else "○"
            seen = ", solution seen" if r.get("saw_solution") else ""
            lines.append(("", f"{mark} {e.name}  {r.get('score', 0.0):g}/{e.points}{seen}"))
    return Card(f"Your progress: {total:g} of {most:g} points", lines)
