"""Chapter 03: answers that are no part of the reference package."""

import torch


def parameter_count(in_features: int, out_features: int, r: int) -> int:
    """Trainable numbers of LoRA on one layer: A is (r, in_features), B is (out_features, r)."""
    return r * in_features + out_features * r


def break_even_rank(in_features: int, out_features: int) -> int:
    """The largest r with r · (in + out) < in · out: above it, LoRA trains no fewer numbers than the weight has."""
    return (in_features * out_features - 1) // (in_features + out_features)


def moving_factors() -> dict[str, tuple[str, str]]:
    """What moves at steps 1 and 2 of SGD. The gradient of A has B in it as a factor, and that of B has A."""
    return {
        "A zero, B zero": ("neither", "neither"),
        "A drawn, B zero": ("B", "both"),
        "A zero, B drawn": ("A", "both"),
        "A drawn, B drawn": ("both", "both"),
    }


def merge_changes_nothing(layer, x) -> bool:
    """Does merging leave the output on x as it was: after merge(), a second merge(), and unmerge()?

    layer: a LoRALinear, perhaps a wrong one, perhaps fresh (B = 0), perhaps in training mode with
    dropout. There is layer(x), layer.get("lora_B"), layer.put("lora_B", tensor), layer.eval(),
    layer.merge(), layer.unmerge(). What get gives is a copy. x: (batch, seq, in_features), float32.
    Equal means up to rounding: within 1e-4 of the largest output.
    """
    layer.eval()  # dropout would change the output from call to call
    layer.put("lora_B", torch.randn_like(layer.get("lora_B")))  # with B = 0 there is nothing to merge
    before = layer(x)
    room = 1e-4 * before.abs().max()
    for change in (layer.merge, layer.merge, layer.unmerge):
        change()
        if (layer(x) - before).abs().max() > room:
            return False
    return True
