"""Adapters on disk: what peft wrote loads here, what we wrote loads in peft, and nothing is ever half.

Logits after a round trip, either way, have the same bits on a CPU: no exception met, in float32, float64,
bfloat16 and float16, on tiny Llama, GPT-2 and BERT and on SmolLM2.
"""

import copy
import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_teach import checkpoint
from peft_teach.checkpoint import CONFIG, NEXT, PICKLE, PREFIX, WEIGHTS, AdapterError, load_adapter, save_adapter
from peft_teach.lora.inject import apply_lora_to_model, merge_lora, unmerge_lora, wrapped_layers
from peft_teach.lora.layer import LoRALinear
from peft_teach.models import load

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set",
    "ignore:.*is_gradient_checkpointing",
    "ignore:.*did not match any targeted module",
)

LLAMA, GPT2, BERT = MODELS = ("tiny-llama", "tiny-gpt2", "tiny-bert")
# Some that share a last name, some whole paths, all kinds of sizes.
TARGETS = {
    LLAMA: ["q_proj", "k_proj", "v_proj", "down_proj", "mlp.up_proj", "model.layers.1.self_attn.o_proj"],
    GPT2: ["c_attn", "attn.c_proj", "mlp.c_proj", "h.1.mlp.c_fc"],
    BERT: ["query", "value", "output.dense", "intermediate.dense", "pooler.dense"],
}
LORA = {"r": 3, "lora_alpha": 7}


@cache
def original(name):
    return load(name)[0]


def bare(name, device="cpu", dtype=torch.float32):
    """A fresh copy of the model, without any adapter."""
    return copy.deepcopy(original(name)).to(device, dtype)


def fill(model, seed=0):
    """Draw A and B with std 0.3: B = 0 would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def ours(name, targets=("q_proj", "v_proj"), device="cpu", seed=0, dtype=torch.float32, **lora):
    return fill(apply_lora_to_model(bare(name, device, dtype), targets, **{**LORA, **lora}), seed)


def theirs(name, targets, device="cpu", seed=0, dtype=torch.float32, **config):
    config = LoraConfig(target_modules=targets, **{**LORA, **config})
    return fill(get_peft_model(bare(name, device, dtype), config), seed).eval()


@torch.no_grad()
def out(model):
    device = next(model.parameters()).device
    ids = torch.randint(3, 256, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model(input_ids=ids, attention_mask=mask)[0]


def read(folder):
    return json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs), f"largest difference {(ours - theirs).abs().max()}"


@contextmanager
def no_warning_of_missing_keys():
    """peft only warns of keys that it misses: here that is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys|Unexpected keyword")
        yield


def into_peft(folder, name, device="cpu", dtype=torch.float32):
    with no_warning_of_missing_keys():
        return PeftModel.from_pretrained(bare(name, device, dtype), folder)


# ------------------------------------------------------------------------------- round trips, both ways


@st.composite
def a_config(draw):
    name = draw(st.sampled_from(MODELS))
    targets = draw(st.lists(st.sampled_from(TARGETS[name]), min_size=1, max_size=3, unique=True))
    r = draw(st.sampled_from([1, 2, 3, 5, 8]))
    config = {
        "r": r,
        "lora_alpha": draw(st.sampled_from([a for a in (1, 3, 7, 20, 2.5) if a != r])),
        "use_rslora": draw(st.booleans()),
        "lora_dropout": draw(st.sampled_from([0.0, 0.25])),
    }
    return name, targets, config


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(case=a_config(), patterns=st.booleans(), seed=st.integers(0, 99))
def test_peft_to_us_to_peft_to_us(device, case, patterns, seed):
    name, targets, config = case
    if patterns:
        last = targets[0].rpartition(".")[2]
        config["rank_pattern"] = {last[1:]: 9, last: 4, f"nothing_{last}": 9}  # "_proj" isn't the end of "q_proj"
        config["alpha_pattern"] = {rf"[01]\..*{last}": 11, last: 13}
    source = theirs(name, targets, device, seed, **config)
    expected = out(source)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source.save_pretrained(folder / "peft")
        here = load_adapter(bare(name, device), folder / "peft")
        assert_same_bits(out(here), expected)
        assert {layer.dropout.p for layer in wrapped_layers(here).values()} == {config["lora_dropout"]}

        save_adapter(here, folder / "ours")
        back = into_peft(folder / "ours", name, device)
        assert_same_bits(out(back), expected)
        before, after = read(folder / "peft"), read(folder / "ours")
        assert before[1].keys() == after[1].keys()
        for key in before[1]:
            assert_same_bits(after[1][key], before[1][key])
        again = load_adapter(bare(name, device), folder / "ours")
        assert_same_bits(out(again), expected)
        save_adapter(again, folder / "twice")  # what is written twice is written alike
        assert (folder / "twice" / CONFIG).read_bytes() == (folder / "ours" / CONFIG).read_bytes()
        assert (folder / "twice" / WEIGHTS).read_bytes() == (folder / "ours" / WEIGHTS).read_bytes()


KINDS_OF_TARGETS = [
    (LLAMA, r".*layers\.1\..*(q|o)_proj", {}),
    (LLAMA, r"model.layers.0.self_attn.(k|v)_proj", {"exclude_modules": ["v_proj"]}),
    (LLAMA, ["q_proj", "up_proj"], {"exclude_modules": r".*layers\.0\..*"}),
    (LLAMA, ["q_proj", "not_there"], {}),  # peft is content if one is found
    (LLAMA, "all-linear", {}),
    (GPT2, "all-linear", {"fan_in_fan_out": True}),
    (GPT2, ["c_attn"], {"fan_in_fan_out": False}),
    (GPT2, ["c_proj"], {"rank_pattern": {"attn.c_proj": 5}}),
    (BERT, "all-linear", {"exclude_modules": ["pooler.dense"]}),
    (BERT, ["dense"], {"rank_pattern": {r"layer\.0\.output\.dense": 2}, "alpha_pattern": {"^pooler.dense": 9}}),
    (LLAMA, ["v_proj"], {"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "revision": "main"}),
    (LLAMA, ["v_proj"], {"r": 4, "init_lora_weights": "orthogonal"}),
]


@pytest.mark.parametrize("name, targets, config", KINDS_OF_TARGETS, ids=lambda value: str(value)[:50])
def test_each_way_to_name_the_layers(name, targets, config, tmp_path):
    source = theirs(name, targets, **config)
    source.save_pretrained(tmp_path / "peft")
    here = load_adapter(bare(name), tmp_path / "peft")
    assert_same_bits(out(here), out(source))
    save_adapter(here, tmp_path / "ours")
    assert_same_bits(out(into_peft(tmp_path / "ours", name)), out(source))


def test_all_linear_written_by_hand(tmp_path):
    save_adapter(ours(LLAMA, "all-linear"), tmp_path)
    edit(tmp_path, target_modules="all-linear")
    assert_same_bits(out(load_adapter(bare(LLAMA), tmp_path)), out(into_peft(tmp_path, LLAMA)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MODELS)
def test_other_dtypes(name, dtype, device, tmp_path):
    """Over a 16-bit base the adapter is float32, in the model and in the file."""
    source = theirs(name, TARGETS[name], device, dtype=dtype)
    source.save_pretrained(tmp_path / "peft")
    here = load_adapter(bare(name, device, dtype), tmp_path / "peft")
    assert_same_bits(out(here), out(source))
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in here.parameters() if p.requires_grad} == {adapter}
    assert {p.device.type for p in here.parameters()} == {device.type}
    save_adapter(here, tmp_path / "ours")
    assert {t.dtype for t in read(tmp_path / "ours")[1].values()} == {adapter}
    assert_same_bits(out(into_peft(tmp_path / "ours", name, device, dtype)), out(source))


def test_a_file_with_16_bit_tensors(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], **LORA)
    source = get_peft_model(bare(LLAMA, dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    fill(source).save_pretrained(tmp_path)
    assert {t.dtype for t in read(tmp_path)[1].values()} == {torch.bfloat16}
    here = load_adapter(bare(LLAMA), tmp_path)
    assert {p.dtype for p in here.parameters() if p.requires_grad} == {torch.float32}
    assert_same_bits(out(here), out(into_peft(tmp_path, LLAMA)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_smollm2_both_ways(dtype, device, tmp_path):
    model = load("smollm2-135m", dtype, device)[0]
    model = fill(apply_lora_to_model(model, "all-linear", r=5, lora_alpha=12, lora_dropout=0.1))
    expected = out(model)
    save_adapter(model, tmp_path / "ours")
    with no_warning_of_missing_keys():
        peft_model = PeftModel.from_pretrained(load("smollm2-135m", dtype, device)[0], tmp_path / "ours")
    assert_same_bits(out(peft_model), expected)
    peft_model.save_pretrained(tmp_path / "peft")
    assert_same_bits(out(load_adapter(peft_model.unload(), tmp_path / "peft")), expected)


def test_the_smallest_file_that_peft_reads(tmp_path):
    """Written with nothing of ours: five fields, and keys without the adapter's name."""
    fields = ("peft_type", "LORA"), ("r", 3), ("lora_alpha", 7), ("target_modules", ["v_proj"])
    (tmp_path / CONFIG).write_text(json.dumps(dict([*fields, ("task_type", "CAUSAL_LM")])))
    tensors = {}
    for i in range(2):
        path = f"base_model.model.model.layers.{i}.self_attn.v_proj"
        tensors[f"{path}.lora_A.weight"] = torch.randn(3, 64)
        tensors[f"{path}.lora_B.weight"] = torch.randn(96, 3)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    here = load_adapter(bare(LLAMA), tmp_path)
    assert_same_bits(out(here), out(into_peft(tmp_path, LLAMA)))
    assert not torch.equal(out(here), out(bare(LLAMA)))
    layer = here.model.layers[1].self_attn.v_proj
    assert_same_bits(layer.lora_B.data, tensors[f"{path}.lora_B.weight"])
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.dropout.p) == (3, 7, 7 / 3, 0.0)


def test_what_was_loaded_is_trained_further_and_nothing_else(device, tmp_path):
    save_adapter(ours(LLAMA, device=device), tmp_path)
    model = bare(LLAMA, device)
    assert load_adapter(model, tmp_path) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert not any(module.training for module in model.modules())  # as the model was
    load_adapter(other := bare(LLAMA, device).train(), tmp_path)
    assert all(module.training for module in other.modules())
    model(input_ids=torch.arange(6, device=device)[None])[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------ what is written


def test_the_config_keeps_what_it_does_not_need(tmp_path):
    kept = {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/model", "revision": "v2",
        "inference_mode": False, "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
        "peft_version": "0.99.0", "init_lora_weights": "gaussian", "megatron_core": "megatron.core",
        "some_new_field": None,
    }  # fmt: skip
    save_adapter(ours(LLAMA), tmp_path)
    edit(tmp_path, **kept)
    model = load_adapter(bare(LLAMA), tmp_path, adapter_name="json")
    assert list(model.adapter_configs) == ["json"]
    save_adapter(model, tmp_path / "again")
    config, _ = read(tmp_path / "again")
    assert {field: config[field] for field in kept} == kept
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 7, "none")


def test_what_a_new_config_says(tmp_path):
    model = ours(GPT2, ["c_attn"], lora_dropout=0.25)
    save_adapter(model, tmp_path)
    assert read(tmp_path)[0] == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "init_lora_weights": True, "r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "use_rslora": False,
        "target_modules": ["c_attn"], "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {},
        "bias": "none", "fan_in_fan_out": True,
    }  # fmt: skip
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {
            f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{x}.weight" for i in (0, 1) for x in "AB"
        }
    save_adapter(ours(BERT, ["query"]), tmp_path)
    assert read(tmp_path)[0]["task_type"] is None and read(tmp_path)[0]["fan_in_fan_out"] is False


class Nested(nn.Module):
    """Names of which one is the end of another."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 5), "lin.ear".replace(".", "X"): nn.Linear(5, 3)})

    def forward(self, input_ids, attention_mask):
        return [self.inner["linXear"](self.inner["proj"](self.proj(torch.ones(1, 6))))]


@pytest.mark.parametrize(
    "wrap, written",
    [
        (["inner.proj", "proj"], ["proj"]),
        (["inner.proj"], ["inner.proj"]),
        ("proj", "proj"),  # a list would mean inner.proj, too
        (["linXear"], ["linXear"]),
    ],
    ids=str,
)
def test_target_modules_means_the_wrapped_layers_and_no_others(wrap, written, tmp_path):
    model = fill(apply_lora_to_model(Nested(), wrap, **LORA))
    plain = Nested()
    plain.load_state_dict({k.replace("linear.", ""): v for k, v in model.state_dict().items() if "lora" not in k})
    save_adapter(model, tmp_path)
    assert read(tmp_path)[0]["target_modules"] == written
    with no_warning_of_missing_keys():
        peft_model = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_same_bits(out(peft_model), out(model))
    assert wrapped_layers(load_adapter(plain, tmp_path)).keys() == wrapped_layers(model).keys()
    assert_same_bits(out(plain), out(model))


class Learners(nn.Module):
    """What a learner may write: no lora_alpha, no r, no dropout."""

    def __init__(self, linear, r, lora_alpha, lora_dropout, use_rslora):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, linear.weight.shape[1]))
        self.lora_B = nn.Parameter(torch.randn(linear.weight.shape[0], r))
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def forward(self, x):
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r, lora_alpha", [(3, 7), (6, 20), (7, 0.3)])
def test_alpha_is_scaling_times_r_where_a_layer_has_none(r, lora_alpha, use_rslora, tmp_path):
    model = apply_lora_to_model(bare(LLAMA), r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, layer=Learners)
    save_adapter(model, tmp_path)
    config, _ = read(tmp_path)
    assert config["use_rslora"] is False and config["lora_dropout"] == 0
    assert config["lora_alpha"] == pytest.approx(lora_alpha * (math.sqrt(r) if use_rslora else 1), rel=1e-15)
    if not use_rslora and lora_alpha == int(lora_alpha):
        assert config["lora_alpha"] == lora_alpha and type(config["lora_alpha"]) is int
    torch.testing.assert_close(out(into_peft(tmp_path, LLAMA)), out(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out(load_adapter(bare(LLAMA), tmp_path)), out(model), rtol=1e-5, atol=1e-5)


def test_layers_that_differ_in_rank_alpha_and_kind_of_scaling(tmp_path):
    model = ours(LLAMA, ["q_proj", "k_proj", "v_proj"])
    for i, (name, layer) in enumerate(list(wrapped_layers(model).items())[:4]):
        model.set_submodule(name, LoRALinear(layer.linear, r=2 + i, lora_alpha=3 * i + 4, use_rslora=i == 2))
    fill(model, seed=3)
    model.model.layers[1].self_attn.v_proj.scaling = 0.7  # changed by hand: what the layer computes with counts
    model.eval()
    save_adapter(model, tmp_path)
    config, _ = read(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 7, False)
    assert set(config["rank_pattern"].values()) == {2, 4, 5}
    torch.testing.assert_close(out(into_peft(tmp_path, LLAMA)), out(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out(load_adapter(bare(LLAMA), tmp_path)), out(model), rtol=1e-5, atol=1e-5)


def test_merged_or_not_is_the_same_file(device, tmp_path):
    model = ours(LLAMA, device=device)
    save_adapter(model, tmp_path / "a")
    save_adapter(merge_lora(model), tmp_path / "b")
    assert all(layer.merged for layer in wrapped_layers(model).values())
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert_same_bits(out(load_adapter(bare(LLAMA, device), tmp_path / "b")), out(unmerge_lora(model)))


def test_adapters_that_share_a_tensor_or_are_views(tmp_path):
    model = ours(LLAMA, ["q_proj"])
    first, second = wrapped_layers(model).values()
    second.lora_A = first.lora_A
    second.lora_B = nn.Parameter(torch.randn(3, 192).T)
    save_adapter(model, tmp_path)
    assert_same_bits(out(load_adapter(bare(LLAMA), tmp_path)), out(model))


def test_nan_is_saved_and_loaded(tmp_path):
    model = ours(LLAMA)
    with torch.no_grad():
        next(iter(wrapped_layers(model).values())).lora_A[0, 0] = math.nan
    save_adapter(model, tmp_path)
    loaded = next(iter(wrapped_layers(load_adapter(bare(LLAMA), tmp_path)).values()))
    assert loaded.lora_A.isnan().sum() == 1


def test_a_compiled_or_a_parallel_model_is_saved_under_the_names_of_the_plain_one(tmp_path):
    model = ours(LLAMA)
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(model), tmp_path / "compiled")
    save_adapter(nn.DataParallel(model), tmp_path / "parallel")
    for kind in ("compiled", "parallel"):
        assert (tmp_path / kind / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_other_files_survive_and_modes_are_those_of_other_files(tmp_path):
    folder = tmp_path / "new" / "folder"
    save_adapter(ours(LLAMA), folder)
    (folder / "README.md").write_text("mine")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "tokenizer.json").write_text("{}")
    save_adapter(ours(LLAMA, ["q_proj"], r=2), str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "checkpoint-1"]
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "checkpoint-1" / "tokenizer.json").read_text() == "{}"
    assert len({(folder / name).stat().st_mode for name in (WEIGHTS, CONFIG, "README.md")}) == 1
    assert len(wrapped_layers(load_adapter(bare(LLAMA), folder))) == 2


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(AdapterError, match="no adapter of peft_teach.*\n.*apply_lora_to_model.*save_pretrained"):
        save_adapter(bare(LLAMA), tmp_path / "a")
    with pytest.raises(AdapterError, match="no adapter of peft_teach"):
        save_adapter(theirs(LLAMA, ["q_proj"]), tmp_path / "a")

    class Scaled(LoRALinear):
        def __init__(self, linear, **lora):
            super().__init__(linear, **lora)
            self.magnitude = nn.Parameter(torch.ones(3))

    model = apply_lora_to_model(bare(LLAMA), layer=Scaled)
    with pytest.raises(AdapterError, match="model.layers.0.self_attn.q_proj: a Scaled made of .*magnitude"):
        save_adapter(model, tmp_path / "a")
    model = apply_lora_to_model(bare(LLAMA), layer=lambda linear, **_: nn.Sequential(linear))
    with pytest.raises(AdapterError, match="v_proj: a Sequential without lora_A"):
        save_adapter(model, tmp_path / "a")
    model = ours(LLAMA)
    model.model.layers[0].self_attn.q_proj.scaling = 0.0
    with pytest.raises(AdapterError, match="q_proj: a LoRALinear with scaling 0.0: no lora_alpha > 0"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_trained_and_not_saved_is_said(tmp_path):
    model = ours(BERT, ["query"])
    model.pooler.dense.weight.requires_grad_()
    with pytest.warns(UserWarning, match="not saved, though trained.*: pooler.dense.weight$") as caught:
        save_adapter(model, tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(ours(BERT, ["query"]), tmp_path)


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    save_adapter(ours(LLAMA), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(ours(LLAMA, r=2), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------- what is refused


def edit(folder, remove=(), **changes):
    config = {**read(folder)[0], **changes}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_tensors(folder, change):
    """change(tensors) edits the dictionary in place."""
    tensors = read(folder)[1]
    change(tensors)
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)


def rename_keys(folder, change):
    edit_tensors(folder, lambda t: [t.update({change(k): t.pop(k)}) for k in list(t)])


def cut(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])


def as_pickle(folder):
    torch.save(read(folder)[1], folder / PICKLE)
    (folder / WEIGHTS).unlink()


V1 = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
A0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
# (what was done to a good folder, what the message says)
BROKEN = {
    # files
    "no folder": (lambda f: shutil.rmtree(f), ["no whole adapter", "which is no folder", CONFIG, WEIGHTS]),
    "empty folder": (lambda f: [(f / CONFIG).unlink(), (f / WEIGHTS).unlink()], [f"{CONFIG} is missing"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG} is missing"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [f"{WEIGHTS} is missing"]),
    "a pickle": (as_pickle, [PICKLE, "is a pickle, which can run any program", "save_pretrained"]),
    "one folder too high": (
        lambda f: [(f / "default").mkdir(), *((f / n).rename(f / "default" / n) for n in (CONFIG, WEIGHTS))],
        ["The folders in it have one: default"],
    ),
    "truncated weights": (lambda f: cut(f, WEIGHTS, 0.8), [WEIGHTS, "is cut off", "Get the file again"]),
    "weights cut in the header": (lambda f: cut(f, WEIGHTS, 0.01), [WEIGHTS, "is cut off"]),
    "empty weights": (lambda f: cut(f, WEIGHTS, 0), [WEIGHTS, "is cut off"]),
    "weights of another kind": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({})), ["no safetensors"]),
    "a git-lfs pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"),
        ["git-lfs", "Get the file again"],
    ),
    "broken JSON": (lambda f: cut(f, CONFIG, 0.7), [CONFIG, "is no JSON"]),
    "empty JSON": (lambda f: cut(f, CONFIG, 0), ["is no JSON"]),
    "JSON in no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\xd8"), ["is no JSON"]),
    "deep JSON": (lambda f: (f / CONFIG).write_text("[" * 100_000), ["is no JSON"]),
    "JSON that is a list": (lambda f: (f / CONFIG).write_text("[1]"), ["holds a list, no fields"]),
    # another method, and more than plain LoRA
    "no method": (lambda f: edit(f, remove=["peft_type"]), ["peft_type is None"]),
    "another method": (lambda f: edit(f, peft_type="IA3"), ["peft_type is 'IA3'", "only 'LORA'"]),
    "biases": (lambda f: edit(f, bias="lora_only"), ["bias = 'lora_only'"]),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), ["init_lora_weights = 'pissa'", "base model"]),
    "an unknown field": (lambda f: edit(f, wobble=3), ["wobble = 3 is not known here", "taken out of the file"]),
    "an unknown switch": (lambda f: edit(f, use_wobble=True), ["use_wobble = True is not known here"]),
    "two at once": (lambda f: edit(f, use_dora=True, bias="all"), ["use_dora = True", "bias = 'all'"]),
    # fields
    "no targets": (lambda f: edit(f, remove=["target_modules"]), ["target_modules must be", "got None"]),
    "targets of a wrong kind": (lambda f: edit(f, target_modules=[3]), ["target_modules must be", "got [3]"]),
    "excluded of a wrong kind": (lambda f: edit(f, exclude_modules={"a": 1}), ["exclude_modules must be"]),
    "targets that aren't here": (lambda f: edit(f, target_modules=["query"]), ["chooses 0 layers here", V1]),
    "no targets at all": (lambda f: [edit(f, target_modules=[]), edit_tensors(f, dict.clear)], ["chooses 0"]),
    "a broken regex": (lambda f: edit(f, target_modules="(q_proj"), ["wrong regular expression"]),
    "a broken pattern": (lambda f: edit(f, rank_pattern={"(q": 3}), ["wrong regular expression"]),
    "a pattern that is a list": (lambda f: edit(f, alpha_pattern=[7]), ["alpha_pattern must hold", "[7]"]),
    "a rank of 0": (lambda f: edit(f, r=0), ["r must be a whole number ≥ 1, got 0"]),
    "a rank in words": (lambda f: edit(f, r="3"), ["r must be a whole number ≥ 1, got '3'"]),
    "a rank that is no number": (lambda f: edit(f, r=True), ["r must be a whole number ≥ 1, got True"]),
    "a pattern's rank": (lambda f: edit(f, rank_pattern={"q_proj": 2.5}), ["r must be a whole number", "got 2.5"]),
    "an alpha of 0": (lambda f: edit(f, lora_alpha=0), ["lora_alpha must be a finite number > 0, got 0"]),
    "an alpha of NaN": (lambda f: edit(f, lora_alpha=math.nan), ["lora_alpha must be a finite number > 0"]),
    "an alpha in words": (lambda f: edit(f, alpha_pattern={"v_proj": "7"}), ["lora_alpha must be", "got '7'"]),
    "a dropout of 1": (lambda f: edit(f, lora_dropout=1.0), ["lora_dropout must be in [0, 1)"]),
    "rslora in words": (lambda f: edit(f, use_rslora="yes"), ["use_rslora must be true or false, got 'yes'"]),
    # tensors
    "a missing key": (lambda f: edit_tensors(f, lambda t: t.pop(V1)), [f"{V1} is missing", "(1 in all)"]),
    "a foreign key": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{PREFIX}model.norm.weight": torch.ones(64)})),
        [f"{PREFIX}model.norm.weight is in the file, but belongs to no layer"],
    ),
    "keys with the adapter's name": (
        lambda f: rename_keys(f, lambda k: k.replace(".weight", ".default.weight")),
        ["lora_A.default.weight is in the file", "(16 in all)", "… and 6 more"],
    ),
    "keys without the prefix": (lambda f: rename_keys(f, lambda k: k.removeprefix(PREFIX)), ["(16 in all)"]),
    "keys of the model without a head": (lambda f: rename_keys(f, lambda k: k.replace("model.model.", "model.")),
                                         ["(16 in all)", "with or without a head"]),
    "a layer too many": (lambda f: edit(f, target_modules=["q_proj"]), [V1, "(4 in all)"]),
    "a layer too few": (lambda f: edit(f, target_modules=["q_proj", "v_proj", "k_proj"]), ["k_proj.lora_A.weight"]),
    "a layer that isn't linear": (
        lambda f: edit(f, target_modules=["q_proj", "v_proj", "embed_tokens"]),
        ["model.embed_tokens can't have a LoRA adapter here", "got Embedding"],
    ),
    "another rank": (lambda f: edit(f, r=4), [f"{A0} is (3, 64), but must be (4, 64) here", "(8 in all)"]),
    "another rank in one layer": (lambda f: edit(f, rank_pattern={"1.self_attn.v_proj": 2}),
                                  ["must be (96, 2) here"]),
    "a wrong shape": (lambda f: edit_tensors(f, lambda t: t.update({V1: t[V1].T})),
                      ["(3, 96), but must be (96, 3)"]),
    "a vector": (lambda f: edit_tensors(f, lambda t: t.update({V1: torch.ones(288)})), ["is (288,), but must be"]),
    "whole numbers": (lambda f: edit_tensors(f, lambda t: t.update({V1: t[V1].int()})),
                      ["torch.int32", "floating-point"]),
    "another model's": (
        lambda f: [save_adapter(ours(BERT, ["query"]), f), edit(f, base_model_name_or_path="some/bert")],
        ["chooses 0 layers here", "encoder.layer.0", "some/bert"],
    ),
}  # fmt: skip


def snapshot(model):
    modules = {n: (id(m), type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return modules, parameters, set(vars(model))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_adapter(ours(LLAMA), folder)
    return folder


def assert_refused(model, folder, fragments=()):
    """An AdapterError with these in it, and the model, whatever of it was trained, as it was."""
    trained = [p for i, p in enumerate(model.parameters()) if i % 3]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in trained))
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, folder)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert len(message.splitlines()) <= 13
    assert snapshot(model) == before
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapters_are_refused_and_the_model_is_as_it_was(kind, good, tmp_path):
    damage, fragments = BROKEN[kind]
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    assert len(wrapped_layers(load_adapter(bare(LLAMA), folder))) == 4
    damage(folder)
    assert_refused(bare(LLAMA), folder, fragments)


@pytest.mark.parametrize("field", checkpoint.REFUSED)
def test_each_field_that_changes_the_result_is_refused_by_name(field, good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    edit(folder, **{field: ["classifier"]})
    assert_refused(bare(LLAMA), folder, [f"{field} = ['classifier'] is not supported", "merge_and_unload"])
    for off in (None, False, [], {}):
        edit(folder, **{field: off})
        load_adapter(bare(LLAMA), folder)


VARIANTS = [
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True, "target_modules": ["query"]},
    {"modules_to_save": ["pooler"]},
    {"target_modules": ["query", "word_embeddings"]},
    {"trainable_token_indices": [3, 4]},
    {"layers_to_transform": [1]},
    {"init_lora_weights": "olora"},
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_writes_for_more_than_plain_lora_is_refused(config, tmp_path):
    theirs(BERT, config.pop("target_modules", ["query", "value"]), **config).save_pretrained(tmp_path)
    assert_refused(bare(BERT), tmp_path, ["The model is as it was"])


def test_a_field_by_field_fact_about_peft():
    """A field that peft adds is in none of our lists: look at what it does, then put it into one."""
    fields = dataclasses.fields(LoraConfig)
    lists = [checkpoint.USED, checkpoint.HARMLESS, checkpoint.REFUSED]
    known = [field for names in lists for field in names]
    assert len(known) == len(set(known))
    assert sorted(known) == sorted(field.name for field in fields)
    # By default nothing is refused, and what we assume for a missing field is what peft assumes.
    written = LoraConfig(target_modules=["q_proj"]).to_dict()
    checkpoint.check_fields(Path(), json.loads(json.dumps(written | {"target_modules": ["q_proj"]})))
    defaults = {field: written[field] for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias")}
    assert defaults == {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none"}


def test_a_missing_field_means_what_it_means_in_peft(tmp_path):
    save_adapter(ours(LLAMA, r=8, lora_alpha=8), tmp_path)
    edit(tmp_path, remove="r lora_alpha lora_dropout use_rslora bias rank_pattern alpha_pattern".split())
    assert_same_bits(out(load_adapter(bare(LLAMA), tmp_path)), out(into_peft(tmp_path, LLAMA)))


def test_over_a_model_that_has_adapters(good, tmp_path):
    assert_refused(ours(LLAMA, ["k_proj"]), good, ["load_adapter takes the bare model", "already has adapters"])
    assert_refused(theirs(LLAMA, ["k_proj"]), good, ["already has adapters"])
    assert_refused(theirs(LLAMA, ["k_proj"]).get_base_model(), good, ["already has adapters"])
    with pytest.raises(TypeError, match="model is itself a Linear"):
        load_adapter(nn.Linear(3, 4), good)


def test_a_quantized_model(good):
    model = bare(LLAMA).requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(AdapterError, match="q_proj can't have a LoRA adapter here.*QLoRALinear"):
        load_adapter(model, good)
    assert not wrapped_layers(model)


def test_the_pickle_is_not_opened_even_beside_good_weights(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    (folder / PICKLE).write_bytes(b"nothing that could be opened")
    load_adapter(bare(LLAMA), folder)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(good, monkeypatch):
    made = []

    class Fails(LoRALinear):
        def __init__(self, *arguments):
            if len(made) == 2:
                raise MemoryError("no room")
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(checkpoint, "LoRALinear", Fails)
    model = bare(LLAMA)
    before = snapshot(model)
    with pytest.raises(MemoryError):
        load_adapter(model, good)
    assert snapshot(model) == before and len(made) == 2


# ------------------------------------------------------------------------ killed, and several at once

# Each save runs in a fork, which is ended by SIGKILL; the script prints what it saw, as JSON.
KILLED = r'''
import collections, copy, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from peft_teach import checkpoint
from peft_teach.checkpoint import CONFIG, NEXT, WEIGHTS, load_adapter, save_adapter
from peft_teach.lora.inject import apply_lora_to_model, wrapped_layers
from peft_teach.models import load

folder, what = Path(sys.argv[1]), sys.argv[2]
original = load("tiny-llama")[0]
seen = collections.Counter()

def adapter(seed, targets, r):
    torch.manual_seed(seed)
    model = apply_lora_to_model(copy.deepcopy(original), targets, r=r, lora_alpha=7)
    for layer in wrapped_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    return model

def state(model):
    return {n: (l.scaling, l.lora_A.tolist(), l.lora_B.tolist()) for n, l in wrapped_layers(model).items()}

# b has the config of a and other tensors; c has another config for tensors of the same shapes, d other shapes.
ADAPTERS = {"a": adapter(1, ["q_proj"], 3), "b": adapter(2, ["q_proj"], 3), "c": adapter(3, ["q_proj"], 3),
            "d": adapter(4, ["q_proj", "v_proj"], 2)}
for layer in wrapped_layers(ADAPTERS["c"]).values():
    layer.scaling = layer.lora_alpha = 11.0
STATES = {name: state(model) for name, model in ADAPTERS.items()}
FILES = {}
for name, model in ADAPTERS.items():
    save_adapter(model, folder / name)
    FILES[name] = tuple((folder / name / file).read_bytes() for file in (CONFIG, WEIGHTS))
assert FILES["a"][0] == FILES["b"][0] and FILES["a"][0] != FILES["c"][0]

def loaded(path):
    """The name of the adapter that loads, whole; None if there is none."""
    try:
        got = state(load_adapter(copy.deepcopy(original), path))
    except checkpoint.AdapterError as error:
        assert "no whole adapter" in str(error), error
        return None
    (name,) = [name for name in STATES if STATES[name] == got]
    return name

def pair_for_others(path):
    """What a reader sees that knows nothing of us: a whole pair, or no config."""
    if (path / CONFIG).exists():
        pair = tuple((path / file).read_bytes() for file in (CONFIG, WEIGHTS))
        assert pair in FILES.values(), "the files of two adapters side by side"
        seen["others see an adapter"] += 1
    else:
        seen["others see none"] += 1

def clean(path):
    return sorted(file.name for file in path.iterdir()) == ["README.md", CONFIG, WEIGHTS]

def fork(act):
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child

def dead(child):
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

def killed_at(step, name, path):
    """Save in a fork, killed before its step-th line of the writing code, or operation on files. Was it?"""
    def act():
        count = 0
        def one():
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
        def lines(frame, event, argument):
            if frame.f_code.co_filename == checkpoint.__file__ and event == "line":
                one()
            return lines
        write_pair = checkpoint.write_pair
        def traced(*arguments):
            events = "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"
            sys.addaudithook(lambda e, about: one() if e in events and str(path) in str(about) else None)
            sys.settrace(lines)
            write_pair(*arguments)
        checkpoint.write_pair = traced
        save_adapter(ADAPTERS[name], path)
    return dead(fork(act))

def fresh(path, name):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "README.md").write_text("mine")
    if name:
        save_adapter(ADAPTERS[name], path)

path, twice, seen_left = folder / "adapter", folder / "twice", set()
random.seed(0)
if what == "steps":
    for old, new in (("a", "b"), ("a", "c"), (None, "a")):
        step = 0
        while True:
            step += 1
            fresh(path, old)
            if not killed_at(step, new, path):
                assert loaded(path) == new and clean(path)
                break
            pair_for_others(path)
            first = loaded(path)
            assert first in (old, new), (old, new, step, first)
            seen[f"{old} to {new}: {first}"] += 1
            left = tuple(sorted(file.relative_to(path) for file in path.rglob("*")))
            if left not in seen_left:  # the next save, killed as well, wherever that is
                seen_left.add(left)
                second, killed = 1, True
                while killed:
                    shutil.rmtree(twice, ignore_errors=True)
                    shutil.copytree(path, twice)
                    killed = killed_at(second, "d", twice)
                    pair_for_others(twice)
                    assert loaded(twice) in ((first, "d") if killed else ("d",)), (first, step, second)
                    second += 5
            save_adapter(ADAPTERS["b"], path)
            assert loaded(path) == "b" and clean(path) and (path / "README.md").read_text() == "mine"
        seen["steps"] += step - 1
elif what == "moments":
    for save in range(20):
        old = "abcd"[save % 4]
        fresh(path, old)
        ready, go = os.pipe()
        def act():
            os.write(go, b"!")
            for name in "bdacdcab" * 10_000:
                save_adapter(ADAPTERS[name], path)
        child = fork(act)
        os.read(ready, 1)
        time.sleep(random.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert dead(child)
        pair_for_others(path)
        assert (name := loaded(path)) in "abcd"
        seen["loaded " + name] += 1
        seen["left something"] += not clean(path)
        save_adapter(ADAPTERS[old], path)
        assert loaded(path) == old and clean(path)
        seen["kills"] += 1
elif what == "together":
    fresh(path, "a")
    def act(names):
        for name in names * 10_000:
            save_adapter(ADAPTERS[name], path)
    writers = [fork(lambda: act("bcd")), fork(lambda: act("dca"))]
    end = time.monotonic() + 3
    while time.monotonic() < end:
        name = loaded(path)
        assert name in STATES, name
        seen[name] += 1
    for child in writers:
        os.kill(child, signal.SIGKILL)
    assert all(map(dead, writers))
    save_adapter(ADAPTERS["a"], path)
    assert loaded(path) == "a" and clean(path)
print(json.dumps(seen))
'''


def run_killed(what, folder):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, "-c", KILLED, str(folder), what]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_every_step_what_loads_is_the_old_adapter_or_the_new_one(tmp_path):
    seen = run_killed("steps", tmp_path)
    print(seen)
    assert seen["steps"] > 100
    for old, new in ("ab", "ac"):
        assert seen[f"{old} to {new}: {old}"] > 5 and seen[f"{old} to {new}: {new}"] > 2
    assert seen["None to a: None"] > 5 and seen["None to a: a"] > 2
    assert seen["others see none"] > 0 and seen["others see an adapter"] > 50


def test_20_saves_killed_at_random_moments(tmp_path):
    seen = run_killed("moments", tmp_path)
    print(seen)
    assert seen["kills"] == 20 and seen["left something"] > 5


def test_a_reader_beside_two_writers_sees_whole_adapters(tmp_path):
    seen = run_killed("together", tmp_path)
    print(seen)
    assert sum(seen.values()) > 50 and len(seen) >= 3


def test_what_peft_sees_after_a_kill_in_the_window(good, tmp_path):
    """The one state in which peft can't read the folder: it says so, we can, and a save mends it."""
    folder = tmp_path / "adapter"
    save_adapter(ours(LLAMA, ["q_proj"], r=2), folder)
    shutil.copytree(good, folder / NEXT)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'"):
        into_peft(folder, LLAMA)
    model = load_adapter(bare(LLAMA), folder)
    assert_same_bits(out(model), out(load_adapter(bare(LLAMA), good)))
    save_adapter(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert_same_bits(out(into_peft(folder, LLAMA)), out(model))


def test_what_peft_saves_over_a_killed_save_counts(good, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copytree(good, folder / NEXT)
    source = theirs(LLAMA, ["k_proj"])
    source.save_pretrained(folder)
    assert_same_bits(out(load_adapter(bare(LLAMA), folder)), out(source))
