"""LoRA adapters on disk, in the format of `peft`, both ways: `save_adapter`, `load_adapter`.

    peft    PeftModel.save_pretrained and PeftModel.from_pretrained: the same files, equal logits

    adapter/adapter_config.json           which layers, r, lora_alpha, …
    adapter/adapter_model.safetensors     base_model.model.<name of the layer>.lora_A.weight   (r, in_features)
                                          base_model.model.<name of the layer>.lora_B.weight   (out_features, r)

Where this differs from `peft` on purpose: a file that doesn't fit is an error that lists what is wrong,
and the model stays as it was (peft warns, and goes on with layers that do nothing); a field of the config
that isn't known here is refused (peft warns, and ignores it); a pickle is never opened; the new layers are
trained further (peft freezes them), and are in eval mode if the model is.

Two files that must change together, though the killer may come between any two steps:

    1  both are written into .adapter.tmp/
    2  .adapter.tmp/ is renamed to .adapter.next/
    3  adapter_config.json is removed       until here the old adapter counts, from here the new one
    4  the new weights, then the new config are moved out of .adapter.next/ to where they belong

    the rule    where there is an adapter_config.json, the two files in the folder are the adapter;
                where there is none, each file of .adapter.next/ counts instead of the one outside

So the config of one adapter never lies beside the weights of another: a reader that doesn't know the rule,
such as peft, finds no adapter_config.json between 3 and the end of 4, and says so. A save that was killed
there loads here as the new adapter, and the next save to that folder finishes it, and clears up. (For peft to
read such a folder again: save_adapter(load_adapter(model, path), path).) When the config stays the same to
the byte, as in the middle of a training, the weights are renamed over the old ones in one step, and there is
no such moment. Saves wait for each other at .adapter.lock; load_adapter waits for nobody: it reads again when
the config was changed while it read. A peft that reads during a save can't know, and may mix the two.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_teach.lora.inject import (
    ALL_LINEAR,
    all_linear,
    apply_lora_to_model,
    check_bare,
    find_targets,
    wrapped_layers,
)
from peft_teach.lora.layer import LoRALinear, linear_sizes

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TEMPORARY, NEXT, LOCK = ".adapter.tmp", ".adapter.next", ".adapter.lock"
PREFIX = "base_model.model."

# Every field of peft 0.21.2's LoraConfig is in one of these three; a test fails when peft adds one.
USED = """peft_type r lora_alpha lora_dropout target_modules exclude_modules use_rslora
    rank_pattern alpha_pattern bias init_lora_weights""".split()
# These don't change what trained A and B compute, or only say how A and B were started.
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    fan_in_fan_out megatron_core qalora_group_size layers_pattern eva_config loftq_config corda_config
    lora_ga_config""".split()
# These change the result: fine while they are off, refused otherwise. So is every field not named here.
REFUSED = """modules_to_save layers_to_transform layer_replication target_parameters trainable_token_indices
    ensure_weight_tying lora_bias use_dora use_qalora use_bdlora alora_invocation_tokens megatron_config
    velora_config monteclora_config arrow_config kasa_config""".split()
OFF = (None, False, [], {})
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base weight, or the method


class AdapterError(ValueError):
    """An adapter that can't be loaded or saved. The message lists what is wrong and says what to do."""

    def __init__(self, what: str, problems=(), cure: str = ""):
        problems = list(problems)
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        super().__init__("\n".join([what, *(f"  - {line}" for line in problems[:10] + more), cure]).rstrip())


# ---- saving ----


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of `model` into the folder `path`, in peft's format. Other files there stay.

    Killed at any moment, what loads from there is the adapter of before or this one, whole. Merged or not
    is the same. Raises AdapterError for a model without adapters, or with one that is no plain LoRA.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    layers = wrapped_layers(model)
    if not layers:
        raise AdapterError(
            f"this {type(model).__name__} has no adapter of peft_teach to save",
            cure="Call apply_lora_to_model first. (A model of peft saves itself: model.save_pretrained(path).)",
        )
    check_plain_lora(layers)
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    if others := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]:
        warnings.warn(
            f"not saved, though trained, since they are no part of the adapter: {', '.join(others[:10])}"
            + (f", … ({len(others)} in all)" if len(others) > 10 else ""),
            stacklevel=2,
        )
    tensors = {
        f"{PREFIX}{name}.{factor}.weight": getattr(layer, factor).detach().cpu().contiguous().clone()
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }
    config = json.dumps(config_of(model, layers), indent=2, sort_keys=True)
    write_pair(Path(path).expanduser(), config.encode(), safetensors.torch.save(tensors, {"format": "pt"}))


def check_plain_lora(layers: dict[str, nn.Module]) -> None:
    """Raise AdapterError for layers whose adapter is more, or less, than A, B and a scaling."""
    problems = []
    for name, layer in layers.items():
        kind = f"{name}: a {type(layer).__name__}"
        A, B = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        own = [n for n, _ in layer.named_parameters() if n not in ("lora_A", "lora_B") and n[:7] != "linear."]
        if not all(isinstance(X, Tensor) and X.ndim == 2 for X in (A, B)) or A.shape[0] != B.shape[1]:
            problems.append(f"{kind} without lora_A (r, in) and lora_B (out, r)")
        elif own or not isinstance(getattr(layer, "linear", None), nn.Module):
            problems.append(f"{kind} made of lora_A, lora_B, {', '.join(own)}, not of lora_A, lora_B and linear")
        elif not 0 < float(getattr(layer, "scaling", 0)) < math.inf:
            problems.append(f"{kind} with scaling {getattr(layer, 'scaling', None)}: no lora_alpha > 0 gives this")
    if problems:
        raise AdapterError("nothing was saved: this is no plain LoRA", problems, "Only plain LoRA is saved here.")


def config_of(model: nn.Module, layers: dict[str, nn.Module]) -> dict:
    """What adapter_config.json says: the fields of the file that was loaded, if any, and what is so now."""
    use_rslora = all(getattr(layer, "use_rslora", False) for layer in layers.values())
    ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
    alphas = {name: alpha_of(layer, ranks[name], use_rslora) for name, layer in layers.items()}
    dropouts = [float(getattr(getattr(layer, "dropout", None), "p", 0)) for layer in layers.values()]
    r, lora_alpha, lora_dropout = (most_common(v) for v in (ranks.values(), alphas.values(), dropouts))
    writes_text = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": "CAUSAL_LM" if writes_text else None,
        **next(iter(getattr(model, "adapter_configs", {}).values()), {}),
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": targets_of(model, layers),
        "exclude_modules": None,  # target_modules means these layers and no others
        # peft reads a key as a regular expression for the end of a name; with ^ it is for the whole name.
        "rank_pattern": {f"^{re.escape(name)}": n for name, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != lora_alpha},
        "bias": "none",
        "fan_in_fan_out": any(type(layer.linear).__name__ == "Conv1D" for layer in layers.values()),
    }


def alpha_of(layer: nn.Module, r: int, use_rslora: bool) -> float:
    """The lora_alpha that gives the layer's scaling: the layer's own, else scaling × r (or × √r)."""
    root = math.sqrt(r) if use_rslora else r
    scaling = float(layer.scaling)  # what the layer computes with, whatever its lora_alpha says
    for alpha in (getattr(layer, "lora_alpha", None), round(scaling * root), scaling * root):
        if alpha is not None and alpha / root == scaling:
            break
    return int(alpha) if alpha == int(alpha) else float(alpha)


def targets_of(model: nn.Module, layers: dict[str, nn.Module]) -> list[str] | str:
    """A target_modules that means these layers and no others: last names, else whole names, else a pattern."""
    names, inside = [], None
    for name, _ in model.named_modules():  # without what is inside a wrapper: peft will see the bare model
        if inside is None or not name.startswith(inside):
            names.append(name)
            inside = f"{name}." if name in layers else None
    for targets in (sorted({name.rpartition(".")[2] for name in layers}), list(layers)):
        if set(find_targets(names, targets)) == set(layers):
            return targets
    return "|".join(map(re.escape, layers))


def most_common(values):
    return Counter(values).most_common(1)[0][0]


def write_pair(folder: Path, config: bytes, weights: bytes) -> None:
    """The four steps, as the module's text says."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        try:
            finish(folder)  # what an earlier save left
            temporary = folder / TEMPORARY
            temporary.mkdir()
            write(temporary / CONFIG, config)
            write(temporary / WEIGHTS, weights)
            if (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() == config:
                os.replace(temporary / WEIGHTS, folder / WEIGHTS)
            else:
                os.rename(temporary, folder / NEXT)
                (folder / CONFIG).unlink(missing_ok=True)
            finish(folder)
        finally:
            shutil.rmtree(folder / TEMPORARY, ignore_errors=True)
            if os.name == "posix":  # those who wait for it see that it is gone, and make another
                (folder / LOCK).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Do what is left of step 4, if anything, and clear up."""
    if not (folder / CONFIG).exists():
        for name in (WEIGHTS, CONFIG):  # the config last: with it the folder is whole
            if (folder / NEXT / name).exists():
                os.replace(folder / NEXT / name, folder / name)
    for left in (NEXT, TEMPORARY):
        shutil.rmtree(folder / left, ignore_errors=True)


def write(file: Path, content: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())  # on the disk before anything is renamed, in case the power fails


# ---- loading ----


def load_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Put the LoRA adapter in the folder `path`, of peft or of save_adapter, onto the bare `model`.

    The same model comes back, its layers wrapped and ready to be trained further, all else frozen. The
    fields of the config are in model.adapter_configs[adapter_name], from where save_adapter takes them.
    Raises AdapterError when anything doesn't fit; the model is then as it was.
    """
    try:
        check_bare(model)
    except ValueError as error:
        raise AdapterError(f"load_adapter takes the bare model: {error}") from error
    folder = Path(path).expanduser()
    config, tensors = read_adapter(folder)
    check_fields(folder, config)
    plan = match(folder, model, config, tensors)
    names = {id(model.get_submodule(name)): name for name in plan}

    def layer(linear, **_):
        r, lora_alpha, A, B = plan[names[id(linear)]]
        new = LoRALinear(linear, r, lora_alpha, config.get("lora_dropout", 0.0), config.get("use_rslora", False))
        with torch.no_grad():
            new.lora_A.copy_(A)
            new.lora_B.copy_(B)
        return new

    try:
        apply_lora_to_model(model, "|".join(map(re.escape, plan)), layer=layer)
    except (TypeError, ValueError) as error:  # a field that LoRALinear refuses
        raise AdapterError(f"{folder / CONFIG}: {error}", cure="The model is as it was.") from error
    model.adapter_configs = {adapter_name: config}
    return model


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors, of one and the same save, or an AdapterError."""
    config, weights = read_pair(folder)
    try:
        config = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG} is no JSON: {error}", cure=GET_AGAIN) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} holds a {type(config).__name__}, no fields", cure=GET_AGAIN)
    try:
        return config, safetensors.torch.load(weights)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        pointer = weights.startswith(b"version https://git-lfs")
        why = "only says where git-lfs keeps the file" if pointer else f"is cut off, or no safetensors: {error}"
        raise AdapterError(f"{folder / WEIGHTS} {why}", cure=GET_AGAIN) from error


GET_AGAIN = "The model is as it was. Get the file again from where it came, or save the adapter again."


def read_pair(folder: Path) -> tuple[bytes, bytes]:
    """The bytes of both files, of one and the same save, also while somebody saves."""
    for _ in range(20):
        config, weights = where(folder)
        try:
            before = config.stat()
            pair = config.read_bytes(), weights.read_bytes()
            now = config.stat()
            if (before.st_ino, before.st_mtime_ns) == (now.st_ino, now.st_mtime_ns):
                return pair  # the config is the same file as before: the weights were those beside it
        except (FileNotFoundError, NotADirectoryError):
            time.sleep(0.002)  # not there, or just being moved
    found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if PICKLE in found and WEIGHTS in missing:
        raise AdapterError(
            f"{folder / PICKLE} is a pickle, which can run any program when it is opened: it is never opened here",
            cure=f"Make {WEIGHTS} of it where you trust it: PeftModel.from_pretrained(…).save_pretrained(…).",
        )
    inside = [name for name in found if (folder / name / CONFIG).is_file() and name != NEXT]
    raise AdapterError(
        f"there is no whole adapter in {folder}" + ("" if folder.is_dir() else ", which is no folder"),
        [f"{name} is missing" for name in missing],
        f"The folders in it have one: {', '.join(inside)}" if inside else "Is this the folder you meant?",
    )


def where(folder: Path) -> tuple[Path, Path]:
    """The rule: which two files are the adapter."""
    if (folder / CONFIG).exists() or not (folder / NEXT / CONFIG).exists():
        return folder / CONFIG, folder / WEIGHTS
    moved = not (folder / NEXT / WEIGHTS).exists()
    return folder / NEXT / CONFIG, (folder if moved else folder / NEXT) / WEIGHTS


def check_fields(folder: Path, config: dict) -> None:
    """Raise AdapterError for fields that are wrong, or that change the result in a way not known here."""
    if (method := config.get("peft_type")) != "LORA":
        raise AdapterError(
            f"{folder / CONFIG}: peft_type is {method!r}, and only 'LORA' can be loaded here",
            cure="The model is as it was. PeftModel.from_pretrained(model, path) may know this method.",
        )
    problems = []
    for field, value in config.items():
        if field == "bias" and value != "none":
            problems.append(f"bias = {value!r}: only 'none' is supported, the base model's biases stay as they are")
        elif field == "init_lora_weights" and value not in STARTS:
            problems.append(f"init_lora_weights = {value!r}: such a start changes the base model, or the method")
        elif field in REFUSED and value not in OFF:
            problems.append(f"{field} = {value!r} is not supported: this is more than plain LoRA")
        elif field not in USED + HARMLESS + REFUSED and value not in OFF:
            problems.append(f"{field} = {value!r} is not known here: it may change the result")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            problems.append(f"{field} must hold names and numbers, got {config[field]!r}")
    ranks = config.get("rank_pattern") or {}
    for r in (config.get("r", 8), *(ranks.values() if isinstance(ranks, dict) else ())):
        if type(r) is not int or r < 1:
            problems.append(f"r must be a whole number ≥ 1, got {r!r}")
    if type(rslora := config.get("use_rslora", False)) is not bool:
        problems.append(f"use_rslora must be true or false, got {rslora!r}")
    for field in ("target_modules", "exclude_modules"):
        targets = config.get(field)
        names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if not (names or isinstance(targets, str) or (targets is None and field == "exclude_modules")):
            problems.append(f"{field} must be a list of names, or one regular expression, got {targets!r}")
    if problems:
        raise AdapterError(
            f"{folder / CONFIG} can't be used:",
            problems,
            "The model is as it was. If peft loads the adapter, merge it there (merge_and_unload) and load the "
            "merged model here. A field that only holds the default of a newer peft can be taken out of the file.",
        )


def match(folder: Path, model: nn.Module, config: dict, tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """{name of a layer: (r, lora_alpha, A, B)}, or an AdapterError that lists what doesn't fit."""
    plan, shapes, problems = {}, {}, []
    try:
        for name in chosen(model, config["target_modules"], config.get("exclude_modules")):
            r = pattern_value(config.get("rank_pattern"), name, config.get("r", 8))
            lora_alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
            key_A, key_B = (f"{PREFIX}{name}.{factor}.weight" for factor in ("lora_A", "lora_B"))
            try:
                in_features, out_features = linear_sizes(model.get_submodule(name))
            except TypeError as error:
                problems.append(f"{name} can't have a LoRA adapter here: {error}")
                continue
            shapes |= {key_A: (r, in_features), key_B: (out_features, r)}
            plan[name] = r, lora_alpha, tensors.get(key_A), tensors.get(key_B)
    except re.error as error:
        raise AdapterError(f"{folder / CONFIG} has a wrong regular expression: {error}", cure=GET_AGAIN) from error
    for key, tensor in tensors.items():
        if key not in shapes:
            problems.append(f"{key} is in the file, but belongs to no layer that target_modules chooses here")
        elif tensor.shape != shapes[key]:
            problems.append(f"{key} is {tuple(tensor.shape)}, but must be {shapes[key]} here")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, but must be a floating-point type")
    problems += [f"{key} is missing in the file" for key in shapes if key not in tensors]
    if problems or not plan:
        made_for = config.get("base_model_name_or_path")
        raise AdapterError(
            f"the adapter in {folder} doesn't fit this {type(model).__name__}: it has {len(tensors)} tensors, "
            f"target_modules chooses {len(plan)} layers here, and what is wrong is this ({len(problems)} in all):",
            problems,
            "The model is as it was. Load the adapter onto the model that it was made for"
            + (f" ({made_for})" if made_for else "")
            + ": the same class (with or without a head), the same sizes, no other change to its layers.",
        )
    return plan


def chosen(model: nn.Module, target_modules: list[str] | str, exclude_modules: list[str] | str | None) -> list[str]:
    """The names of the layers that the config means, as in peft: a name may also be in no layer at all."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        found = all_linear(model)
    else:
        found = find_targets(names, target_modules)
    excluded = set(find_targets(names, exclude_modules)) if exclude_modules else ()
    return [name for name in found if name not in excluded]


def pattern_value(pattern: dict | None, name: str, otherwise):
    """The value of the first key that, as a regular expression, is the whole name or its end after a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise
