"""What chapter 03 and lora/layer.py rely on in peft's LoRA, and in transformers' Conv1D."""

import copy
import inspect
import math
import warnings
from pathlib import Path

import pytest
import torch
from fact import fact
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

SEEN = {"library": "peft", "seen_in": "0.21.2"}


class Holder(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return self.proj(x)


def wrap(linear, r=4, lora_alpha=7, seed=0, B=True, autocast_adapter_dtype=True, **config):
    """peft's layer around `linear`, as its users get it; A and B drawn with std 0.3 unless B=False."""
    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=["proj"], **config)
    model = get_peft_model(Holder(linear).eval(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model.proj
    if B:
        torch.manual_seed(seed)
        for factor in (layer.lora_A, layer.lora_B):
            nn.init.normal_(factor["default"].weight, std=0.3)
    return layer


def new_linear(dtype=torch.float32, device="cpu", in_features=64, out_features=48):
    torch.manual_seed(1)
    return nn.Linear(in_features, out_features).to(device, dtype)


# ------------------------------------------------------------------------------------------ defaults


@fact("peft-lora-default-scaling-is-1", **SEEN, chapters="03 04 16")
def test_by_default_alpha_is_r_so_a_missing_scaling_shows_nowhere():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
    assert config.use_rslora is False and config.bias == "none" and config.init_lora_weights is True
    config.target_modules = ["proj"]
    layer = get_peft_model(Holder(new_linear()), config).base_model.model.proj
    assert layer.scaling == {"default": 1.0}


@fact("peft-lora-scaling", **SEEN, chapters="03 05")
@pytest.mark.parametrize("r, lora_alpha", [(4, 7), (3, 20), (1, 5)])
def test_scaling_is_alpha_over_r_or_over_root_r(r, lora_alpha):
    assert wrap(new_linear(), r, lora_alpha).scaling["default"] == lora_alpha / r
    assert wrap(new_linear(), r, lora_alpha, use_rslora=True).scaling["default"] == lora_alpha / math.sqrt(r)


@fact("peft-lora-new-layers-are-in-training-mode", **SEEN, chapters="03 04 12")
def test_dropout_is_on_in_a_model_that_was_in_eval_mode(device):
    layer = wrap(new_linear(device=device), lora_dropout=0.5)
    assert layer.training and not layer.base_layer.training
    x = torch.randn(8, 64, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --------------------------------------------------------------------------------- where it starts


@fact("peft-lora-init", **SEEN, chapters="02 03")
def test_A_is_uniform_within_one_over_root_in_and_B_zero():
    layer = wrap(new_linear(in_features=400, out_features=30), r=16, B=False)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (16, 400) and B.shape == (30, 16)
    assert torch.count_nonzero(B) == 0
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@fact("peft-lora-init-draws-A-twice", **SEEN, chapters="03")
def test_the_order_in_which_random_numbers_are_drawn():
    """Two nn.Linear, whose draws are thrown away, then kaiming for A."""
    linear = new_linear()
    torch.manual_seed(3)
    layer = wrap(linear, B=False)
    torch.manual_seed(3)
    A, B = nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False)
    assert not torch.equal(layer.lora_A["default"].weight, A.weight)
    nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
    assert torch.equal(layer.lora_A["default"].weight, A.weight)
    assert not torch.equal(layer.lora_B["default"].weight, B.weight)


# ------------------------------------------------------------------------------------------ dtypes


@fact("peft-lora-16-bit-adapters-become-float32", **SEEN, chapters="03 04 11")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_over_a_16_bit_base_the_adapter_is_float32(dtype, device):
    layer = wrap(new_linear(dtype, device), B=False)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(A, A.to(dtype).float())  # it was drawn in float32, rounded, and widened again
    kept = wrap(new_linear(dtype, device), autocast_adapter_dtype=False, B=False)
    assert kept.lora_A["default"].weight.dtype == dtype
    double = wrap(new_linear(torch.float64, device), B=False)
    assert double.lora_A["default"].weight.dtype == torch.float64


@fact("peft-lora-one-cast-at-the-end", **SEEN, chapters="03 04")
def test_a_16_bit_layer_adds_in_float32_and_casts_once(device):
    layer = wrap(new_linear(torch.bfloat16, device))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(32, 64, device=device).bfloat16()
    update = nn.functional.linear(nn.functional.linear(x.float(), A), B) * (7 / 4)
    y = layer.base_layer(x)
    assert torch.equal(layer(x), (y + update).bfloat16())
    assert not torch.equal(layer(x), y + update.bfloat16())  # two casts: other bits


@fact("peft-lora-16-bit-delta-goes-through-float32-on-a-cpu", **SEEN, chapters="03")
def test_delta_of_16_bit_factors_on_a_cpu():
    layer = wrap(new_linear(torch.bfloat16), autocast_adapter_dtype=False)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = layer.get_delta_weight("default")
    assert torch.equal(delta, ((B.float() @ A.float()) * (7 / 4)).bfloat16())
    assert not torch.equal(delta, (B @ A) * (7 / 4))


# --------------------------------------------------------------------------------- merge and unmerge


@fact("peft-lora-unmerge-subtracts", **SEEN, chapters="03 13")
@pytest.mark.parametrize(
    "dtype, least, most",
    [
        # max|difference| / max|weight|; measured 4.8e-7, 8.9e-16, 5.9e-2, 6.1e-3 on a CPU
        # (of the bfloat16 weights 64 % came back changed)
        (torch.float32, 1e-8, 2e-6),
        (torch.float64, 1e-17, 4e-15),
        (torch.bfloat16, 1e-2, 2e-1),
        (torch.float16, 1e-3, 2e-2),
    ],
)
def test_merge_then_unmerge_does_not_restore_the_weight(dtype, least, most, device):
    layer = wrap(new_linear(dtype, device))
    weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    difference = (layer.base_layer.weight.double() - weight.double()).abs().max() / weight.double().abs().max()
    assert least < difference.item() < most


@fact("peft-lora-merge-adds-in-float32-and-rounds-once", **SEEN, chapters="03")
@pytest.mark.parametrize("safe", [False, True])
def test_merging_a_16_bit_weight(safe, device):
    """safe_merge rounds ΔW first, then the sum: other bits than a plain merge."""
    layer = wrap(new_linear(torch.bfloat16, device))
    weight, delta = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("default")
    layer.merge(safe_merge=safe)
    once, twice = (weight.float() + delta).bfloat16(), weight + delta.bfloat16()
    assert not torch.equal(once, twice)
    assert torch.equal(layer.base_layer.weight, twice if safe else once)


@fact("peft-lora-merging-twice-warns", **SEEN, chapters="03")
def test_merging_twice_warns_and_does_nothing(device):
    layer = wrap(new_linear(device=device))
    layer.merge()
    assert layer.merged and layer.merged_adapters == ["default"]
    weight = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="[Aa]lready merged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@fact("peft-lora-disabling-a-merged-adapter-unmerges-it", **SEEN, chapters="03 13")
def test_disable_adapter_on_a_merged_model_unmerges_for_good(device):
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["proj"])
    model = get_peft_model(Holder(new_linear(device=device)), config)
    layer = model.base_model.model.proj
    nn.init.normal_(layer.lora_B["default"].weight)
    model.merge_adapter()
    with model.disable_adapter():
        model(torch.randn(2, 64, device=device))
    assert not layer.merged


@fact("peft-lora-merging-behind-autograds-back", **SEEN, chapters="03")
def test_merging_between_forward_and_backward_gives_a_wrong_gradient_silently(device):
    """peft changes `weight.data`, which autograd doesn't see; ours raises."""
    layer = wrap(new_linear(device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    right, x.grad = x.grad, None
    y = layer(x)
    layer.merge()
    y.sum().backward()
    assert not torch.allclose(x.grad, right, rtol=0.1)


@fact("peft-lora-merged-state-dict", **SEEN, chapters="03 04")
def test_names_in_the_state_dict_merged_or_not(device):
    layer = wrap(new_linear(device=device))
    names = ["base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert list(before) == names
    layer.merge()
    assert list(layer.state_dict()) == names
    assert not torch.equal(layer.state_dict()["base_layer.weight"], before["base_layer.weight"])


# --------------------------------------------------------------------------- what it lets through


@fact("peft-lora-r-0-is-an-error", **SEEN, chapters="03")
@pytest.mark.parametrize("r", [0, -1])
def test_r_0_is_an_error(r):
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        wrap(new_linear(), r=r)


@fact("peft-lora-large-r-is-silent", **SEEN, chapters="02 03")
def test_r_above_the_sizes_is_accepted_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = wrap(new_linear(in_features=6, out_features=5), r=40)
    assert layer.lora_A["default"].weight.shape == (40, 6)


@fact("peft-lora-any-alpha-is-silent", **SEEN, chapters="03")
@pytest.mark.parametrize("lora_alpha", [0, -4])
def test_an_alpha_of_0_or_below_is_accepted_silently(lora_alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrap(new_linear(), r=4, lora_alpha=lora_alpha).scaling["default"] == lora_alpha / 4


@fact("peft-get-peft-model-changes-the-base", **SEEN, chapters="00 03 04 12")
def test_get_peft_model_changes_the_model_that_it_was_given():
    linear = new_linear()
    model = Holder(linear)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=7, target_modules=["proj"]))
    assert isinstance(model.proj, lora_layer.Linear) and model.proj.base_layer is linear
    assert wrapped.base_model.model is model
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    with pytest.warns(UserWarning, match="second time"):
        get_peft_model(model, LoraConfig(r=4, lora_alpha=7, target_modules=["proj"]))


@fact("peft-lora-no-dropout-is-identity", **SEEN, chapters="03")
def test_without_dropout_there_is_no_dropout_layer():
    assert isinstance(wrap(new_linear()).lora_dropout["default"], nn.Identity)
    assert isinstance(wrap(new_linear(), lora_dropout=0.1).lora_dropout["default"], nn.Dropout)


# ------------------------------------------------------------- where it stands, as chapter 03 cites it


@fact("peft-lora-layer-file", **SEEN, chapters="03")
def test_the_file_and_the_lines_that_chapter_03_cites():
    """peft/tuners/lora/layer.py. The first line of each."""
    source = Path(inspect.getsourcefile(lora_layer))
    assert source.parts[-4:] == ("peft", "tuners", "lora", "layer.py")
    cited = {
        lora_layer.LoraLayer: 108,
        lora_layer.LoraLayer.update_layer: 219,
        lora_layer.LoraLayer.reset_lora_parameters: 332,
        lora_layer.LoraLayer.set_scale: 783,
        lora_layer.Linear: 910,
        lora_layer.Linear.merge: 952,
        lora_layer.Linear.unmerge: 1021,
        lora_layer.Linear.get_delta_weight: 1044,
        lora_layer.Linear.forward: 1074,
    }
    assert {o.__qualname__: inspect.getsourcelines(o)[1] for o in cited} == {
        o.__qualname__: line for o, line in cited.items()
    }
    assert len(source.read_text(encoding="utf-8").splitlines()) == 2766


@fact("peft-lora-forward-line", **SEEN, chapters="03")
@pytest.mark.parametrize(
    "where, line",
    [
        (lora_layer.Linear.forward, "result = result + lora_B(lora_A(dropout(x))) * scaling"),
        (lora_layer.Linear.forward, "result = result.to(torch_result_dtype)"),
        (lora_layer.Linear.merge, "base_layer.weight.data += delta_weight"),
        (lora_layer.Linear.unmerge, "weight.data -= delta_weight.to(orig_dtype)"),
        (
            lora_layer.Linear.get_delta_weight,
            "transpose(weight_B @ weight_A, self.fan_in_fan_out) * self.scaling[adapter]",
        ),
        (
            lora_layer.LoraLayer.reset_lora_parameters,
            "nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))",
        ),
        (lora_layer.LoraLayer.update_layer, "self.scaling[adapter_name] = lora_alpha / math.sqrt(r)"),
        (lora_layer.LoraLayer.update_layer, "self.scaling[adapter_name] = lora_alpha / r"),
    ],
)
def test_the_lines_that_chapter_03_quotes(where, line):
    assert line in inspect.getsource(where)


# ------------------------------------------------------------------------------ transformers' Conv1D


@fact("transformers-conv1d", library="transformers", seen_in="5.23.0", chapters="03 04")
def test_conv1d_is_a_linear_layer_with_the_weight_the_other_way_round(device):
    layer = Conv1D(5, 7).to(device)  # out first
    assert layer.weight.shape == (7, 5) and layer.nf == 5 and layer.bias.shape == (5,)
    assert not isinstance(layer, nn.Linear)
    x = torch.randn(2, 3, 7, device=device)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


@fact("peft-lora-conv1d", **SEEN, chapters="03 04")
def test_peft_wraps_conv1d_and_gives_delta_in_its_form(device):
    layer = wrap(Conv1D(5, 7).to(device), fan_in_fan_out=True)
    assert type(layer) is lora_layer.Linear
    assert layer.lora_A["default"].weight.shape == (4, 7) and layer.lora_B["default"].weight.shape == (5, 4)
    assert layer.get_delta_weight("default").shape == (7, 5)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        wrap(copy.deepcopy(layer.base_layer))  # it sets it to True itself, and says so
