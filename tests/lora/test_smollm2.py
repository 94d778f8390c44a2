"""Our LoRALinear in every q_proj and v_proj of SmolLM2-135M, against peft in a copy: the same bits.

Merged logits are only near: 30 layers round W + S·BA instead of W x + S·B(A x). The largest difference,
as a share of the largest logit, on a CPU (merged, peft's logits have the same bits as ours):

               adapter     merged against     after unmerging
               against     unmerged           ours   peft
               base
    float32    0.23        1.6e-6 (≤ 3.0e-6)  0      1.5e-6
    bfloat16   0.24        0.026  (≤ 0.045)   0      0.023
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_teach.lora.layer import LoRALinear
from peft_teach.models import load

MODEL = "smollm2-135m"
LORA = {"r": 6, "lora_alpha": 20, "lora_dropout": 0.1}
TARGETS = ("q_proj", "v_proj")
TEXTS = [
    "A low-rank adapter leaves the weights of a model as they are and learns a small correction beside them.",
    "The train was late again, so",
]


def with_ours(model):
    """{path of a target: its LoRALinear}, put into the model by the plainest loop."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS:
            setattr(model.get_submodule(parent), name, LoRALinear(module, **LORA))
    return model, {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}


def with_peft(model):
    config = LoraConfig(target_modules=list(TARGETS), task_type="CAUSAL_LM", **LORA)
    model = get_peft_model(model, config)
    named = model.base_model.model.named_modules()
    return model, {p: m for p, m in named if p.rpartition(".")[2] in TARGETS}


def factors(layer):
    if isinstance(layer, LoRALinear):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def run(wrap, dtype, device):
    """Everything that is compared. Each model is gone before the next one comes."""
    model, tokenizer = load(MODEL, dtype=dtype, device=device)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True).to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    real = batch["attention_mask"].bool()  # logits at padding mean nothing
    result = {}
    with torch.no_grad():
        result["base"] = model(**batch).logits[real]

    model, layers = wrap(model)
    draws = torch.Generator().manual_seed(0)
    for path in sorted(layers):
        for factor in factors(layers[path]):
            assert factor.dtype == torch.float32
            factor.data.copy_(0.05 * torch.randn(factor.shape, generator=draws))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(layers)

    model.eval()
    with torch.no_grad():
        result["logits"] = model(**batch).logits[real]

    model.train()
    torch.manual_seed(1)  # the same dropout
    result["loss"] = model(**batch, labels=labels).loss
    result["loss"].backward()
    result["loss"] = result["loss"].detach()
    for path, layer in layers.items():
        for name, factor in zip("AB", factors(layer), strict=True):
            result[f"grad of {path}.{name}"] = factor.grad
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    model.eval()
    for layer in layers.values():
        layer.merge()
    with torch.no_grad():
        result["merged logits"] = model(**batch).logits[real]
    for layer in layers.values():
        layer.unmerge()
    with torch.no_grad():
        result["unmerged again"] = model(**batch).logits[real]
    return result


def share(a, b):
    """The largest difference, as a share of the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 3.0e-6), (torch.bfloat16, 4.5e-2)], ids=["float32", "bfloat16"]
)
def test_smollm2_with_our_layer_equals_smollm2_with_peft(device, dtype, limit):
    ours, theirs = run(with_ours, dtype, device), run(with_peft, dtype, device)
    assert list(ours) == list(theirs) and len(ours) == 5 + 2 * 2 * 30
    for what in ours.keys() - {"unmerged again"}:  # there peft differs: it subtracts
        assert torch.isfinite(ours[what]).all(), what
        assert torch.equal(ours[what], theirs[what]), f"{what}: {share(ours[what], theirs[what]):.3g}"
        assert ours[what].abs().max() > 0, what

    # What was compared is no triviality: the adapter changes what the model says.
    assert share(ours["logits"], ours["base"]) > 0.15
    merged = share(ours["merged logits"], ours["logits"])
    print(f"\n{dtype}: adapter against base {share(ours['logits'], ours['base']):.2g}, merged against "
          f"unmerged {merged:.2g}; after unmerging, ours {share(ours['unmerged again'], ours['logits']):.2g}, "
          f"peft {share(theirs['unmerged again'], theirs['logits']):.2g}")  # fmt: skip
    assert 0 < merged <= limit
    assert torch.equal(ours["unmerged again"], ours["logits"])
