"""peft_teach.models: names, tiny models, and the real ones as their cards say."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peft_teach import models
from peft_teach.models import ModelUnavailable, cached, load, path

ROOT = Path(__file__).parents[1]


# ---- names ----


def test_importing_models_imports_no_transformers():
    code = "import sys, peft_teach.models; print([m for m in sys.modules if m in {'transformers', 'peft', 'bitsandbytes'}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


def test_an_unknown_name_gets_the_nearest_known_ones(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable) as caught:
        load("smolm2")
    message = str(caught.value)
    assert "did you mean 'smollm2-135m'" in message
    assert all(name in message for name in (*models.MODELS, *models.TINY))
    assert "--local-dir" in message
    assert not cached("smolm2") and not cached("no such: name")
    with pytest.raises(ModelUnavailable, match="smollm2-135m"):
        path("tiny-llama")


def test_a_folder_without_a_config_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="It is a folder, but without config.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", models.TINY)
def test_tiny_models_are_the_same_each_time_and_leave_the_random_state(name, device):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, tokenizer = load(name, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, _ = load(name, device=device)
    assert tokenizer is None and cached(name) and not first.training
    for (key, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    weights = dict(first.named_parameters())
    assert all(w.device.type == device.type and w.dtype == torch.float32 for w in weights.values())
    matrices = [w for key, w in weights.items() if w.ndim == 2 and "embed" not in key and "wte" not in key]
    assert all(0.08 < w.std() < 0.25 for w in matrices)  # GPT-2 halves some
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    assert first(ids)[0].shape[:2] == (2, 3)


def test_tiny_llama_has_grouped_queries_and_no_square_projection():
    attention = load("tiny-llama")[0].model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (192, 64)
    assert attention.v_proj.weight.shape == (96, 64)


def test_dtype_and_default_dtype():
    model, _ = load("tiny-llama", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.set_default_dtype(torch.float64)
    try:
        again, _ = load("tiny-llama")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load("tiny-llama")[0].parameters()))


@pytest.mark.parametrize("name", models.TINY)
def test_a_local_folder_is_loaded_with_its_own_head(name, tmp_path):
    model, _ = load(name)
    model.save_pretrained(tmp_path / "mine")
    again, tokenizer = load(str(tmp_path / "mine"))
    assert type(again) is type(model) and tokenizer is None and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert path(str(tmp_path / "mine")) == tmp_path / "mine" and cached(str(tmp_path / "mine"))


# ---- the real models, in the user's cache ----


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network call: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", models.MODELS)
def test_offline_with_a_full_cache(name, no_network, monkeypatch, capfd):
    path(name)
    capfd.readouterr()
    monkeypatch.setattr("peft_teach.cache.download", None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    start = time.perf_counter()
    model, tokenizer = load(name)
    assert time.perf_counter() - start < 20  # about 1 s alone
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("Hello")["input_ids"]
    assert capfd.readouterr() == ("", "")  # no bars, no warnings


def test_smollm2_answers(smollm2, capfd, recwarn):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert not recwarn.list and capfd.readouterr().err == ""


def test_smollm2_is_the_model_that_its_card_says(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.num_attention_heads == 9 and model.config.num_key_value_heads == 3
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    assert tokenizer.model_max_length == 8192
    # the 4-bit grid: in each block of 32 an affine int4 loses nothing
    blocks = model.model.layers[3].self_attn.q_proj.weight.detach().reshape(-1, 32)
    low, high = blocks.min(1, keepdim=True).values, blocks.max(1, keepdim=True).values
    step = (high - low) / 15
    error = (low + ((blocks - low) / step).round() * step - blocks).norm() / blocks.norm()
    assert error < 1e-3


def test_smollm2_tokenizer_splits_digits_before_blanks(smollm2):
    _, tokenizer = smollm2
    text = "in 2024:\n\n    10,\n  7"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens == ["in", "Ġ", "2", "0", "2", "4", ":", "ĊĊĠĠĠĠ", "1", "0", ",", "ĊĠĠ", "7"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_changing_a_loaded_model_leaves_the_cache_as_it_is(smollm2):
    model, _ = load("minilm-l6")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert models.is_whole(path("minilm-l6"), models.MODELS["minilm-l6"], verify=True)


def test_minilm_puts_like_sentences_together():
    model, tokenizer = load("minilm-l6")
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # (3, seq, 384)
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike = mean @ mean.T
    assert alike[0, 1] > 0.6 > 0.2 > alike[0, 2]


def test_the_manifest_says_what_is_there():
    folder = path("smollm2-135m")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {f.name for f in folder.iterdir()} - {"manifest.json"}
    assert manifest["wheel"] == models.MODELS["smollm2-135m"].sha256
