"""LoRA on one linear layer.

    paper   Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1
            Kalajdzievski 2023, "A Rank Stabilization Scaling Factor" (rsLoRA), section 3
    peft    peft.tuners.lora.layer.Linear: bit for bit, in float32 and float64

            x (batch, seq, in_features)
            ├──────────────────┐
            │              dropout
      ┌─────┴─────┐      ┌─────┴─────┐
      │ W  frozen │      │     A     │  (r, in_features)   drawn
      │ (out, in) │      └─────┬─────┘
      │           │      ┌─────┴─────┐
      │           │      │     B     │  (out_features, r)  zero
      └─────┬─────┘      └─────┬─────┘
            │              × scaling      lora_alpha / r, or lora_alpha / √r
            └───────(+)────────┘
            y (batch, seq, out_features)

Where this differs from `peft` on purpose: `merge` keeps a copy of the weight, so that `unmerge`
gives it back exactly (peft subtracts, which in bfloat16 leaves a difference); merging twice is
silent instead of a warning; bad arguments are refused when the layer is built.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float


def delta_weight(
    A: Float[Tensor, "r in_features"],
    B: Float[Tensor, "out_features r"],
    lora_alpha: float,
    r: int,
    use_rslora: bool = False,
) -> Float[Tensor, "out_features in_features"]:
    """The change of the weight that A and B stand for, in their dtype: scaling · B A.

    The scaling is lora_alpha / r, or lora_alpha / √r with use_rslora.
    """
    scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
    return (B @ A) * scaling


def init_lora_(A: Float[Tensor, "r in_features"], B: Float[Tensor, "out_features r"]) -> None:
    """Start A and B, in place: A uniform within ±1/√in_features, B zero.

    This is what nn.Linear does for its weight, and what peft does for A.
    """
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # with this a, the bound is 1/√in_features
    nn.init.zeros_(B)


def add_update(
    y: Float[Tensor, "*batch out_features"],
    x: Float[Tensor, "*batch in_features"],
    A: Float[Tensor, "r in_features"],
    B: Float[Tensor, "out_features r"],
    scaling: float,
) -> Float[Tensor, "*batch out_features"]:
    """y + scaling · B A x, in y's dtype.

    The update is computed in the dtype of A and B, added there, and cast once, at the end.
    """
    update = F.linear(F.linear(x.to(A.dtype), A), B) * scaling
    return (y + update).to(y.dtype)


def check_lora_arguments(in_features, out_features, r, lora_alpha, lora_dropout) -> None:
    """Raise TypeError or ValueError, naming the field, the value and what is allowed."""
    for name, size in (("in_features", in_features), ("out_features", out_features), ("r", r)):
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be a whole number ≥ 1, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be ≥ 1, got {size}")
    for name, number in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if not (lora_alpha > 0 and math.isfinite(lora_alpha)):
        raise ValueError(f"lora_alpha must be a finite number > 0, got {lora_alpha}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
    if r > min(in_features, out_features):
        warnings.warn(
            f"r = {r} is above min(in_features, out_features) = {min(in_features, out_features)}: "
            "B A can't have a higher rank than that, so the rest of A and B is spent for nothing",
            stacklevel=3,
        )


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or a transformers Conv1D; TypeError for all else."""
    if hasattr(linear, "lora_A"):
        raise TypeError(
            f"linear is a {type(linear).__name__}, which already has an adapter: "
            "wrapping it again would train an adapter of an adapter. Pass the plain layer inside it"
        )
    if type(linear).__name__ == "Conv1D" and hasattr(linear, "nf"):
        in_features, out_features = linear.weight.shape  # GPT-2 keeps its weights as (in, out)
    elif isinstance(linear, nn.Linear):
        out_features, in_features = linear.weight.shape
    else:
        raise TypeError(
            f"linear must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}"
        )
    if linear.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            "linear.weight must be float16, bfloat16, float32 or float64, "
            f"got {linear.weight.dtype}: a quantized layer needs QLoRALinear"
        )
    return in_features, out_features


class LoRALayer(nn.Module):
    """The update alone: x ↦ scaling · B A dropout(x), in the dtype of x.

    (batch, seq, in_features) → (batch, seq, out_features)

    lora_A: (r, in_features), lora_B: (out_features, r). Raises TypeError or ValueError
    for arguments out of range, and warns when r is above min(in_features, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        check_lora_arguments(in_features, out_features, r, lora_alpha, lora_dropout)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        init_lora_(self.lora_A, self.lora_B)

    def delta_weight(self) -> Float[Tensor, "out_features in_features"]:
        """scaling · B A: what this layer would add to a weight."""
        return delta_weight(self.lora_A, self.lora_B, self.lora_alpha, self.r, self.use_rslora)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        nothing = x.new_zeros(*x.shape[:-1], self.lora_B.shape[0])
        return add_update(nothing, self.dropout(x), self.lora_A, self.lora_B, self.scaling)


class LoRALinear(nn.Module):
    """A linear layer, frozen, with a LoRA update beside it.

    (batch, seq, in_features) → (batch, seq, out_features)

    linear: the wrapped nn.Linear (or transformers Conv1D); none of its parameters is trained.
    lora_A: (r, in_features), lora_B: (out_features, r), in the dtype of the base,
    or in float32 over a 16-bit base. Raises TypeError or ValueError for arguments out of range,
    and warns when r is above min(in_features, out_features).
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        in_features, out_features = linear_sizes(linear)
        check_lora_arguments(in_features, out_features, r, lora_alpha, lora_dropout)
        self.linear = linear.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout)
        # 16 bits are enough to hold a weight, not to add up many small steps to one.
        base = linear.weight
        dtype = torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=base.device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=base.device))
        init_lora_(self.lora_A, self.lora_B)
        # The weight as it was, while merged. A buffer, so that it moves with .to(device).
        self.register_buffer("weight_before_merge", None, persistent=False)

    @property
    def merged(self) -> bool:
        """Is the update inside linear.weight at the moment?"""
        return self.weight_before_merge is not None

    def delta_weight(self) -> Float[Tensor, "out_features in_features"]:
        """scaling · B A: what merging adds to the weight."""
        return delta_weight(self.lora_A, self.lora_B, self.lora_alpha, self.r, self.use_rslora)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        y = self.linear(x)
        if self.merged:
            return y
        return add_update(y, self.dropout(x.to(self.lora_A.dtype)), self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into linear.weight. Merging twice changes nothing.

        A state_dict taken now holds the merged weight; layers that share the weight change too.
        """
        if self.merged:
            return
        weight = self.linear.weight
        delta = self.delta_weight()
        self.weight_before_merge = weight.detach().clone()
        weight += delta if isinstance(self.linear, nn.Linear) else delta.T  # Conv1D keeps (in, out)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give linear.weight back, exactly as it was. Unmerging twice changes nothing."""
        if not self.merged:
            return
        self.linear.weight.copy_(self.weight_before_merge)
        self.weight_before_merge = None

    def extra_repr(self) -> str:  # given
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, merged={self.merged}"
