"""Chapter 03, the LoRA layer: what its answers are checked with. The oracle is peft's own layer."""

from __future__ import annotations

import math
import warnings
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_teach.course.checking import NotCovered
from peft_teach.course.codec import LinearSpec, Remote
from peft_teach.course.exercise import Exercise, Probe
from peft_teach.course.mistakes import edited, run_once
from peft_teach.course.subject import Instance, Subject, SubjectError
from peft_teach.lora.layer import LoRALinear

CHAPTER = "03_lora_layer"
LAYER = "peft_teach.lora.layer"
COURSE = "peft_teach.course.answers.lora_layer"

# ---------------------------------------------------------------- peft, under the exercises' names


def peft_layer(linear: nn.Module, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False) -> nn.Module:
    """peft's own LoRA layer around an nn.Linear or a Conv1D."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    conv1d = type(linear).__name__ == "Conv1D"
    config = LoraConfig(lora_dropout=lora_dropout, use_rslora=use_rslora, fan_in_fan_out=conv1d)
    linear.requires_grad_(False)
    return Linear(linear, "default", config, r=r, lora_alpha=lora_alpha, is_target_conv_1d_layer=conv1d)


class PeftLoRALinear(nn.Module):
    """peft's layer with this course's names for its parts."""

    def __init__(self, linear, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False):
        super().__init__()
        self.layer = peft_layer(linear, r, lora_alpha, lora_dropout, use_rslora)
        self.linear = self.layer.base_layer

    lora_A = property(lambda self: self.layer.lora_A["default"].weight)
    lora_B = property(lambda self: self.layer.lora_B["default"].weight)
    scaling = property(lambda self: self.layer.scaling["default"])
    merged = property(lambda self: self.layer.merged)

    def delta_weight(self):
        return self.layer.get_delta_weight("default")

    def merge(self):
        with warnings.catch_warnings():  # peft warns of a second merge, and does nothing
            warnings.simplefilter("ignore")
            self.layer.merge()

    def unmerge(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layer.unmerge()

    def forward(self, x):
        return self.layer(x)


class PeftLoRALayer(PeftLoRALinear):
    """The update alone: peft's layer around a weight of zeros."""

    def __init__(self, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False):
        linear = nn.Linear(in_features, out_features, bias=False)
        nn.init.zeros_(linear.weight)
        super().__init__(linear, r, lora_alpha, lora_dropout, use_rslora)


def _with_factors(layer: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    """Put these very tensors into peft's layer, so that gradients reach them."""
    for part, factor in ((layer.lora_A, A), (layer.lora_B, B)):
        del part["default"].weight
        part["default"].weight = factor
    return layer


def peft_delta_weight(A, B, lora_alpha, r, use_rslora=False):
    layer = peft_layer(nn.Linear(A.shape[1], B.shape[0]), r, lora_alpha, use_rslora=use_rslora)
    return _with_factors(layer, A, B).get_delta_weight("default")


def peft_init_(A, B):
    layer = peft_layer(nn.Linear(A.shape[1], B.shape[0]), r=A.shape[0])
    A.data.copy_(layer.lora_A["default"].weight)
    B.data.copy_(layer.lora_B["default"].weight)


def peft_add_update(y, x, A, B, scaling):
    layer = _with_factors(peft_layer(nn.Linear(A.shape[1], B.shape[0]), r=A.shape[0], lora_alpha=1), A, B)
    layer.scaling["default"] = scaling
    layer.base_layer.forward = lambda x: y
    return layer(x)


# ---------------------------------------------------------------- settings: never degenerate

SMALL = dict(in_features=5, out_features=4, r=1, lora_alpha=3, use_rslora=False, bias=True, batch=2, seq=3, seed=1)
MIDDLE = dict(in_features=6, out_features=9, r=3, lora_alpha=6.5, use_rslora=False, bias=False, batch=4, seq=5, seed=2)
STABLE = dict(in_features=10, out_features=7, r=4, lora_alpha=7, use_rslora=True, bias=True, batch=3, seq=2, seed=3)
SETTINGS = (SMALL, MIDDLE, STABLE)


def draw(setting: dict, *names: str) -> list[Tensor]:
    """Tensors of this setting, by name; always the same ones."""
    i, o, r = setting["in_features"], setting["out_features"], setting["r"]
    rows = (setting.get("batch", 2), setting.get("seq", 3))
    shapes = {"A": (r, i), "B": (o, r), "W": (o, i), "bias": (o,), "x": (*rows, i), "y": (*rows, o), "gy": (*rows, o), "gW": (o, i)}
    drawn = []
    for name in names:
        generator = torch.Generator().manual_seed(setting["seed"] * 100 + sorted(shapes).index(name))
        drawn.append(torch.randn(shapes[name], generator=generator))
    return drawn


def grad(*tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]


Items = Iterator[tuple[str, Any]]

# ---------------------------------------------------------------- delta_weight


def delta_values(subject: Subject, s: dict) -> Items:
    A, B = draw(s, "A", "B")
    yield "ΔW", subject.call(A, B, s["lora_alpha"], s["r"])


def delta_rslora(subject: Subject, s: dict) -> Items:
    A, B = draw(s, "A", "B")
    yield "ΔW with use_rslora=True", subject.call(A, B, s["lora_alpha"], s["r"], use_rslora=True)


def delta_dtype(subject: Subject, s: dict) -> Items:
    for dtype in (torch.float64, torch.bfloat16):
        A, B = (t.to(dtype) for t in draw(s, "A", "B"))
        yield f"ΔW of {dtype} factors", subject.call(A, B, s["lora_alpha"], s["r"])


def delta_gradient(subject: Subject, s: dict) -> Items:
    A, B, gW = draw(s, "A", "B", "gW")
    for use_rslora in (False, True):
        done = subject.call_all(*grad(A, B), s["lora_alpha"], s["r"], use_rslora=use_rslora, grad_output=gW)
        yield f"the gradient of A, use_rslora={use_rslora}", done["grads"][0]
        yield f"the gradient of B, use_rslora={use_rslora}", done["grads"][1]


# r is not A's number of rows where an adapter was pruned; no check asks for that.
PLAIN = tuple({k: v for k, v in s.items() if k not in ("bias", "batch", "seq", "use_rslora")} for s in SETTINGS)

# ---------------------------------------------------------------- init_lora_


def starts(A: Any, B: Any, in_features: int) -> Items:
    """How two factors are distributed, in units in which the right answer is the same for all sizes."""
    if not (isinstance(A, Tensor) and isinstance(B, Tensor)):
        yield "A and B", (A, B)
        return
    unit = A.double() * math.sqrt(in_features)
    yield "share of zeros in B", (B == 0).double().mean().item()
    yield "share of zeros in A", (A == 0).double().mean().item()
    yield "largest |A| · √in_features", unit.abs().max().item()
    yield "standard deviation of A · √(3 · in_features)", unit.std().item() * math.sqrt(3)
    yield "mean of A · √in_features", unit.mean().item()
    yield "rank of A", int(torch.linalg.matrix_rank(A.double()))


def init_in_place(subject: Subject, s: dict) -> Items:
    shapes = (s["r"], s["in_features"]), (s["out_features"], s["r"])
    A, B = (torch.full(shape, 9.0) for shape in shapes)
    subject.seed(s["seed"])
    A, B = subject.call_all(*grad(A, B))["args"]
    yield "do A and B still ask for a gradient?", A.requires_grad and B.requires_grad
    yield "was A written, in place?", bool((A != 9.0).any())
    yield "was B written, in place?", bool((B != 9.0).any())
    yield from starts(A, B, s["in_features"])
    subject.seed(s["seed"] + 1)
    again = subject.call_all(*grad(torch.zeros(shapes[0]), torch.zeros(shapes[1])))["args"][0]
    yield "does another seed draw another A?", not torch.equal(again, A)


BIG = (dict(in_features=400, out_features=50, r=32, seed=4), dict(in_features=90, out_features=300, r=60, seed=5))

# ---------------------------------------------------------------- add_update


def update_value(subject: Subject, s: dict) -> Items:
    y, x, A, B = draw(s, "y", "x", "A", "B")
    yield "y + update", subject.call(y, x, A, B, s["scaling"])


def update_gradient(subject: Subject, s: dict) -> Items:
    y, x, A, B, gy = draw(s, "y", "x", "A", "B", "gy")
    grads = subject.call_all(*grad(y, x, A, B), s["scaling"], grad_output=gy)["grads"]
    for name, value in zip(("y", "x", "A", "B"), grads):
        yield f"the gradient of {name}", value


def update_half(subject: Subject, s: dict) -> Items:
    # Around 256, bfloat16 goes in steps of 2: 257.002 lies past the middle and is rounded up. 1.002 alone
    # is 1.0 in bfloat16, and 257, which lies in the middle, is rounded down.
    in_features, out_features, r = s["in_features"], s["out_features"], s["r"]
    y = torch.full((2, 3, out_features), 256.0) * torch.tensor([1.0, -1.0])[:, None, None]
    x = torch.ones(2, 3, in_features) * torch.tensor([1.0, -1.0])[:, None, None]
    A, B = torch.zeros(r, in_features), torch.zeros(out_features, r)
    A[0, 0], B[:, 0] = 1 + 2**-9, 1 / s["scaling"]
    half, A_fine = getattr(torch, s["dtype"]), A.clone()
    A_fine[0, 1] = -1.0  # the two cancel, but for 2⁻⁹, which A in 16 bits has lost
    yield "y + update, where 16 bits are too few for A", subject.call((y * 0).to(half), x.to(half), A_fine, B, s["scaling"])
    yield "y + update, a case that two roundings get wrong", subject.call(y.to(half), x.to(half), A, B, s["scaling"])


def update_half_shape(subject: Subject, s: dict) -> Items:
    y, x, A, B, gy = draw(s, "y", "x", "A", "B", "gy")
    half = getattr(torch, s["dtype"])
    yield "y + update", subject.call(y.to(half), x.to(half), A, B, s["scaling"])
    yield "y + update, where x is float32 and y is not", subject.call(y.to(half), x, A, B, s["scaling"])
    grads = subject.call_all(y.to(half), *grad(x.to(half), A, B), s["scaling"], grad_output=gy.to(half))["grads"]
    for name, value in zip(("x", "A", "B"), grads[1:]):
        yield f"the gradient of {name}", value


SCALED = tuple({k: v for k, v in s.items() if k not in ("bias", "lora_alpha", "use_rslora")} | {"scaling": scaling}
               for s, scaling in zip(SETTINGS, (3.0, 1.5, 0.7)))
HALF = tuple(s | {"dtype": "bfloat16"} for s in SCALED[1:])

# ---------------------------------------------------------------- LoRALayer and LoRALinear


def build(subject: Subject, s: dict, **more: Any) -> Instance:
    """A layer of this setting, with A and B filled; LoRALinear gets the frozen layer described."""
    kwargs = {k: s[k] for k in ("r", "lora_alpha", "use_rslora") if k in s} | more
    subject.seed(s["seed"])
    if "bias" in s:
        W, bias = draw(s, "W", "bias")
        return subject.build(LinearSpec(W, bias if s["bias"] else None), **kwargs)
    return subject.build(s["in_features"], s["out_features"], **kwargs)


def filled(subject: Subject, s: dict, **more: Any) -> Instance:
    layer = build(subject, s, **more)
    A, B = draw(s, "A", "B")
    layer.put("lora_A", A)
    layer.put("lora_B", B)
    return layer.eval()


def frozen(s: dict, x: Tensor) -> Tensor:
    """What the frozen layer alone gives; zeros for LoRALayer, which has none."""
    if "bias" not in s:
        return x.new_zeros(*x.shape[:-1], s["out_features"])
    W, bias = draw(s, "W", "bias")
    return F.linear(x, W, bias if s["bias"] else None)


def shapes(subject: Subject, s: dict) -> Items:
    layer = build(subject, s)
    for name in ("lora_A", "lora_B"):
        value = layer.get(name)
        yield f"shape of .{name}", tuple(value.shape) if isinstance(value, Tensor) else value
    yield ".scaling", layer.get("scaling")
    if "bias" in s:
        yield "is .linear the layer that was given?", bool(torch.equal(layer.get("linear.weight"), draw(s, "W")[0]))


def identity(subject: Subject, s: dict) -> Items:
    layer, (x,) = build(subject, s).eval(), draw(s, "x")
    yield "output of a new layer", layer(x)


def start(subject: Subject, s: dict) -> Items:
    layer = build(subject, s)
    yield from starts(layer.get("lora_A"), layer.get("lora_B"), s["in_features"])
    other = build(subject, s | {"seed": s["seed"] + 50})
    yield "does another layer get another A?", not torch.equal(other.get("lora_A"), layer.get("lora_A"))


def output(subject: Subject, s: dict) -> Items:
    layer, (x,) = filled(subject, s), draw(s, "x")
    done = layer.call_all(x)
    y, base = done["value"], frozen(s, x)
    if "bias" in s and isinstance(y, Tensor) and y.shape == base.shape:
        yield "what the layer adds to the frozen one's output", y - base
    yield "output", y
    yield "is x left as it was?", bool(torch.equal(done["args"][0], x))


def gradients(subject: Subject, s: dict) -> Items:
    layer, (x, gy) = filled(subject, s), draw(s, "x", "gy")
    for mode in ("training", "eval"):
        layer.train(mode == "training").zero_grad()
        done = layer.call_all(*grad(x), grad_output=gy)
        for name in ("lora_A", "lora_B"):
            yield f"the gradient of {name} in {mode} mode", layer.grad(name)
        yield f"the gradient of x in {mode} mode", done["grads"][0]
    if "bias" in s:
        yield "has the frozen weight no gradient?", layer.grad("linear.weight") is None


def trained(subject: Subject, s: dict) -> Items:
    layer = build(subject, s)
    if "bias" in s:
        yield "trainable numbers in .linear", layer.trainable("linear")
    yield "trainable numbers in all", layer.trainable()


def steps(subject: Subject, s: dict) -> Items:
    layer, (x, gy) = filled(subject, s).train(), draw(s, "x", "gy")
    step = layer.optimizer("AdamW", lr=0.02)
    for _ in range(3):
        layer.zero_grad()
        layer.call_all(x, grad_output=gy)
        step()
    yield "lora_A after three steps", layer.get("lora_A")
    yield "lora_B after three steps", layer.get("lora_B")
    yield "output after three steps", layer.eval()(x)


def dropout_eval(subject: Subject, s: dict) -> Items:
    layer, (x,) = filled(subject, s, lora_dropout=s["lora_dropout"]), draw(s, "x")
    yield "output in eval mode", layer(x)
    layer.train()(x)
    yield "output in eval mode, after training mode", layer.eval()(x)


def dropout_train(subject: Subject, s: dict) -> Items:
    """With A = 1 and B = 1 the update shows each dropped input; with A mixed, a zero shows a later dropout."""
    n, p = s["in_features"], s["lora_dropout"]
    layer = build(subject, s, lora_dropout=p)
    generator = torch.Generator().manual_seed(s["seed"])
    x = torch.rand(40, 10, n, generator=generator) + 0.5
    base, scaling = frozen(s, x), s["lora_alpha"] / s["r"]
    B = torch.eye(s["out_features"], n)
    layer.train()
    layer.put("lora_B", B * 0)
    yield "is the frozen part left alone by dropout?", bool(torch.allclose(_tensor(layer(x)), base, atol=1e-5))
    layer.put("lora_A", torch.eye(n))
    layer.put("lora_B", B)
    subject.seed(s["seed"])
    done = layer.call_all(*grad(x), grad_output=torch.ones(40, 10, s["out_features"]))
    x = x.detach()
    kept = ((_tensor(done["value"]) - base)[..., :n] / (scaling * x)).double()
    dropped = kept.abs() < 1e-3
    yield "do two tokens of a sentence lose different inputs?", bool((dropped[:, 0] != dropped[:, 1]).any())
    yield "do two sentences lose different inputs?", bool((dropped[0] != dropped[1]).any())
    yield "is x left as it was?", bool(torch.equal(done["args"][0], x))
    yield "share of inputs that are dropped", dropped.double().mean().item()
    yield "factor on those that are kept", kept[~dropped].mean().item() if (~dropped).any() else 0.0
    yield "is that factor the same for all?", bool((kept[~dropped].std() < 1e-3).item()) if (~dropped).sum() > 1 else False
    W = draw(s, "W")[0] if "bias" in s else torch.zeros(s["out_features"], n)
    through = _tensor(done["grads"][0]) - W.sum(0)  # what of the gradient of x came through the adapter
    yield "share of inputs with a gradient through the adapter", (through.abs() > 1e-3).double().mean().item()
    again = (_tensor(layer(x)) - base)[..., :n].abs() < 1e-3
    yield "does the next call draw anew?", bool((again != dropped).any())
    layer.put("lora_A", torch.randn(n, n, generator=generator))
    mixed = (_tensor(layer(x)) - base)[..., :n].abs() < 1e-4
    yield "share of zeros behind a mixing A", mixed.double().mean().item()
    layer.put("lora_B", torch.randn(s["out_features"], n, generator=generator))
    mixed = (_tensor(layer(x)) - base)[..., :n].abs() < 1e-4
    yield "share of zeros behind a mixing A and B", mixed.double().mean().item()


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise SubjectError("TypeError", f"the layer gave a {getattr(value, 'type', type(value).__name__)} instead of a tensor")


def delta(subject: Subject, s: dict) -> Items:
    yield ".delta_weight()", filled(subject, s).method("delta_weight")


def merge(subject: Subject, s: dict) -> Items:
    layer, (x, gy) = filled(subject, s), draw(s, "x", "gy")
    yield ".merged before", _plain(layer.get("merged"))
    layer.method("merge")
    yield ".merged after merge()", _plain(layer.get("merged"))
    yield "linear.weight after merge()", layer.get("linear.weight")
    done = layer.call_all(*grad(x), grad_output=gy)
    yield "output after merge()", done["value"]
    yield "the gradient of x after merge()", done["grads"][0]
    yield "trainable numbers in .linear while merged", layer.trainable("linear")
    fresh = build(subject, s)
    fresh.method("merge")
    yield ".merged of a new layer (B = 0) after merge()", _plain(fresh.get("merged"))


def merge_twice(subject: Subject, s: dict) -> Items:
    layer, (x,) = filled(subject, s), draw(s, "x")
    layer.method("merge")
    layer.method("merge")
    yield "linear.weight after a second merge()", layer.get("linear.weight")
    yield "output after a second merge()", layer(x)
    layer.method("unmerge")
    yield ".merged after two merges and one unmerge()", _plain(layer.get("merged"))
    yield "linear.weight after two merges and one unmerge()", layer.get("linear.weight")


def merge_training(subject: Subject, s: dict) -> Items:
    layer, (x,) = filled(subject, s, lora_dropout=0.4).train(), draw(s, "x")
    layer.method("merge")
    yield ".merged, after merge() in training mode", _plain(layer.get("merged"))
    yield "is the layer still in training mode?", layer.get("training")
    yield "output of a merged layer in training mode", layer(x)
    layer = filled(subject, s, lora_dropout=0.4)
    layer.method("merge")
    yield "output after merge() in eval mode, then train()", layer.train()(x)
    yield ".merged after merge() in eval mode, then train()", _plain(layer.get("merged"))


def unmerge(subject: Subject, s: dict) -> Items:
    layer, (x,) = filled(subject, s), draw(s, "x")
    layer.method("unmerge")
    yield "linear.weight after unmerge() without a merge", layer.get("linear.weight")
    layer.method("merge")
    layer.method("unmerge")
    yield ".merged after unmerge()", _plain(layer.get("merged"))
    yield "linear.weight after unmerge()", layer.get("linear.weight")
    yield "output after unmerge()", layer(x)
    layer.method("unmerge")
    yield "linear.weight after a second unmerge()", layer.get("linear.weight")
    yield "trainable numbers after unmerge()", layer.trainable()


def merge_again(subject: Subject, s: dict) -> Items:
    layer, (x, A) = filled(subject, s), draw(s, "x", "A")
    layer.method("merge")
    layer.method("unmerge")
    layer.put("lora_A", A.flip(0).roll(1, 1))
    yield "output after unmerge() and a change of A", layer(x)
    layer.method("merge")
    yield ".merged, merged again", _plain(layer.get("merged"))
    yield "linear.weight, merged again after a change of A", layer.get("linear.weight")
    yield "output, merged again after a change of A", layer(x)
    layer.method("unmerge")
    yield "linear.weight, unmerged again", layer.get("linear.weight")
    layer.put("linear.weight", draw(s, "W")[0].flip(0))
    layer.method("merge")
    layer.method("unmerge")
    yield "linear.weight, given anew, merged and unmerged", layer.get("linear.weight")


def cycle(subject: Subject, s: dict) -> Items:
    """Training goes on after merge and unmerge, with the optimizer that there was."""
    layer, (x, gy) = filled(subject, s).train(), draw(s, "x", "gy")
    step = layer.optimizer("SGD", lr=0.01)
    for action in ("merge", "unmerge", None):
        if action:
            layer.method(action)
            continue
        layer.zero_grad()
        layer.call_all(x, grad_output=gy)
        step()
    yield "lora_A, trained after merge() and unmerge()", layer.get("lora_A")
    yield "lora_B, trained after merge() and unmerge()", layer.get("lora_B")


def conv1d(subject: Subject, s: dict) -> Items:
    """GPT-2's layer keeps its weight as (in, out). It may be refused, but not be wrong."""
    W, bias, A, B, x = draw(s, "W", "bias", "A", "B", "x")
    filled(subject, s | {"bias": True})(x)  # refusing a Conv1D is one thing, having no layer another
    refused = "A Conv1D (GPT-2's layer, weight (in, out)) is refused: no points hang on it, chapter 04 will want it."
    try:
        layer = subject.build(LinearSpec(W.T.contiguous(), bias, "Conv1D"), r=s["r"], lora_alpha=s["lora_alpha"]).eval()
        layer.put("lora_A", A)
        layer.put("lora_B", B)
        y = layer(x)
    except SubjectError:
        raise NotCovered(refused) from None
    yield "output over a Conv1D", y
    try:
        layer.method("merge")
    except SubjectError as error:
        if error.type in ("NotImplementedError", "TypeError"):
            raise NotCovered(refused) from None
        raise
    merged = layer.get("linear.weight")
    if s["in_features"] == s["out_features"] and not torch.allclose(merged, W.T + layer.method("delta_weight").T, atol=1e-4):
        # A layer for nn.Linear alone can't be told this one by its shape, so it costs nothing; but it is said.
        raise NotCovered("Over a square Conv1D, merge() adds ΔW untransposed: no points hang on it, but refuse a Conv1D or handle it.")
    yield "linear.weight of a Conv1D after merge()", merged
    yield "output of a Conv1D after merge()", layer(x)


def other_axes(subject: Subject, s: dict) -> Items:
    """x without a sequence axis, or with one more: refused is fine, wrong is not."""
    layer, (x,) = filled(subject, s), draw(s, "x")
    for name, other in (("(batch, in_features)", x[:, 0]), ("(batch, 1, seq, in_features)", x[:, None])):
        try:
            y = layer(other)
        except SubjectError:
            raise NotCovered(f"x of shape {name} is refused: no points hang on it.") from None
        yield f"output for x of shape {name}", y


def half_precision(subject: Subject, s: dict) -> Items:
    """Over a bfloat16 layer: a note, since `add_update` is the exercise on dtypes."""
    W, bias, x = draw(s, "W", "bias", "x")
    where = "Over a bfloat16 layer" if "bias" in s else "For x in bfloat16"
    kept = where + ", A and B should be float32 and the output bfloat16; {}. No points hang on it."
    try:
        more = {"r": s["r"], "lora_alpha": s["lora_alpha"]}
        if "bias" in s:
            layer = subject.build(LinearSpec(W.bfloat16(), bias.bfloat16()), **more)
        else:
            layer = subject.build(s["in_features"], s["out_features"], **more)
        y, A = layer(x.bfloat16()), layer.get("lora_A")
    except SubjectError as error:
        raise NotCovered(kept.format(f"this layer raises {error.type}")) from None
    found = getattr(A, "dtype", None), getattr(y, "dtype", None)
    if found != (torch.float32, torch.bfloat16):
        raise NotCovered(kept.format(f"here A is {found[0]} and the output {found[1]}"))
    yield "A and the output", True


LAYER_SETTINGS = tuple({k: v for k, v in s.items() if k != "bias"} for s in SETTINGS)
BIG_LAYER = tuple(s | {"lora_alpha": 7} for s in BIG)
BIG_LINEAR = tuple(s | {"bias": False} for s in BIG_LAYER)
DROPOUT = tuple(s | {"lora_dropout": p} for s, p in zip(LAYER_SETTINGS[1:], (0.25, 0.4)))
DROPOUT_LINEAR = tuple(s | {"bias": True} for s in DROPOUT)
SQUARE = (dict(in_features=6, out_features=8, r=6, lora_alpha=7, seed=6), dict(in_features=5, out_features=9, r=5, lora_alpha=8, seed=7))
TRAIN_LAYER = tuple(s | {"lora_dropout": p} for s, p in zip(SQUARE, (0.25, 0.4)))
TRAIN_LINEAR = tuple(s | {"bias": True} for s in TRAIN_LAYER)

MODULE_PROBES = (
    ("the shapes", shapes, None), ("a new layer changes nothing", identity, None), ("the output", output, None),
    ("the gradients", gradients, None), ("what is trained", trained, None), ("three steps of AdamW", steps, 1e-3),
    ("ΔW", delta, None),
)


def module_probes(settings: tuple[dict, ...], big: tuple, dropout: tuple, train: tuple) -> tuple[Probe, ...]:
    plain = tuple(Probe(name, run, settings, tol) for name, run, tol in MODULE_PROBES)
    return (*plain[:2], Probe("how A and B start", start, big, 0.05), *plain[2:],
        Probe("dropout in eval mode", dropout_eval, dropout), Probe("dropout in training", dropout_train, train, 0.05),
        Probe("other leading axes", other_axes, settings[1:]), Probe("in 16 bits", half_precision, settings[1:2]),
    )


# ---------------------------------------------------------------- merge_changes_nothing

def _candidates() -> dict[str, tuple[bool, tuple[str, str] | None, dict]]:
    """Layers for a learner's test: right ones, which it must let pass, and bad ones, which it must catch."""
    weight = "weight += delta if isinstance(self.linear, nn.Linear) else delta.T"
    guard = "        if self.merged:\n            return\n"
    first = "self.weight_before_merge = weight.detach().clone()"
    keep = f"        weight = self.linear.weight\n        delta = self.delta_weight()\n        {first}"
    restore = "self.linear.weight.copy_(self.weight_before_merge)"
    return {
        "a right layer": (True, None, {}),
        "a right layer, fresh (B = 0)": (True, None, {"B": 0.0}),
        "a right layer with dropout, in training mode": (True, None, {"lora_dropout": 0.5}),
        "a right layer with large numbers in it": (True, None, {"W": 1000.0}),
        "a right layer whose unmerge subtracts": (True, (restore, "self.linear.weight -= self.delta_weight()"), {}),
        "a layer whose merge forgets the scaling": (False, (weight, "weight += self.lora_B @ self.lora_A"), {}),
        "a layer whose merge forgets the scaling, fresh (B = 0)": (False, (weight, "weight += self.lora_B @ self.lora_A"), {"B": 0.0}),
        "a layer whose merge subtracts": (False, (weight, "weight -= delta"), {}),
        "a layer that adds the update after merging too": (False, ("        if self.merged:\n            return y\n", ""), {}),
        "a layer whose second merge adds again": (False, ("        if self.merged:\n            return\n        weight =", "        weight ="), {}),
        "a layer whose second merge adds again, but whose unmerge puts all right": (
            False, (guard + keep, keep.replace(first, f"if not self.merged:\n            {first}")), {}),
        "a layer whose merge leaves out the first output": (False, (weight, "weight[1:] += delta[1:]"), {}),
        "a layer that is off when merged, from the second token on": (
            False, ("        if self.merged:\n            return y\n", "        if self.merged:\n            return torch.cat([y[:, :1], y[:, 1:] * 1.1], 1)\n"), {}),
        "a layer whose unmerge does nothing to the weight": (False, (restore, "pass"), {}),
        "a layer whose unmerge forgets the scaling": (False, (restore, "self.linear.weight -= self.lora_B @ self.lora_A"), {}),
        "a layer that merges through bfloat16": (False, (weight, "weight += delta.bfloat16()"), {}),
        "a layer whose merge also changes the bias": (False, (weight, weight + "\n        self.linear.bias -= 50"), {}),
    }


def _layer_for(edit: tuple[str, str] | None, setup: dict, s: dict) -> tuple[nn.Module, Tensor]:
    """(a layer, right or edited, and set up; an input for it)"""
    Layer = run_once(edited(LAYER, edit), "LoRALinear") if edit else LoRALinear
    W, bias, A, B, x = draw(s, "W", "bias", "A", "B", "x")
    layer = Layer(LinearSpec(W * setup.get("W", 1.0), bias).build(), r=s["r"], lora_alpha=s["lora_alpha"], lora_dropout=setup.get("lora_dropout", 0.0))
    layer.lora_A.data.copy_(A)
    layer.lora_B.data.copy_(B * setup.get("B", 1.0))
    return layer, x


def _verdict_on(name: str, right: bool, edit: tuple[str, str] | None, setup: dict) -> Probe:
    def probe(subject: Subject, s: dict) -> Items:
        layer, x = _layer_for(edit, setup, s)
        subject.seed(s["seed"])
        remote = Remote(layer, ("merge", "unmerge"))
        yield ("does your test accept this right layer?" if right else "does your test accept this faulty layer?"), _plain(subject.call(remote, x))

    return Probe(f"{'lets pass' if right else 'catches'}: {name}", probe, (PROPERTY_SMALL, PROPERTY_MIDDLE))


def _plain(value: Any) -> Any:
    """A truth value may come as a tensor of one, or as 0 or 1."""
    one = isinstance(value, Tensor) and value.numel() == 1 and value.dtype == torch.bool
    return bool(value) if one or value in (0, 1) and isinstance(value, int) else value


PROPERTY_SMALL = dict(in_features=5, out_features=4, r=2, lora_alpha=3, batch=2, seq=3, seed=8)
PROPERTY_MIDDLE = dict(in_features=6, out_features=9, r=3, lora_alpha=7, batch=4, seq=5, seed=9)


def merge_is_harmless(layer: nn.Module, x: Tensor) -> bool:
    """The oracle for the learner's test: the layer's *weights*, in float64, instead of its outputs."""
    layer.eval()
    generator = torch.Generator().manual_seed(0)
    layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    linear, inputs = layer.linear, torch.eye(x.shape[-1])
    before, bias = linear.weight.detach().double(), linear.bias.detach().clone()
    target = before + layer.lora_B.double() @ layer.lora_A.double() * layer.lora_alpha / layer.r
    offset = lambda: float((layer(inputs).detach().double().T - bias.double()[:, None] - target).abs().max())  # noqa: E731
    room, found = 1e-5 * float(target.abs().max()), [offset()]
    for action in (layer.merge, layer.merge, layer.unmerge):
        action()
        found.append(offset())
    restored = float((linear.weight.detach().double() - before).abs().max())
    return max(found) <= room and restored <= room and torch.equal(bias, linear.bias)


# ---------------------------------------------------------------- answers: counts, and which factor moves


def _value(subject: Subject, s: dict) -> Items:
    yield "your answer", subject.value()


def _entry(name: str):
    def probe(subject: Subject, s: dict) -> Items:
        value = subject.value()
        found = value.get(name, f"there is no entry {name!r}") if isinstance(value, dict) else value
        if isinstance(found, (tuple, list)):  # "a" and "Both" are meant well
            found = tuple({"a": "A", "b": "B"}.get(str(w).strip().lower(), str(w).strip().lower()) if isinstance(w, str) else w for w in found)
            strange = [w for w in found if w not in ("neither", "A", "B", "both")]
            found = f"{strange[0]!r} is none of the four words" if strange else found
        yield f"what moves at steps 1 and 2 from: {name}", found

    return Probe(name, probe, ({},))


def peft_parameter_count(in_features, out_features, r):
    layer = peft_layer(nn.Linear(in_features, out_features), r=r)
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def peft_break_even_rank(in_features, out_features):
    """The last rank at which a layer of peft's, counted, has fewer trainable numbers than the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = 1
        while peft_parameter_count(in_features, out_features, r + 1) < in_features * out_features:
            r += 1
    return r


INITS = ("A zero, B zero", "A drawn, B zero", "A zero, B drawn", "A drawn, B drawn")
WORDS = "each start has a pair of words, for steps 1 and 2, out of \"neither\", \"A\", \"B\", \"both\""


def peft_moving_factors():
    """Two steps of SGD on peft's layer, from each start."""
    names = {(False, False): "neither", (True, False): "A", (False, True): "B", (True, True): "both"}
    found = {}
    for name in INITS:
        torch.manual_seed(0)
        layer = peft_layer(nn.Linear(6, 5), r=2, lora_alpha=3)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for factor, drawn in ((A, name.startswith("A drawn")), (B, name.endswith("B drawn"))):
            nn.init.normal_(factor) if drawn else nn.init.zeros_(factor)
        optimizer, x, target = torch.optim.SGD([A, B], lr=0.05), torch.randn(7, 6), torch.randn(7, 5)
        moved = []
        for _ in range(2):
            before = A.detach().clone(), B.detach().clone()
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
            moved.append(names[not torch.equal(A, before[0]), not torch.equal(B, before[1])])
        found[name] = tuple(moved)
    return found


Q_PROJ = {"in_features": 576, "out_features": 192, "r": 8}  # v_proj of SmolLM2-135M

EXERCISES = (
    Exercise(
        "lora_layer.delta_weight", "function", LAYER, points=2, minutes=(4, 8), difficulty=1, importance=5,
        oracle=lambda: peft_delta_weight,
        probes=(
            Probe("the values", delta_values, PLAIN), Probe("rank-stabilised scaling", delta_rslora, PLAIN),
            Probe("the dtype stays", delta_dtype, PLAIN[1:]), Probe("gradients reach A and B", delta_gradient, PLAIN[1:]),
        ),
        hints=(
            ("which of the two products?", "ΔW has the shape of W, (out_features, in_features). Only one order of A (r, in_features) and B (out_features, r) gives that."),
            ("my values are all off by a factor", "The product of the two factors is multiplied by one number: lora_alpha divided by r. With use_rslora it is divided by the square root of r."),
            ("the skeleton", "scaling = …            # one number, from lora_alpha, r and use_rslora\nreturn scaling * (B @ …)"),
        ),
        why="B A is a matrix of rank at most r. Dividing by r is meant to keep the update from growing with r, so that lora_alpha need not be tuned anew for each. It does more than that: the product of random factors grows like √r, which is rsLoRA's point.",
    ),
    Exercise(
        "lora_layer.parameter_count", "answer", COURSE, points=1, minutes=(2, 4), difficulty=1, importance=4, unit="trainable numbers", form="a whole number",
        settings=Q_PROJ, oracle=lambda: peft_parameter_count(**Q_PROJ), probes=(Probe("the count", _value, ({},)),),
        hints=(
            ("where do I begin?", "Only A and B are trained. Write down their two shapes."),
            ("shapes", "A is (r, in_features), B is (out_features, r). A matrix has rows × columns numbers."),
            ("the skeleton", "s = settings(\"lora_layer.parameter_count\")\nparameter_count = s.r * … + … * s.r"),
        ),
        why="A has r · in numbers and B has out · r, so LoRA costs r · (in + out) where the weight has in · out.",
    ),
    Exercise(
        "lora_layer.break_even_rank", "answer", COURSE, points=1, minutes=(3, 5), difficulty=2, importance=3, unit="", form="a whole number, a rank",
        settings={k: Q_PROJ[k] for k in ("in_features", "out_features")},
        oracle=lambda: peft_break_even_rank(Q_PROJ["in_features"], Q_PROJ["out_features"]), probes=(Probe("the rank", _value, ({},)),),
        hints=(
            ("what is compared?", "The number of trainable values with LoRA, r · (in + out), with the number in the weight itself, in · out."),
            ("I am off by one", "The question is for the largest r that still has *fewer*. At r = in · out / (in + out) exactly, both have the same number."),
            ("the skeleton", "Solve r · (in + out) < in · out for a whole number r."),
        ),
        why="r · (in + out) < in · out. For a square d × d layer that is r < d/2: low rank saves only while it is low.",
    ),
    Exercise(
        "lora_layer.moving_factors", "answer", COURSE, points=2, minutes=(4, 8), difficulty=3, importance=4,
        form=WORDS, oracle=peft_moving_factors, probes=tuple(_entry(name) for name in INITS),
        hints=(
            ("how can I know without running?", "Write the gradient of each factor: dL/dB = scaling · G Aᵀ and dL/dA = scaling · Bᵀ G, where G is the gradient of ΔW. When is each of them zero?"),
            ("the second step", "What moved in the first step is no longer zero in the second."),
            ("the skeleton", "If one factor is zero, the *other* one has no gradient. If both are zero, neither has."),
        ),
        why="Each factor's gradient contains the other one. One of them must be drawn, else nothing ever moves; one of them must be zero, else the new layer is not the old one.",
    ),
    Exercise(
        "lora_layer.init_lora_", "function", LAYER, points=2, minutes=(3, 6), difficulty=2, importance=4,
        oracle=lambda: peft_init_, probes=(Probe("how A and B start", init_in_place, BIG, 0.05),),
        hints=(
            ("in-place operation on a leaf?", "Nothing is returned: the numbers inside A and B change. A and B are parameters, so that belongs under torch.no_grad(); the functions in torch.nn.init whose names end in _ take care of it."),
            ("which distribution?", "A: uniform between −1/√in_features and +1/√in_features, where in_features is A's number of columns. B: zero."),
            ("the skeleton", "nn.init.uniform_(A, -bound, bound)      # bound from A.shape[1]\nnn.init.…_(B)"),
        ),
        why="kaiming_uniform_ with a = √5 has the bound 1/√in_features, which is what nn.Linear does to its own weight. It is not the 0.01 · N(0, 1) of many tutorials.",
    ),
    Exercise(
        "lora_layer.add_update", "function", LAYER, points=3, minutes=(8, 12), difficulty=3, importance=5,
        oracle=lambda: peft_add_update,
        probes=(
            Probe("the values", update_value, SCALED), Probe("the gradients", update_gradient, SCALED),
            Probe("a bfloat16 layer: dtype and values", update_half_shape, HALF),
            Probe("a bfloat16 layer: one rounding, at the end", update_half, HALF, 1e-3),
        ),
        hints=(
            ("mat1 and mat2 have different dtypes", "x comes in the frozen layer's dtype, A and B stay in float32. Bring x to A's dtype first."),
            ("right in float32, off in bfloat16", "Add in float32 and cast once, at the very end. Casting the update before adding rounds twice."),
            ("the skeleton", "x = x.to(A.dtype)\nupdate = (x @ …) @ … * scaling\nreturn (y + update).to(…)"),
        ),
        why="y in 16 bits plus an update in float32 is a float32 sum (torch promotes); it is rounded once, to y's dtype. That is bit for bit what peft does.",
    ),
    Exercise(
        "lora_layer.LoRALayer", "module", LAYER, points=4, minutes=(8, 12), difficulty=3, importance=4,
        needs=("lora_layer.delta_weight", "lora_layer.init_lora_", "lora_layer.add_update"),
        oracle=lambda: PeftLoRALayer, probes=module_probes(LAYER_SETTINGS, BIG_LAYER, DROPOUT, TRAIN_LAYER),
        hints=(
            ("what has to be in __init__?", "super().__init__(), then self.scaling, a dropout, and two nn.Parameter: lora_A (r, in_features) and lora_B (out_features, r), started by init_lora_."),
            ("dropout: where?", "On the input of A and nowhere else, and only in training mode: nn.Dropout knows the mode by itself."),
            ("the skeleton", "def forward(self, x):\n    x = self.dropout(x)\n    return self.scaling * (x through A, then through B)"),
        ),
        why="This is the right half of the picture. It has no frozen weight, so LoRALinear only has to add it.",
    ),
    Exercise(
        "lora_layer.LoRALinear", "module", LAYER, points=8, minutes=(25, 35), difficulty=4, importance=5,
        needs=("lora_layer.delta_weight", "lora_layer.init_lora_", "lora_layer.add_update"),
        oracle=lambda: PeftLoRALinear,
        probes=module_probes(SETTINGS, BIG_LINEAR, DROPOUT_LINEAR, TRAIN_LINEAR) + (
            Probe("merge", merge, SETTINGS), Probe("merge twice", merge_twice, SETTINGS),
            Probe("merged, in training mode", merge_training, SETTINGS[1:]), Probe("unmerge", unmerge, SETTINGS),
            Probe("merge, change A, merge again", merge_again, SETTINGS[1:]), Probe("merge, unmerge, train", cycle, SETTINGS[1:], 1e-4),
            Probe("over a Conv1D", conv1d, (MIDDLE, STABLE, SMALL | {"out_features": 5})),
        ),
        hints=(
            ("my loss moves, but so does the base", "linear.requires_grad_(False) freezes a whole layer, its bias too. Then only lora_A and lora_B are left."),
            ("merging changes my output", "Merged, the update is inside linear.weight: forward must not add it again. And merge() on a merged layer, like unmerge() on one that isn't, has nothing to do."),
            ("the skeleton of merge", "if self.merged: return\nkeep a copy of the weight\nadd self.delta_weight() to it, under torch.no_grad()\n# unmerge: copy it back, and forget it. `merged` is: is there a copy?\n# a Conv1D's weight is (in, out): add ΔW transposed, or refuse it in __init__ with a TypeError"),
        ),
        why="A copy restores the weight exactly; subtracting ΔW again leaves a rounding difference, in bfloat16 a visible one.",
    ),
    Exercise(
        "lora_layer.merge_changes_nothing", "property", COURSE, points=4, minutes=(10, 15), difficulty=4, importance=3,
        oracle=lambda: merge_is_harmless, probes=tuple(_verdict_on(name, *candidate) for name, candidate in _candidates().items()),
        hints=(
            ("my test catches nothing", "Is B zero? Then the update is zero, and every merge looks right. Write something into lora_B first."),
            ("my test accuses a right layer", "In training mode dropout changes the output from call to call. And equal means up to rounding: compare with the largest output, not with 0."),
            ("the skeleton", "layer.eval()\nlayer.put(\"lora_B\", …)\nbefore = layer(x)\nfor change in (layer.merge, layer.merge, layer.unmerge):\n    change()\n    …"),
        ),
        why="A property is worth as much as the faults it catches and the right answers it lets pass. These faults are of the kind that people write.",
    ),
)
