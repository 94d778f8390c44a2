"""What chapter 03 and lora/layer.py rely on in torch (and in numpy's numbers)."""

import copy
import math
import numbers

import pytest
import torch
from fact import fact
from torch import nn
from torch.nn import functional as F

SEEN = {"library": "torch", "seen_in": "2.13.0"}


# ------------------------------------------------------------------------------------ where it starts


@fact("torch-linear-init", **SEEN, chapters="02 03")
@pytest.mark.parametrize("in_features", [25, 400])
def test_a_new_linear_is_uniform_within_one_over_root_in(in_features):
    torch.manual_seed(0)
    weight = nn.Linear(in_features, 300).weight
    bound = 1 / math.sqrt(in_features)
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    torch.manual_seed(0)
    assert torch.equal(weight, nn.init.kaiming_uniform_(torch.empty(300, in_features), a=math.sqrt(5)))


@fact("torch-kaiming-bound", **SEEN, chapters="02 03")
@pytest.mark.parametrize("a, share", [(math.sqrt(5), 1.0), (0, math.sqrt(6))])
def test_kaiming_uniform_bound_is_root_6_over_1_plus_a2_over_root_columns(a, share):
    """fan_in is the number of columns, so the bound of A (r, in) does not depend on r."""
    for rows in (4, 200):
        values = nn.init.kaiming_uniform_(torch.empty(rows, 100), a=a)
        bound = share / math.sqrt(100)
        assert 0.95 * bound < values.abs().max() <= bound * (1 + 1e-6)


@fact("torch-modules-start-in-training-mode", **SEEN, chapters="03 04")
def test_a_module_put_into_an_eval_model_stays_in_training_mode():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    model.append(nn.Dropout(0.5))
    assert model[1].training and not model[0].training and not model.training


# --------------------------------------------------------------------------------------------- dtypes


@fact("torch-bfloat16-loses-small-steps", **SEEN, chapters="01 03 11")
def test_why_adapters_are_kept_in_float32(device):
    """A step below half a unit in the last place is lost in bfloat16, however often it is taken."""
    assert torch.finfo(torch.bfloat16).eps == 2**-7
    weight, narrow = torch.ones(1, device=device), torch.ones(1, device=device, dtype=torch.bfloat16)
    for _ in range(100):
        weight += 0.003
        narrow += 0.003
    assert weight.item() == pytest.approx(1.3, rel=1e-4) and narrow.item() == 1.0


@fact("torch-mixed-dtypes", **SEEN, chapters="03 11")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_plus_float32_is_float32_and_in_place_is_rounded_once(dtype, device):
    torch.manual_seed(0)
    narrow = torch.randn(40, 30, device=device).to(dtype)
    wide = torch.randn(40, 30, device=device)
    assert (narrow + wide).dtype == torch.float32
    once, twice = (narrow.float() + wide).to(dtype), narrow + wide.to(dtype)
    narrow += wide
    assert narrow.dtype == dtype and torch.equal(narrow, once) and not torch.equal(narrow, twice)


@fact("torch-linear-wants-one-dtype", **SEEN, chapters="03 04")
def test_linear_refuses_a_bfloat16_input_with_a_float32_weight(device):
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(torch.ones(2, 3, device=device).bfloat16(), torch.ones(4, 3, device=device))


@fact("torch-autocast-linear", **SEEN, chapters="03 12")
def test_under_autocast_linear_computes_in_16_bits_whatever_the_weights(device):
    with torch.autocast(device.type, torch.bfloat16):
        assert F.linear(torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- dropout


@fact("torch-dropout", **SEEN, chapters="03")
def test_dropout_scales_what_it_keeps_and_is_nothing_in_eval_mode(device):
    x = torch.full((4000,), 3.0, device=device)
    y = nn.Dropout(0.25)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.04)
    assert torch.equal(nn.Dropout(0.25).eval()(x), x)


@fact("torch-dropout-0-draws-nothing", **SEEN, chapters="03")
@pytest.mark.parametrize("p, training", [(0.0, True), (0.3, False)])
def test_dropout_that_drops_nothing_draws_no_random_numbers(p, training, device):
    """So nn.Dropout(0.0) gives the bits of peft's nn.Identity, and the same random numbers after it."""
    x = torch.randn(5, 7, device=device)
    torch.manual_seed(4)
    expected = torch.rand(3, device=device)
    torch.manual_seed(4)
    assert torch.equal(nn.Dropout(p).train(training)(x), x)
    assert torch.equal(torch.rand(3, device=device), expected)


@fact("torch-dropout-by-seed", **SEEN, chapters="03 04")
def test_the_same_seed_drops_the_same_entries(device):
    x = torch.ones(50, 7, device=device)
    first, second, other = (seeded_dropout(x, seed) for seed in (8, 8, 9))
    assert torch.equal(first, second) and not torch.equal(first, other)


def seeded_dropout(x, seed):
    torch.manual_seed(seed)
    return F.dropout(x, 0.3, training=True)


# ------------------------------------------------------------------------- changing a weight in place


@fact("torch-in-place-after-forward", **SEEN, chapters="03")
def test_changing_a_weight_between_forward_and_backward_raises_unless_through_data(device):
    linear = nn.Linear(7, 5).to(device).requires_grad_(False)
    x = torch.randn(2, 7, device=device, requires_grad=True)
    y = linear(x)
    with torch.no_grad():
        linear.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    y, right = linear(x), linear.weight.sum(0).expand(2, 7).clone()
    linear.weight.data += 1  # autograd doesn't see this, and the gradient is wrong
    y.sum().backward()
    torch.testing.assert_close(x.grad, right + 5)


@fact("torch-in-place-needs-no-grad", **SEEN, chapters="03")
def test_a_weight_that_is_trained_can_be_changed_in_place_only_under_no_grad():
    linear = nn.Linear(7, 5)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        linear.weight += 1
    before = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight += 1
    assert torch.equal(linear.weight, before + 1)


@fact("torch-inference-tensors", **SEEN, chapters="03 15")
def test_a_layer_made_in_inference_mode_cannot_be_merged_into():
    with torch.inference_mode():
        linear = nn.Linear(7, 5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        linear.weight += 1


# -------------------------------------------------------------------------------- buffers and modules


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", None, persistent=False)


@fact("torch-buffer-not-persistent", **SEEN, chapters="03")
def test_a_buffer_that_starts_as_none_and_is_not_saved_still_moves_and_is_copied(device):
    """What merge keeps the old weight in."""
    module = Keeps()
    assert list(module.state_dict()) == ["weight"]
    module.kept = torch.ones(3)
    assert list(module.state_dict()) == ["weight"]
    assert "kept" in dict(module.named_buffers())
    module.to(device, torch.float64)
    assert module.kept.dtype == torch.float64 and module.kept.device.type == device.type
    other = copy.deepcopy(module)
    assert torch.equal(other.kept, module.kept) and other.kept is not module.kept
    module.kept = None
    assert not dict(module.named_buffers()) and other.kept is not None


@fact("torch-requires-grad-of-a-module", **SEEN, chapters="03 04")
def test_requires_grad_on_a_module_freezes_weight_and_bias_and_returns_it():
    linear = nn.Linear(3, 2)
    assert linear.requires_grad_(False) is linear
    assert not linear.weight.requires_grad and not linear.bias.requires_grad


@fact("torch-adamw-defaults", **SEEN, chapters="03 12")
def test_adamw_decays_weights_by_default():
    """0.01, so that a zero B stays zero without a gradient, while A shrinks."""
    B = nn.Parameter(torch.ones(2))
    B.grad = torch.zeros(2)
    torch.optim.AdamW([B], lr=0.1).step()
    torch.testing.assert_close(B.detach(), torch.full((2,), 1 - 0.1 * 0.01))


@fact("numpy-numbers", library="numpy", seen_in="2.4.6", chapters="03")
def test_numpys_integers_are_whole_numbers_and_its_bool_is_not():
    numpy = pytest.importorskip("numpy")
    assert isinstance(numpy.int64(3), numbers.Integral) and isinstance(numpy.float32(3), numbers.Real)
    assert not isinstance(numpy.bool_(True), numbers.Real)
    assert (torch.ones(2) * numpy.float64(1.5)).dtype == torch.float32
