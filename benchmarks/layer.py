"""Our LoRA layer's forward and backward against peft's: at least as fast (≥ 1.0×)."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.timing import Row, ratio
from peft_teach import LoRALinear


def peft_layer(linear: nn.Linear, r: int, lora_alpha: float) -> nn.Module:
    """As get_peft_model makes it: with float32 adapters over a 16-bit layer, as ours."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["0"], r=r, lora_alpha=lora_alpha)
    return get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def measure() -> list[Row]:
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, dtype, shape in (("float32", torch.float32, (4, 128)), ("bfloat16", torch.bfloat16, (4, 128)), ("float32, one token", torch.float32, (1, 1))):
        layers = [make(nn.Linear(576, 576).to(device, dtype), r=8, lora_alpha=12).to(device) for make in (peft_layer, LoRALinear)]
        x = torch.randn(*shape, 576).to(device, dtype).requires_grad_()
        many = range(20 if shape == (4, 128) else 400)

        def work(layer, x=x, many=many):
            def step():
                for _ in many:
                    layer(x).sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
            return step

        rows.append(ratio(f"LoRA layer 576 × 576, r = 8, {name}, forward and backward", "≥ 1.0", *map(work, layers)))
    return rows
