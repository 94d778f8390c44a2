"""LoRA in a whole model: find the layers, freeze everything, wrap the layers that were found.

    paper   Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.2
            (which matrices get an adapter); Dettmers et al. 2023, "QLoRA", section 4 (all linear layers)
    peft    get_peft_model(model, LoraConfig(target_modules=…, exclude_modules=…)): the same layers,
            and the same bits from the model in which they sit

    model                                apply_lora_to_model(model, ["q_proj"])
    └─ layers.0.self_attn.q_proj         └─ layers.0.self_attn.q_proj          LoRALinear: A, B are trained
       an nn.Linear, trained                └─ layers.0.self_attn.q_proj.linear   the nn.Linear, frozen
    └─ layers.0.self_attn.k_proj         └─ layers.0.self_attn.k_proj          frozen

Where this differs from `peft` on purpose: the model itself comes back, no object around it, and after
an error it is as it was before. Each name must be in the model (peft is content if one of them is). A
new layer takes the mode of the layer that it replaces, so that a model in eval mode stays in eval mode
(peft's new layers are in training mode, and drop out until the next .eval()). "all-linear" leaves a
classifier out whatever the task; it stays frozen, where peft with a task_type trains it too. Only
nn.Linear and Conv1D are wrapped: embeddings and convolutions are not.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from peft_teach.lora.layer import LoRALinear

ALL_LINEAR = "all-linear"
CLASSIFIERS = ("score", "classifier", "qa_outputs")  # what transformers calls the heads that aren't lm_head


# ---- which layers ----


def find_targets(names: Iterable[str], targets: str | Iterable[str]) -> list[str]:
    """Those of the dotted names that `targets` means, in their order.

    A list: names that are in it, or end in "." and one that is ("q_proj", "self_attn.q_proj").
    One string: names that it matches from start to end, as a regular expression.
    """
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    endings = tuple(f".{target}" for target in targets)  # with the dot: "proj" must not find "q_proj"
    return [name for name in names if f".{name}".endswith(endings)]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or the Conv1D of transformers (GPT-2's linear layer, with the weight transposed)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def all_linear(model: nn.Module) -> list[str]:
    """The names of all linear layers but those in the output head, in a model of transformers.

    As in peft: the head is what get_output_embeddings() gives, or else a classifier.
    """
    heads = []
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        heads = [head] if head is not None else [getattr(model, c) for c in CLASSIFIERS if hasattr(model, c)]
    in_head = {id(module) for head in heads for module in head.modules()}
    return [n for n, module in model.named_modules() if is_linear(module) and id(module) not in in_head]


def target_layers(model: nn.Module, target_modules, exclude_modules) -> dict[str, nn.Module]:
    """{name: linear layer} of what is to be wrapped, in the model's order, or an error that says why not."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        found = all_linear(model)
    else:
        found = known_targets("target_modules", target_modules, model, names)
    excluded = known_targets("exclude_modules", exclude_modules, model, names) if exclude_modules else []
    found = {name: model.get_submodule(name) for name in found if name not in set(excluded)}
    if not found:
        why = f"everything is excluded by exclude_modules={exclude_modules!r}" if excluded else "nothing is linear"
        raise ValueError(f"target_modules={target_modules!r}: nothing is left to wrap, {why}")
    for name, module in found.items():
        if not is_linear(module):
            raise TypeError(
                f"target_modules={target_modules!r} means {name}, too, which is a {type(module).__name__}: only "
                f"nn.Linear and Conv1D can be wrapped. Name the layers more exactly, or use exclude_modules"
            )
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise TypeError(
                f"{name} can't be wrapped: nn.MultiheadAttention takes its weight and never calls it, "
                f"so an adapter there would do nothing. Leave it out with exclude_modules"
            )
    return found


def known_targets(field: str, targets, model: nn.Module, names: list[str]) -> list[str]:
    """find_targets, with an error for what is in no name; `field` is the argument that the error blames."""
    if isinstance(targets, str):
        try:
            found = find_targets(names, targets)
        except re.error as error:
            raise ValueError(f"{field}={targets!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(
                f"{field}={targets!r} matches no name. One string is a regular expression for whole dotted names; "
                f"for the last part of a name write a list, [{targets!r}]{nearest([targets], model, names)}"
            )
        return found
    if not isinstance(targets, (list, tuple, set, frozenset)) or not all(isinstance(t, str) for t in targets):
        raise TypeError(f"{field} must be a list of names, a regular expression or 'all-linear', got {targets!r}")
    if not targets:
        raise ValueError(f"{field} must name at least one module, got {targets!r}")
    if unknown := sorted(target for target in targets if not find_targets(names, [target])):
        hint = f" ({ALL_LINEAR!r} is meant as one string, not in a list)" if ALL_LINEAR in unknown else ""
        called = ", ".join(map(repr, unknown))
        raise ValueError(f"{field}: no module is called {called}{hint}{nearest(unknown, model, names)}")
    return find_targets(names, targets)


def nearest(unknown: list[str], model: nn.Module, names: list[str]) -> str:
    """The end of an error: real names like the unknown ones, and what could be wrapped at all."""
    text = ""
    for name in unknown:
        parts = name.count(".") + 1
        real = sorted({".".join(known.split(".")[-parts:]) for known in names})
        if near := difflib.get_close_matches(name, real, n=3):
            text += f". Near {name!r}: {', '.join(map(repr, near))}"
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})
    return f"{text}. Linear layers here: {', '.join(linear) or 'none'}"


# ---- wrapping them ----


def apply_lora_to_model(
    model: nn.Module,
    target_modules: str | Iterable[str] = ("q_proj", "v_proj"),
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    exclude_modules: str | Iterable[str] = (),
    layer: Callable[..., nn.Module] = LoRALinear,
) -> nn.Module:
    """Freeze the model and put an adapter on each of its target layers. The same model comes back.

    target_modules: a list of last names or dotted endings, one string that is a regular expression for
    whole names, or "all-linear" (the output head left out); exclude_modules: likewise what to leave out.
    layer: what is called as layer(linear, r=, lora_alpha=, lora_dropout=, use_rslora=) for each of them.
    wrapped_layers(model) tells what was wrapped. Raises ValueError for a name that isn't in the model or
    for a model that has adapters, TypeError for a target that isn't linear; the model is then unchanged.
    """
    check_bare(model)
    targets = target_layers(model, target_modules, exclude_modules)
    was_trained = [(p, p.requires_grad) for p in model.parameters()]
    arguments = dict(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
    try:
        model.requires_grad_(False)  # first, so that nothing but the adapters made below is trained
        wrappers = {name: wrap(name, linear, layer, arguments) for name, linear in targets.items()}
        warn_of_tied_weights(model, wrappers)
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper)
    except BaseException:
        for name, linear in targets.items():
            model.set_submodule(name, linear)
        for p, trained in was_trained:
            p.requires_grad_(trained)
        raise
    return model


def check_bare(model: nn.Module) -> None:
    """Raise an error unless this is a model with layers inside it, none of which has an adapter."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    of_peft = [n for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")]
    if names := [*wrapped_layers(model), *of_peft]:
        more = f", … ({len(names)} in all)" if len(names) > 3 else ""
        raise ValueError(
            f"the model already has adapters, at {', '.join(name or 'its top' for name in names[:3])}{more}: "
            "wrapping again would train adapters of adapters. Load the model afresh"
        )
    if is_linear(model):
        raise TypeError(
            f"model is itself a {type(model).__name__}: there is no module around it in which it could be "
            "replaced. Wrap it with LoRALinear(model, …)"
        )


def wrap(name: str, linear: nn.Module, layer: Callable[..., nn.Module], arguments: dict) -> nn.Module:
    """layer(linear, …), in the mode of the linear layer."""
    training = linear.training
    try:
        wrapper = layer(linear, **arguments)
    except Exception as error:
        error.add_note(f"while wrapping {name}")
        raise
    if not isinstance(wrapper, nn.Module):
        raise TypeError(f"layer must give an nn.Module, got {type(wrapper).__name__} for {name}")
    wrapper.wraps_linear = True  # for wrapped_layers, since not every method has a lora_A
    return wrapper.train(training)


def warn_of_tied_weights(model: nn.Module, wrappers: dict[str, nn.Module]) -> None:
    """Warn when a weight that gets an adapter is another module's weight, too."""
    users = {}  # id of a weight → {where a module that has it hangs: the first name of that place}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, child = path.rpartition(".")
        place = (id(model.get_submodule(parent)), child)  # a shared parent is wrapped once, for all
        for weight in module._parameters.values():
            users.setdefault(id(weight), {}).setdefault(place, path)
    for name in wrappers:
        weight = model.get_submodule(name).weight
        others = ", ".join(path for path in users.get(id(weight), {}).values() if path != name)
        if others:
            warnings.warn(
                f"{name} shares its weight with {others} (tied weights). Its adapter acts in {name} alone, but "
                f"merging changes the weight, and so {others} too: the merged model will not compute what the "
                f"unmerged one does. Leave {name} out (exclude_modules), untie the weight first, or don't merge",
                stacklevel=3,
            )


# ---- what can be done with all of them ----


def wrapped_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: wrapper} of the layers that have an adapter, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "wraps_linear") or (hasattr(module, "lora_A") and hasattr(module, "linear"))
    }


def merge_lora(model: nn.Module) -> nn.Module:
    """Put each update into its weight. The wrappers stay, the model comes back. All are merged, or none."""
    merged = []
    try:
        for wrapper in mergeable(model):
            merged.append(wrapper)
            wrapper.merge()
    except BaseException:
        for wrapper in reversed(merged):
            wrapper.unmerge()
        raise
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Give each weight back, exactly as it was.

    In the reverse order of merging: of two wrappers of one tied weight, the second kept W + ΔW₁.
    """
    for wrapper in reversed(mergeable(model)):
        wrapper.unmerge()
    return model


def mergeable(model: nn.Module) -> list[nn.Module]:
    wrappers = wrapped_layers(model)
    if not wrappers:
        raise ValueError("the model has no adapters of peft_teach: call apply_lora_to_model first")
    for name, wrapper in wrappers.items():
        if not (hasattr(wrapper, "merge") and hasattr(wrapper, "unmerge")):
            raise TypeError(f"{name} is a {type(wrapper).__name__}, which can't be merged")
    return list(wrappers.values())


class ParameterCount(NamedTuple):
    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """How many numbers the model has, and how many of them are trained; a shared weight counts once."""
    trainable = total = 0
    for p in model.parameters():
        count = p.numel()
        if type(p).__name__ == "Params4bit" and p.bnb_quantized:  # bitsandbytes packs two into a byte
            count *= 2 * p.element_size()
        total += count
        trainable += count if p.requires_grad else 0
    return ParameterCount(trainable, total)
