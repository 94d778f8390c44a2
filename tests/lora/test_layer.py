"""peft_teach.lora.layer against peft's own layer, bit for bit, and against what must hold of any LoRA.

Equal to peft in float32, float64, bfloat16 and float16: no exception met. Where two ways round can't
give equal bits, the limit is a share of Σ|terms| (LIMIT, below); the largest met on a CPU was

                               float64   float32   bfloat16  float16
    merged against unmerged    2.8e-16   1.8e-7    5.6e-3    9.1e-4   W + S·BA is itself rounded
    a batch against its rows   1.5e-16   7.7e-8    5.4e-4             the order of adding up depends
    another order of r         1.2e-16   6.3e-8    0                  on a matrix product's shape
    linear in α, in B          2.0e-16   1.3e-7    3.5e-3             the output is rounded
    A and B made bfloat16                          7.8e-3             peft's ΔW goes through float32
"""

import copy
import math
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from few import few
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_teach.lora.layer import LoRALayer, LoRALinear, add_update, delta_weight, init_lora_

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ALL_DTYPES = [*DTYPES, torch.float16]
# Two ways round that differ by rounding alone may differ by this much of the sum of |terms|.
LIMIT = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


# ---------------------------------------------------------------------- settings, layers, comparing


@dataclass(frozen=True)
class Setting:
    """One layer and one input. Never degenerate: in ≠ out ≠ r, α ≠ r, α/r and α/√r no power of two."""

    in_features: int = 7
    out_features: int = 5
    r: int = 3
    lora_alpha: float = 7
    lora_dropout: float = 0.0
    bias: bool = True
    use_rslora: bool = False
    leading: tuple = (2, 4)  # the shape of x before in_features
    seed: int = 0

    @property
    def scaling(self):
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def lora(self):
        """What LoRALinear and LoRALayer are built with."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }


def hides_a_mistake(s: Setting) -> bool:
    return s.lora_alpha == s.r or math.frexp(s.scaling)[0] == 0.5


@st.composite
def setting(draw, dropout=(0.0, 0.1, 0.3, 0.5), leading=((3,), (2, 5), (), (7, 2), (2, 3, 4), (1, 6))):
    in_features, out_features = draw(st.lists(st.integers(2, 48), min_size=2, max_size=2, unique=True))
    r = draw(st.integers(1, max(1, min(in_features, out_features) - 1)))
    s = st.builds(
        Setting,
        in_features=st.just(in_features),
        out_features=st.just(out_features),
        r=st.just(r),
        lora_alpha=st.sampled_from([7, 3, 5, 6, 11, 0.3, 1.7, 24, 100]),
        lora_dropout=st.sampled_from(dropout),
        bias=st.booleans(),
        use_rslora=st.booleans(),
        leading=st.sampled_from(leading),
        seed=st.integers(0, 10_000),
    )
    return draw(s.filter(lambda s: not hides_a_mistake(s)))


KINDS = ["Linear", "Conv1D"]


def new_base(s, dtype, device, kind="Linear"):
    """A plain layer with drawn weights: nn.Linear, or Conv1D, which always has a bias."""
    torch.manual_seed(s.seed)
    if kind == "Conv1D":
        base = Conv1D(s.out_features, s.in_features)
        nn.init.normal_(base.weight, std=0.4)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(s.in_features, s.out_features, bias=s.bias)
    return base.to(device, dtype)


def new_input(s, dtype, device):
    torch.manual_seed(s.seed + 1)
    return torch.randn(*s.leading, s.in_features).to(device, dtype)


def new_layer(s, dtype, device, kind="Linear", base=None, **changes):
    """Ours, over new_base, with A and B drawn (B ≠ 0)."""
    layer = LoRALinear(new_base(s, dtype, device, kind) if base is None else base, **(s.lora | changes))
    fill(s, layer.lora_A, layer.lora_B)
    return layer


def new_peft_layer(s, dtype, device, kind="Linear"):
    """peft's layer as its users get it, with the same base, A and B as new_layer."""
    config = LoraConfig(
        target_modules=["proj"],
        fan_in_fan_out=kind == "Conv1D",
        **s.lora,
    )
    model = get_peft_model(nn.ModuleDict({"proj": new_base(s, dtype, device, kind)}), config)
    layer = model.base_model.model["proj"]
    fill(s, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return layer


@torch.no_grad()
def fill(s, A, B):
    """Draw A and B with a standard deviation of 0.3."""
    draws = torch.Generator().manual_seed(s.seed + 2)
    for factor in (A, B):
        factor.copy_(0.3 * torch.randn(factor.shape, generator=draws))


def factors(layer):
    """(A, B) of ours or peft's."""
    if isinstance(layer, (LoRALinear, LoRALayer)):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def assert_same_bits(ours, theirs, what="value"):
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, peft has {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, peft has {tuple(theirs.shape)}"
    assert ours.device == theirs.device
    if not torch.equal(ours, theirs):
        raise AssertionError(f"{what}: differs by up to {(ours.double() - theirs.double()).abs().max():.3g}")


def terms(layer, x):
    """Σ|terms| of each output: what a rounding error has to be measured against."""
    linear, (A, B) = layer.linear, factors(layer)
    weight = layer.weight_before_merge if layer.merged else linear.weight
    weight = weight if isinstance(linear, nn.Linear) else weight.T
    total = F.linear(x.double().abs(), weight.double().abs())
    total += F.linear(F.linear(x.double().abs(), A.double().abs()), B.double().abs()) * layer.scaling
    return (total if linear.bias is None else total + linear.bias.double().abs()).detach()


MEASURED = {}  # (what, dtype) → largest difference met; printed by `pytest -s` at the end of the file


def assert_close(a, b, terms, dtype, what):
    """|a − b| ≤ LIMIT · terms, element by element."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    if not a.numel():
        return
    ratio = ((a.double() - b.double()).abs() / terms.clamp_min(1e-300)).max().item()
    MEASURED[what, dtype] = max(ratio, MEASURED.get((what, dtype), 0.0))
    assert ratio <= LIMIT[dtype], f"{what}: differ by {ratio:.3g} of the sum of |terms|"


@pytest.fixture(scope="module", autouse=True)
def print_what_was_measured():
    yield
    for (what, dtype), ratio in sorted(MEASURED.items(), key=str):
        print(f"\n{what}, {dtype}: {ratio:.2g}", end="")


ids = {"ids": lambda value: str(value).removeprefix("torch.")}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, **ids)
every_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, **ids)


# ------------------------------------------------------------------------- equal to peft, bit for bit


@each_kind
@every_dtype
@few(30)
@given(s=setting(), train=st.booleans())
@example(s=Setting(r=1, lora_alpha=3), train=True)
@example(s=Setting(leading=(0,)), train=True)
@example(s=Setting(leading=(2, 0), lora_dropout=0.3), train=True)
@example(s=Setting(64, 48, 8, 20, 0.3, leading=(3, 17)), train=True)
@example(s=Setting(in_features=130, out_features=96, r=16, use_rslora=True, leading=(2, 33)), train=False)
def test_forward_and_gradients_equal_peft(device, kind, dtype, s, train):
    x = new_input(s, dtype, device)
    results = []
    for layer in (new_layer(s, dtype, device, kind), new_peft_layer(s, dtype, device, kind)):
        layer.train(train)
        x_here = x.clone().requires_grad_()
        torch.manual_seed(s.seed + 3)  # the same dropout for both
        y = layer(x_here)
        torch.manual_seed(s.seed + 4)
        y.backward(torch.randn_like(y))
        A, B = factors(layer)
        results.append({"y": y, "grad x": x_here.grad, "grad A": A.grad, "grad B": B.grad})
    ours, theirs = results
    assert ours["y"].dtype == dtype
    for what in ours:
        assert_same_bits(ours[what], theirs[what], what)


@each_kind
@each_dtype
@few(8)
@given(s=setting(leading=((3,), (2, 5), (7, 2))))
@example(s=Setting(64, 48, 8, 20, 0.3, leading=(3, 17)))
@example(s=Setting(r=1, lora_alpha=3, use_rslora=True))
def test_ten_adamw_steps_equal_peft(device, kind, dtype, s):
    x = new_input(s, dtype, device)
    torch.manual_seed(s.seed + 5)
    target = torch.randn(*s.leading, s.out_features).to(device, dtype)
    runs = []
    for layer in (new_layer(s, dtype, device, kind), new_peft_layer(s, dtype, device, kind)):
        layer.train()
        trained = [p for p in layer.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.1)
        losses = []
        torch.manual_seed(s.seed + 6)
        for _ in range(10):
            loss = F.mse_loss(layer(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert not any(torch.equal(p, start) for p, start in zip(trained, before, strict=True))
        runs.append((torch.stack(losses), *factors(layer)))
    for what, ours, theirs in zip(("losses", "A", "B"), *runs, strict=True):
        assert_same_bits(ours, theirs, what)


@each_kind
@every_dtype
@few(15)
@given(s=setting())
@example(s=Setting(r=1, lora_alpha=3))
def test_delta_and_merged_weight_equal_peft(device, kind, dtype, s):
    ours, theirs = new_layer(s, dtype, device, kind), new_peft_layer(s, dtype, device, kind)
    expected = theirs.get_delta_weight("default")
    expected = expected.T if kind == "Conv1D" else expected  # peft gives it in the weight's own form
    assert_same_bits(ours.delta_weight(), expected, "delta_weight()")
    A, B = factors(ours)
    assert_same_bits(delta_weight(A, B, s.lora_alpha, s.r, s.use_rslora), expected, "delta_weight(A, B, …)")
    assert ours.delta_weight().shape == (s.out_features, s.in_features)

    ours.merge()
    theirs.merge()
    assert_same_bits(ours.linear.weight, theirs.base_layer.weight, "merged weight")
    x, x_peft = (new_input(s, dtype, device).requires_grad_() for _ in range(2))
    y, y_peft = ours(x), theirs(x_peft)  # in training mode, and still without dropout
    assert_same_bits(y, y_peft, "merged forward")
    y.sum().backward()
    y_peft.sum().backward()
    assert_same_bits(x.grad, x_peft.grad, "merged grad x")
    assert A.grad is None and B.grad is None


@each_dtype
@few(8)
@given(s=setting(), train=st.booleans())
def test_equals_peft_under_autocast(device, dtype, s, train):
    x = new_input(s, dtype, device)
    results = []
    for layer in (new_layer(s, dtype, device), new_peft_layer(s, dtype, device)):
        layer.train(train)
        torch.manual_seed(s.seed + 3)
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        results.append((y, *(factor.grad for factor in factors(layer))))
    for what, ours, theirs in zip(("y", "grad A", "grad B"), *results, strict=True):
        assert_same_bits(ours, theirs, what)


@few(10)
@given(s=setting(dropout=(0.0,)))
def test_adapters_that_someone_made_16_bit(device, s):
    """After model.bfloat16() A and B are bfloat16 too: forward as in peft, delta within rounding."""
    dtype = torch.bfloat16
    ours = new_layer(s, torch.float32, device).to(dtype)
    theirs = new_peft_layer(s, torch.float32, device).to(dtype)
    x = new_input(s, dtype, device)
    assert ours.lora_A.dtype == dtype
    assert_same_bits(ours(x), theirs(x), "y")
    A, B = factors(ours)
    each = (B.double().abs() @ A.double().abs() * s.scaling).detach()
    assert_close(ours.delta_weight(), theirs.get_delta_weight("default"), each, dtype, "delta of 16-bit A, B")


# ------------------------------------------------------------------------------- what any LoRA must do


@each_kind
@every_dtype
@few(10)
@given(s=setting(), train=st.booleans())
def test_a_new_layer_changes_nothing(device, kind, dtype, s, train):
    base = new_base(s, dtype, device, kind)
    x = new_input(s, dtype, device)
    expected = base(x)
    layer = LoRALinear(base, **s.lora).train(train)
    assert_same_bits(layer(x), expected)
    weight = base.weight.clone()
    layer.merge()
    assert_same_bits(base.weight, weight)
    assert_same_bits(layer(x), expected)


@few(15)
@given(s=setting())
def test_the_rank_of_the_change_is_at_most_r(device, s):
    layer = new_layer(s, torch.float64, device)
    delta = layer.delta_weight()
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == s.r  # random factors: exactly r
    with torch.no_grad():
        layer.lora_B[:, -1] = 0
    assert torch.linalg.matrix_rank(layer.delta_weight(), rtol=1e-10) == s.r - 1


@each_dtype
@few(15)
@given(s=setting(dropout=(0.0,)), k=st.sampled_from([3.0, 0.7, 5.0]))
def test_linear_in_alpha_and_in_B(device, dtype, s, k):
    x = new_input(s, dtype, device)
    layer = new_layer(s, dtype, device)
    stronger = new_layer(s, dtype, device, lora_alpha=k * s.lora_alpha)
    scaled_B = new_layer(s, dtype, device)
    with torch.no_grad():
        scaled_B.lora_B *= k
    f0, f = layer.linear(x).double(), layer(x).double()
    for what, other in (("alpha", stronger), ("B", scaled_B)):
        expected = f0 + k * (f - f0)
        assert_close(other(x), expected, (1 + k) * terms(layer, x), dtype, f"linear in {what}")
    assert stronger.scaling == pytest.approx(k * s.scaling)


@few(15)
@given(s=setting(dropout=(0.0,)))
def test_only_the_product_B_A_counts(device, s):
    """(A, B) → (M A, B M⁻¹) changes nothing, for any invertible M."""
    dtype = torch.float64
    x = new_input(s, dtype, device)
    layer = new_layer(s, dtype, device)
    before, scale, delta = layer(x), terms(layer, x), layer.delta_weight()
    torch.manual_seed(s.seed + 7)
    rotation = torch.linalg.qr(torch.randn(s.r, s.r, dtype=dtype)).Q
    M = (rotation * torch.linspace(0.5, 2, s.r, dtype=dtype)).to(device)
    A_before = layer.lora_A.detach().clone()
    with torch.no_grad():
        layer.lora_A.copy_(M @ layer.lora_A)
        layer.lora_B.copy_(layer.lora_B @ torch.linalg.inv(M))
    assert not torch.allclose(layer.lora_A, A_before, rtol=1e-3)
    scale = torch.maximum(scale, terms(layer, x))
    assert_close(layer(x), before, 4 * scale, dtype, "M A, B M⁻¹")
    torch.testing.assert_close(layer.delta_weight(), delta, rtol=0, atol=1e-12 * delta.abs().max().item())


@each_dtype
@few(15)
@given(s=setting(dropout=(0.0,)).filter(lambda s: s.r > 1))
def test_the_order_of_the_r_directions_does_not_count(device, dtype, s):
    x = new_input(s, dtype, device)
    layer = new_layer(s, dtype, device)
    before, scale = layer(x), terms(layer, x)
    order = torch.arange(s.r - 1, -1, -1, device=device)
    with torch.no_grad():
        layer.lora_A.copy_(layer.lora_A[order])
        layer.lora_B.copy_(layer.lora_B[:, order])
    assert_close(layer(x), before, scale, dtype, "order of r")


@each_kind
@every_dtype
@few(20)
@given(s=setting())
@example(s=Setting(130, 96, 16, 20, leading=(2, 33)))
def test_merged_gives_what_unmerged_gave(device, kind, dtype, s):
    x = new_input(s, dtype, device)
    layer = new_layer(s, dtype, device, kind).eval()
    before = layer(x)
    assert not torch.equal(before, layer.linear(x))
    layer.merge()
    assert layer.merged
    assert_close(layer(x), before, terms(layer, x), dtype, "merged against unmerged")
    assert_same_bits(layer(x), layer.linear(x), "a merged layer is its linear layer")


@each_kind
@every_dtype
@few(15)
@given(s=setting(), calls=st.lists(st.sampled_from("merge unmerge copy pickle train".split()), max_size=7))
@example(s=Setting(), calls=["merge", "merge", "unmerge"])
@example(s=Setting(), calls=["merge", "unmerge", "unmerge", "merge"])
@example(s=Setting(), calls=["merge", "copy", "unmerge"])
@example(s=Setting(), calls=["merge", "train", "unmerge"])
def test_any_order_of_merging_and_unmerging(device, kind, dtype, s, calls):
    """Twice is once; the weight comes back exactly, also in 16 bits, copied or after a change of B."""
    layer = new_layer(s, dtype, device, kind)
    weight = layer.linear.weight.detach().clone()
    x = new_input(s, dtype, device)
    base = layer.linear(x).detach()
    merged, held = False, None
    for call in calls:
        if call == "copy":
            layer = copy.deepcopy(layer)
        elif call == "pickle":
            layer = pickle.loads(pickle.dumps(layer))
        elif call == "train":  # someone changes B meanwhile: unmerge must not depend on it
            with torch.no_grad():
                layer.lora_B += 0.125
        else:
            if call == "merge" and not merged:
                delta = layer.delta_weight().detach()
                held = weight + (delta if kind == "Linear" else delta.T)
            merged = call == "merge"
            assert getattr(layer, call)() is None
        assert layer.merged is merged
        assert list(layer.state_dict()) == keys(layer)
        if merged:
            assert_same_bits(layer.linear.weight, held.to(dtype), "merged weight")
        else:
            assert_same_bits(layer.linear.weight, weight, "weight after unmerge")
    layer.unmerge()
    assert_same_bits(layer.linear.weight, weight, "weight at the end")
    assert_same_bits(layer.linear(x), base)
    assert not layer.linear.weight.requires_grad and layer.linear.weight.is_leaf


def keys(layer):
    return ["lora_A", "lora_B", "linear.weight"] + ["linear.bias"] * (layer.linear.bias is not None)


@each_dtype
@few(15)
@given(s=setting(dropout=(0.0,), leading=((3, 5), (4, 2))), merged=st.booleans())
def test_each_position_on_its_own(device, dtype, s, merged):
    x = new_input(s, dtype, device)
    layer = new_layer(s, dtype, device)
    if merged:
        layer.merge()
    together, scale = layer(x), terms(layer, x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            assert_close(layer(x[i, j]), together[i, j], scale[i, j], dtype, "a batch against its rows")


@each_kind
@each_dtype
@few(8)
@given(s=setting())
def test_gradients_only_in_A_and_B(device, kind, dtype, s):
    base = new_base(s, dtype, device, kind)
    assert base.weight.requires_grad
    layer = new_layer(s, dtype, device, kind, base=base)
    assert layer.linear is base
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(new_input(s, dtype, device)).sum().backward()
    assert all(p.grad is None for p in base.parameters())
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0


@each_dtype
def test_dtype_and_device_of_the_adapter(device, dtype):
    layer = new_layer(Setting(), dtype, device)
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    for factor in factors(layer):
        assert factor.dtype == expected and factor.device == layer.linear.weight.device
    assert layer.lora_A.shape == (3, 7) and layer.lora_B.shape == (5, 3)


def test_dropout_is_on_the_input_of_A_alone_and_keeps_the_mean(device):
    """Without peft: the base sees all of x, and A sees x with entries dropped, the rest × 1/(1 − p)."""
    s = Setting(in_features=6, out_features=4, r=2, lora_alpha=3, lora_dropout=0.25, leading=(4000,))
    layer = new_layer(s, torch.float64, device)
    x = new_input(Setting(in_features=6, leading=(1,)), torch.float64, device).expand(4000, 6)
    delta = layer.delta_weight().detach()
    seen = layer(x).detach() - layer.linear(x)  # 4000 draws for one input
    # Each of the 2⁶ choices of dropped entries has its own update; no other value may come out.
    keep = torch.tensor([[i >> k & 1 for k in range(6)] for i in range(64)], device=device).double() / 0.75
    choices = (x[0] * keep) @ delta.T
    assert torch.cdist(seen, choices).min(dim=1).values.max() < 1e-6
    kept = (keep[torch.cdist(seen, choices).argmin(dim=1)] > 0).double().mean(dim=0)
    assert (kept - 0.75).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(layer.eval()(x), layer(x))


# ------------------------------------------------------------------------------------ where it starts


@pytest.mark.parametrize("in_features, out_features, r", [(64, 40, 1), (300, 20, 16), (50, 400, 24)])
def test_init_is_uniform_within_one_over_root_in(device, in_features, out_features, r):
    bound = 1 / math.sqrt(in_features)
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        A = torch.full((r, in_features), 9.0, device=device, requires_grad=True)
        B = torch.full((out_features, r), 9.0, device=device, requires_grad=True)
        assert init_lora_(A, B) is None
        assert torch.equal(B, torch.zeros_like(B))
        assert A.is_leaf and A.requires_grad and B.requires_grad
        draws.append(A.detach().flatten())
    assert not torch.equal(draws[0], draws[1])
    values = torch.cat(draws).double().sort().values / bound
    assert values.abs().max() <= 1 + 1e-6
    # Kolmogorov–Smirnov: a uniform sample stays within 2/√n of the straight line (p = 0.0007).
    n = len(values)
    line = torch.arange(1, n + 1, device=device).double() / n
    assert ((values + 1) / 2 - line).abs().max() < 2 / math.sqrt(n)


def test_layers_start_as_init_lora_says(device):
    s = Setting(in_features=40, out_features=30, r=4)
    base = new_base(s, torch.float32, device)
    torch.manual_seed(11)
    layer = LoRALinear(base, **s.lora)
    torch.manual_seed(11)
    A, B = torch.empty(4, 40, device=device), torch.ones(30, 4, device=device)
    init_lora_(A, B)
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
    torch.manual_seed(11)
    alone = LoRALayer(40, 30, **s.lora)
    assert alone.lora_B.abs().max() == 0 and 0.1 < alone.lora_A.abs().max() <= 1 / math.sqrt(40) + 1e-6


def test_init_equals_peft_by_seed():
    """peft makes two nn.Linear first, whose own draws it throws away, then draws A again."""
    s = Setting(in_features=40, out_features=30, r=4)
    base = new_base(s, torch.float32, "cpu")
    model = nn.ModuleDict({"proj": copy.deepcopy(base)})
    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(target_modules=["proj"], **s.lora))
    torch.manual_seed(5)
    nn.Linear(40, 4, bias=False), nn.Linear(4, 30, bias=False)  # as peft does
    layer = LoRALinear(base, **s.lora)
    for ours, theirs in zip(factors(layer), factors(model.base_model.model["proj"]), strict=True):
        assert_same_bits(ours, theirs)


# ---------------------------------------------------------------------------------- LoRALayer and parts


@each_dtype
@few(15)
@given(s=setting(), train=st.booleans())
def test_the_update_alone_equals_that_of_the_whole(device, dtype, s, train):
    """LoRALayer(x) = LoRALinear(x) over a weight of zeros, bit for bit; by rounding over any other."""
    layer = new_layer(s, dtype, device).train(train)
    alone = LoRALayer(s.in_features, s.out_features, **s.lora).to(device, layer.lora_A.dtype).train(train)
    fill(s, *factors(alone))
    assert_same_bits(alone.delta_weight(), layer.delta_weight())
    assert alone.scaling == layer.scaling == s.scaling

    x = new_input(s, layer.lora_A.dtype, device)
    over_zeros = new_base(s, x.dtype, device)
    for p in over_zeros.parameters():
        nn.init.zeros_(p)
    over_zeros = new_layer(s, x.dtype, device, base=over_zeros).train(train)
    torch.manual_seed(s.seed + 3)
    update = alone(x)
    torch.manual_seed(s.seed + 3)
    assert_same_bits(update, over_zeros(x))

    x = x.to(dtype)
    update, whole = alone.eval()(x), layer.eval()(x)
    assert update.dtype == dtype
    assert_close(layer.linear(x) + update, whole, terms(layer, x), dtype, "base + LoRALayer")


def test_lora_layer_trains_A_and_B_and_nothing_else(device):
    layer = LoRALayer(7, 5, r=3, lora_alpha=7).to(device)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert list(layer.state_dict()) == ["lora_A", "lora_B"]
    x = torch.randn(2, 4, 7, device=device)
    assert torch.equal(layer(x), torch.zeros(2, 4, 5, device=device))
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().max() == 0 and layer.lora_B.grad.abs().max() > 0  # B moves first


@few(25)
@given(
    s=setting(),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.bfloat16),
        ]
    ),
)
def test_add_update_computes_in_the_adapters_dtype_and_casts_once(device, s, dtypes):
    dtype, adapter_dtype = dtypes
    torch.manual_seed(s.seed)
    x = torch.randn(*s.leading, s.in_features, device=device).to(dtype)
    y = torch.randn(*s.leading, s.out_features, device=device).to(dtype)
    A = torch.randn(s.r, s.in_features, device=device).to(adapter_dtype)
    B = torch.randn(s.out_features, s.r, device=device).to(adapter_dtype)
    y_before, x_before = y.clone(), x.clone()
    out = add_update(y, x, A, B, s.scaling)
    assert out.dtype == dtype
    assert torch.equal(x, x_before) and torch.equal(y, y_before), "add_update changed its input"

    x, y, A, B = x.double(), y.double(), A.double(), B.double()
    exact = y + x @ A.T @ B.T * s.scaling
    scale = y.abs() + x.abs() @ A.abs().T @ B.abs().T * s.scaling
    assert_close(out, exact, scale, dtype, "add_update against float64")
    if adapter_dtype == torch.float32 and dtype != torch.float32:
        # Cast once, at the end: half a unit in the last place, and what float32 costs.
        half_unit = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((out.double() - exact).abs() <= half_unit + LIMIT[torch.float32] * scale + 1e-7).all()


# ----------------------------------------------------------------------------- moving, saving, copying


@pytest.mark.parametrize("to", [torch.float64, torch.float16, torch.bfloat16], **ids)
def test_moved_while_merged(device, to):
    """The kept weight moves with the layer: unmerging afterwards gives the moved weight."""
    layer = new_layer(Setting(), torch.float32, device)
    weight = layer.linear.weight.detach().clone()
    layer.merge()
    layer.to(to)
    assert layer.weight_before_merge.dtype == to
    layer.unmerge()
    assert_same_bits(layer.linear.weight, weight.to(to))
    assert layer(new_input(Setting(), to, device)).dtype == to


def test_moves_between_devices_while_merged(device):
    layer = new_layer(Setting(), torch.float32, torch.device("cpu"))
    weight = layer.linear.weight.detach().clone()
    layer.merge()
    layer.to(device)
    assert layer.weight_before_merge.device.type == device.type
    layer.unmerge()
    assert_same_bits(layer.linear.weight.cpu(), weight)


@each_kind
def test_state_dict(device, kind):
    s = Setting()
    layer = new_layer(s, torch.float32, device, kind)
    x = new_input(s, torch.float32, device)
    state = copy.deepcopy(layer.state_dict())
    assert list(state) == ["lora_A", "lora_B", "linear.weight", "linear.bias"]
    other = LoRALinear(new_base(Setting(seed=9), torch.float32, device, kind), **s.lora)
    other.load_state_dict(state)
    assert_same_bits(other(x), layer(x))
    # Taken while merged it has the same keys, and the merged weight: a plain layer that needs no LoRA.
    layer.merge()
    merged = layer.state_dict()
    assert list(merged) == list(state)
    plain = new_base(Setting(seed=9), torch.float32, device, kind)
    plain.load_state_dict({"weight": merged["linear.weight"], "bias": merged["linear.bias"]})
    assert_same_bits(plain(x), layer(x))


def test_merging_between_forward_and_backward_is_an_error_not_a_wrong_gradient(device):
    layer = new_layer(Setting(), torch.float32, device)
    x = new_input(Setting(), torch.float32, device).requires_grad_()
    y = layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merging_in_inference_mode_leaves_a_layer_that_trains(device):
    layer = new_layer(Setting(), torch.float32, device)
    weight = layer.linear.weight.detach().clone()
    with torch.inference_mode():
        layer.merge()
    layer.unmerge()
    assert_same_bits(layer.linear.weight, weight)
    layer(new_input(Setting(), torch.float32, device)).sum().backward()
    assert layer.lora_A.grad is not None


def test_a_new_layer_is_in_training_mode_even_around_an_eval_layer(device):
    """As in peft: call .eval() after wrapping."""
    assert LoRALinear(new_base(Setting(), torch.float32, device).eval(), r=3).training


def test_repr_says_what_it_is():
    layer = LoRALinear(nn.Linear(7, 5), r=3, lora_alpha=7, lora_dropout=0.1)
    assert layer.extra_repr() == "r=3, lora_alpha=7, scaling=2.33333, merged=False"
    layer.merge()
    assert layer.extra_repr() == "r=3, lora_alpha=7, scaling=2.33333, merged=True"
    text = repr(layer)
    assert "r=3, lora_alpha=7" in text and "in_features=7, out_features=5" in text and "p=0.1" in text


# -------------------------------------------------------------------------------------------- refused

ONE_UP, ZERO_TO_ONE, ABOVE_0 = "≥ 1", "[0, 1)", "> 0"
BAD_ARGUMENTS = [
    ({"r": 0}, ValueError, ["r must", ONE_UP, "got 0"]),
    ({"r": -2}, ValueError, ["r must", ONE_UP, "got -2"]),
    ({"r": 4.0}, TypeError, ["r must", "whole number", ONE_UP, "got 4.0"]),
    ({"r": True}, TypeError, ["r must", "whole number", "got True"]),
    ({"r": "8"}, TypeError, ["r must", "whole number", "got '8'"]),
    ({"r": None}, TypeError, ["r must", "whole number", "got None"]),
    ({"lora_alpha": 0}, ValueError, ["lora_alpha must", ABOVE_0, "got 0"]),
    ({"lora_alpha": -16.0}, ValueError, ["lora_alpha must", ABOVE_0, "got -16.0"]),
    ({"lora_alpha": math.nan}, ValueError, ["lora_alpha must", "finite", "got nan"]),
    ({"lora_alpha": math.inf}, ValueError, ["lora_alpha must", "finite", "got inf"]),
    ({"lora_alpha": "16"}, TypeError, ["lora_alpha must", "number", "got '16'"]),
    ({"lora_alpha": True}, TypeError, ["lora_alpha must", "number", "got True"]),
    ({"lora_dropout": 1.0}, ValueError, ["lora_dropout must", ZERO_TO_ONE, "got 1.0"]),
    ({"lora_dropout": -0.1}, ValueError, ["lora_dropout must", ZERO_TO_ONE, "got -0.1"]),
    ({"lora_dropout": math.nan}, ValueError, ["lora_dropout must", ZERO_TO_ONE, "got nan"]),
    ({"lora_dropout": None}, TypeError, ["lora_dropout must", "number", "got None"]),
    ({"lora_dropout": False}, TypeError, ["lora_dropout must", "number", "got False"]),
]


@pytest.mark.parametrize(
    "arguments, error, fragments", BAD_ARGUMENTS, ids=[str(bad[0]) for bad in BAD_ARGUMENTS]
)
@pytest.mark.parametrize(
    "make",
    [lambda **kw: LoRALinear(nn.Linear(7, 5), **kw), lambda **kw: LoRALayer(7, 5, **kw)],
    ids=["LoRALinear", "LoRALayer"],
)
def test_bad_arguments_are_named(make, arguments, error, fragments):
    with pytest.raises(error) as caught:
        make(**arguments)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 5), (7, -1), (7.0, 5), (True, 5)], ids=str)
def test_bad_sizes_are_named(sizes):
    with pytest.raises((TypeError, ValueError), match=r"(in|out)_features must .*≥ 1, got"):
        LoRALayer(*sizes, r=1)


@pytest.mark.parametrize("r", [6, 7, 40])
@pytest.mark.parametrize(
    "make",
    [lambda r: LoRALinear(nn.Linear(7, 5), r), lambda r: LoRALayer(5, 7, r)],
    ids=["LoRALinear", "LoRALayer"],
)
def test_a_rank_above_the_sizes_warns_and_works(make, r):
    with pytest.warns(UserWarning, match=rf"r = {r} is above min\(in_features, out_features\) = 5") as caught:
        layer = make(r)
    assert [w.filename for w in caught] == [__file__], "the warning should point at the caller"
    assert layer.lora_A.shape[0] == r
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(5)


def test_numbers_of_other_kinds_are_accepted():
    numpy = pytest.importorskip("numpy")
    plain = new_layer(Setting(), torch.float32, "cpu")
    other = new_layer(Setting(), torch.float32, "cpu", r=numpy.int64(3), lora_alpha=numpy.float64(7))
    x = new_input(Setting(), torch.float32, "cpu")
    assert_same_bits(other(x), plain(x))
    with pytest.raises(TypeError, match="r must"):
        LoRALayer(7, 5, r=numpy.bool_(True))


def test_a_wrapped_layer_is_not_wrapped_again():
    layer = LoRALinear(nn.Linear(7, 5), r=3)
    with pytest.raises(TypeError, match="linear is a LoRALinear, which already has an adapter.*plain layer inside"):
        LoRALinear(layer, r=3)
    peft_layer = new_peft_layer(Setting(), torch.float32, "cpu")
    with pytest.raises(TypeError, match="already has an adapter"):
        LoRALinear(peft_layer, r=3)


@pytest.mark.parametrize(
    "other",
    [nn.Embedding(7, 5), nn.Conv1d(7, 5, 1), nn.LayerNorm(7), torch.ones(5, 7), None],
    ids=lambda other: type(other).__name__,
)
def test_other_things_are_not_wrapped(other):
    name = type(other).__name__
    with pytest.raises(TypeError, match=f"linear must be an nn.Linear or a transformers Conv1D, got {name}"):
        LoRALinear(other, r=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64], **ids)
def test_a_quantized_weight_is_refused(dtype):
    linear = nn.Linear(7, 5).requires_grad_(False)
    linear.weight = nn.Parameter(torch.ones(5, 7).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"linear.weight must be .*float32.* got {dtype}.*QLoRALinear"):
        LoRALinear(linear, r=3)


def test_a_layer_of_bitsandbytes_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")  # .to() is what quantizes it
    with pytest.raises(TypeError, match="linear.weight must be .* got torch.uint8: .*QLoRALinear"):
        LoRALinear(linear, r=3)


def test_a_refused_layer_is_left_as_it_was():
    linear = nn.Linear(7, 5)
    with pytest.raises(ValueError):
        LoRALinear(linear, r=0)
    assert linear.weight.requires_grad and linear.bias.requires_grad
