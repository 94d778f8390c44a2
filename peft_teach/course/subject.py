"""The object under check, and how a check uses it: by messages, never by hand.

    check's side                                learner's side
    Subject ── Channel ──── bytes ────────────▶ Host ── the answer
    Instance                                      └── objects made from it, by number

In a notebook the bytes go straight to the Host; in grading they go through a pipe to a child
process (child.py). Nothing else differs, so a check can't tell the two apart.

A learner's *property* turns this round for a moment: it is called with a stand-in, an Instance on
the learner's side, for an object that lives in a Host on the check's side.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import io
import os
import struct
import time
import traceback
import warnings
from typing import Any, Callable

import torch
from torch import Tensor

from peft_teach.course.codec import CodecError, LinearSpec, Ref, Remote, decode, encode
from peft_teach.course.use import run_source

LIMIT_SECONDS = 20.0  # between operations of one check


class SubjectError(Exception):
    """The code under check raised: its type, message, line and traceback, as text."""

    def __init__(self, type: str, message: str, where: str = "", trace: str = ""):
        super().__init__(f"{type}: {message}")
        self.type, self.message, self.where, self.trace = type, message, where, trace


class OutOfTime(Exception):
    """A check took longer than LIMIT_SECONDS."""


# ---------------------------------------------------------------- the learner's side


class Host:
    """Holds the answer and what is made from it, and does what messages ask."""

    def __init__(self, answer: Any = None, key: str = "", objects: tuple = ()):
        self.answer, self.key = answer, key
        self.objects: dict[int, Any] = dict(enumerate(objects))
        self.ask: Callable[[bytes], bytes] | None = None  # to the check's side, for stand-ins
        self.unwrap: Callable[[int], Any] | None = None  # an oracle is given the object itself

    def handle(self, message: bytes) -> bytes:
        """One request in, one reply out; whatever the answer raises becomes part of the reply."""
        reply: dict[str, Any] = {"value": None}
        with quiet() as printed, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                request = decode(message, self._stand_in)
                reply["value"] = getattr(self, "op_" + request.pop("op"))(**request)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                reply["error"] = _describe_error(error)
        reply["printed"] = printed.getvalue()[:2000]
        reply["warnings"] = [str(w.message)[:500] for w in warned if w.category is UserWarning]
        try:
            return encode(reply, strict=False)
        except CodecError as error:  # nested too deep, or too large
            return encode(reply | {"value": None, "error": _describe_error(error)})

    def _stand_in(self, number: int, methods: list[str]):
        if self.unwrap is not None:
            return self.unwrap(number)
        head = struct.pack("<I", number)
        return Instance(Channel(lambda message: self.ask(head + message)), Ref(0), tuple(methods))

    def _resolve(self, value):
        return self.objects[value.id] if isinstance(value, Ref) else value

    def _arguments(self, args, kwargs):
        build = lambda v: v.build() if isinstance(v, LinearSpec) else self._resolve(v)  # noqa: E731
        return [build(v) for v in args], {k: build(v) for k, v in kwargs.items()}

    def _keep(self, value) -> Ref:
        number = max(self.objects, default=-1) + 1
        self.objects[number] = value
        return Ref(number)

    def op_load(self, source: str, name: str, key: str) -> None:
        """The first request to a child process: run the learner's text, and hold what `name` is in it."""
        self.answer, self.key = run_source(source, name), key

    def op_describe(self) -> dict:
        return describe(self.answer, self.key)

    def op_value(self):
        return self.answer

    def op_seed(self, seed: int):
        torch.manual_seed(seed)

    def op_build(self, args, kwargs) -> Ref:
        args, kwargs = self._arguments(args, kwargs)
        return self._keep(self.answer(*args, **kwargs))

    def op_call(self, target, args, kwargs, grad_output=None, method=None) -> dict:
        """Call; with grad_output also backward. → value, the arguments afterwards, their gradients."""
        args, kwargs = self._arguments(args, kwargs)
        function = self.answer if target is None else self._resolve(target)
        value = (_follow(function, method) if method else function)(*args, **kwargs)
        grads = []
        if grad_output is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"expected a tensor, got {type(value).__name__}")
            value.backward(grad_output.to(value.dtype))
            grads = [a.grad if isinstance(a, Tensor) else None for a in args]
        return {"value": value, "args": list(args), "grads": grads}

    def op_get(self, target, name):
        return _follow(self._resolve(target), name)

    def op_put(self, target, name, tensor):
        place = _follow(self._resolve(target), name)
        if not isinstance(place, Tensor):
            raise TypeError(f"{name} is a {type(place).__name__}, not a tensor")
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(place.shape)}, not {tuple(tensor.shape)}")
        place.data.copy_(tensor)
        if not torch.equal(_follow(self._resolve(target), name).detach(), tensor.to(place.dtype)):
            raise TypeError(f"writing into {name} did not change it: return the parameter itself, not a copy")

    def op_grad(self, target, name):
        tensor = _follow(self._resolve(target), name)
        if not tensor.is_leaf and tensor._base is not None and tensor._base.grad is not None:
            # A property may return a view of its parameter (a transpose, say).
            return tensor._base.grad.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # .grad of a tensor that is not a leaf
            return tensor.grad

    def op_trainable(self, target, name="") -> int:
        module = _follow(self._resolve(target), name) if name else self._resolve(target)
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    def op_mode(self, target, train: bool):
        self._resolve(target).train(train)

    def op_to(self, target, dtype):
        self._resolve(target).to(dtype)

    def op_zero_grad(self, target):
        self._resolve(target).zero_grad()

    def op_optimizer(self, target, kind: str, lr: float) -> Ref:
        parameters = [p for p in self._resolve(target).parameters() if p.requires_grad]
        return self._keep(getattr(torch.optim, kind)(parameters, lr=lr))

    def op_step(self, target):
        self._resolve(target).step()


def _follow(value: Any, name: str) -> Any:
    for part in name.split("."):
        if part.startswith("_"):
            raise AttributeError(f"{name} is not for others to read")
        value = getattr(value, part)
    return value


_LIBRARY = os.path.dirname(os.__file__)  # Python's own


def _describe_error(error: BaseException) -> dict:
    """An exception as text; its line is the innermost one that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_LIBRARY, "<frozen")) and "site-packages" not in f.filename
           and "peft_teach/course" not in f.filename.replace("\\", "/")]
    where = f"line {own[-1].lineno} of {own[-1].name}: {own[-1].line}" if own else ""
    trace = "".join(traceback.format_exception_only(error)) if not own else "".join(
        traceback.format_list(own) + traceback.format_exception_only(error)
    )
    try:
        message = str(error)
    except Exception:  # of an exception that the learner wrote
        message = "its message can't be shown"
    return {"type": type(error).__name__, "message": message[:2000], "where": where, "trace": trace[-4000:]}


@contextlib.contextmanager
def quiet():
    """Catch what the code prints, and make input() an error instead of a wait for ever."""

    def no_input(prompt=""):
        raise RuntimeError("input() is called: a check can't answer questions")

    printed, before = io.StringIO(), builtins.input
    builtins.input = no_input
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        builtins.input = before


def describe(answer: Any, key: str) -> dict:
    """What an answer looks like from outside: its type, parameters, bodies still blank, public names."""
    if inspect.isclass(answer):
        functions = {name: _function_of(value) for name, value in vars(answer).items()}
        kind, names = "class", [n for n in dir(answer) if not n.startswith("_")]
    elif callable(answer):
        functions, kind, names = {getattr(answer, "__name__", "it"): answer}, "function", []
    else:
        return {"type": "value", "blank": ["answer"] if _hollow(answer) else [], "parameters": [], "names": []}
    blank = [name for name, f in functions.items() if f is not None and is_blank(f, key)]
    try:
        parameters = [
            {"name": p.name, "open": p.kind is p.VAR_KEYWORD,
             "required": p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            for p in inspect.signature(answer).parameters.values()
        ]
    except (TypeError, ValueError):
        parameters = []
    return {"type": kind, "blank": blank, "parameters": parameters, "names": names}


def _hollow(answer: Any) -> bool:
    """Is every value in it still `...`?"""
    if isinstance(answer, dict):
        return bool(answer) and all(map(_hollow, answer.values()))
    if isinstance(answer, (tuple, list)):
        return bool(answer) and all(map(_hollow, answer))
    return answer is ...


def _function_of(value: Any):
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if inspect.isfunction(value) else None


def _stub():
    raise NotImplementedError("key: where")


def is_blank(function: Callable, key: str) -> bool:
    """Is this body still the one line `raise NotImplementedError("key: …")`?"""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code.co_names != ("NotImplementedError",) or len(code.co_code) != len(_stub.__code__.co_code):
        return False
    return any(isinstance(c, str) and c.startswith(f"{key}: ") for c in code.co_consts)


# ---------------------------------------------------------------- the check's side


class Channel:
    """Requests over a transport (bytes → bytes), and the objects that the other side may use."""

    def __init__(self, transport: Callable[[bytes], bytes]):
        self.transport = transport
        self.exposed: list[Host] = []
        self.printed: list[str] = []
        self.warnings: list[str] = []
        self.deadline: float | None = None

    def request(self, op: str, **arguments: Any) -> Any:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        reply = decode(self.transport(encode({"op": op} | arguments, self._expose)))
        if reply["printed"]:
            self.printed.append(reply["printed"])
        self.warnings = reply["warnings"]
        if reply.get("error"):
            if reply["error"]["type"] == "OutOfTime":
                raise OutOfTime
            raise SubjectError(**reply["error"])
        return reply["value"]

    def _expose(self, remote: Remote) -> int:
        self.exposed.append(Host(objects=(remote.object,)))
        return len(self.exposed) - 1

    def serve(self, message: bytes) -> bytes:
        """Answer a stand-in. OutOfTime when the check has no time left: it goes through the learner's code."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        (number,) = struct.unpack("<I", message[:4])
        return self.exposed[number].handle(message[4:])


class Subject:
    """An answer, as a check sees it."""

    def __init__(self, channel: Channel):
        self.channel = channel

    @classmethod
    def local(cls, answer: Any, key: str = "", oracle: bool = False) -> "Subject":
        """A subject in this process; an oracle gets the objects behind stand-ins themselves."""
        host = Host(answer, key)
        subject = cls(Channel(host.handle))
        host.ask = subject.channel.serve
        if oracle:
            host.unwrap = lambda number: subject.channel.exposed[number].objects[0]
        return subject

    def describe(self) -> dict:
        return self.channel.request("describe")

    def value(self) -> Any:
        return self.channel.request("value")

    def seed(self, seed: int) -> None:
        self.channel.request("seed", seed=seed)

    def build(self, *args: Any, **kwargs: Any) -> "Instance":
        return Instance(self.channel, self.channel.request("build", args=list(args), kwargs=kwargs))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.call_all(*args, **kwargs)["value"]

    def call_all(self, *args: Any, grad_output: Tensor | None = None, **kwargs: Any) -> dict:
        """→ value, the arguments afterwards (`args`), with grad_output their gradients (`grads`)."""
        return self.channel.request(
            "call", target=None, args=list(args), kwargs=kwargs, grad_output=grad_output
        )


class Instance:
    """An object on the other side. Tensors that come from it are copies.

    It is called like a module; `get("lora_B")`, `put("lora_B", tensor)`, `grad("lora_B")` read and
    write what it holds; `train()`, `eval()`, `zero_grad()`; and the methods that it has by name.
    """

    _own = ("get", "put", "grad", "train", "eval", "trainable", "zero_grad")

    def __init__(self, channel: Channel, ref: Ref, methods: tuple[str, ...] = ()):
        vars(self).update(_channel=channel, _ref=ref, _methods=methods)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call_all(*args, **kwargs)["value"]

    def call_all(self, *args: Any, grad_output: Tensor | None = None, **kwargs: Any) -> dict:
        """→ value, and with grad_output the gradients of the arguments (`grads`)."""
        return self._channel.request(
            "call", target=self._ref, args=list(args), kwargs=kwargs, grad_output=grad_output
        )

    def method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        reply = self._channel.request("call", target=self._ref, args=list(args), kwargs=kwargs, method=name)
        return reply["value"]

    def get(self, name: str) -> Any:
        """A copy of what is held under this name (dots lead into parts: "linear.weight")."""
        return self._channel.request("get", target=self._ref, name=name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into the one held under this name."""
        self._channel.request("put", target=self._ref, name=name, tensor=tensor)

    def grad(self, name: str) -> Tensor | None:
        return self._channel.request("grad", target=self._ref, name=name)

    def trainable(self, name: str = "") -> int:
        """How many numbers are trained, in all or in one part."""
        return self._channel.request("trainable", target=self._ref, name=name)

    def train(self, train: bool = True) -> "Instance":
        self._channel.request("mode", target=self._ref, train=train)
        return self

    def eval(self) -> "Instance":
        return self.train(False)

    def to(self, dtype: torch.dtype) -> "Instance":
        self._channel.request("to", target=self._ref, dtype=dtype)
        return self

    def zero_grad(self) -> None:
        self._channel.request("zero_grad", target=self._ref)

    def optimizer(self, kind: str, lr: float) -> Callable[[], None]:
        """An optimizer over what is trained, made there; → its step."""
        ref = self._channel.request("optimizer", target=self._ref, kind=kind, lr=lr)
        return lambda: self._channel.request("step", target=ref)

    def __getattr__(self, name: str):
        if name in self.__dict__.get("_methods", ()):
            return lambda *args, **kwargs: self.method(name, *args, **kwargs)
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._no(name)

    def __setattr__(self, name: str, value: Any):
        raise self._no(name)

    def _no(self, name: str) -> AttributeError:
        there_is = ", ".join(f".{n}(…)" for n in self._own + self._methods)
        return AttributeError(
            f"this stand-in has no .{name}. There is: calling it, {there_is}. "
            f'To read or write a tensor: layer.get("lora_B"), layer.put("lora_B", tensor)'
        )


__all__ = ["Channel", "CodecError", "Host", "Instance", "OutOfTime", "Subject", "SubjectError", "describe", "is_blank"]
