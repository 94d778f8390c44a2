# %% [markdown]
# # 03 · The LoRA layer
#
# | | |
# |---|---|
# | **Afterwards you can** | write a LoRA layer that gives what `peft`'s gives, say what each of its parts is for, merge it, and test a merge |
# | **You need** | PyTorch modules, matrix products; no chapter before this one |
# | **Core path** | about 90 minutes; the quiz, the gallery and what is marked *optional* come on top |
# | **Machine** | 2 cores, 3 GiB of memory free; the cells take under a minute in all, after SmolLM2 was fetched once (93 MB to download, 542 MB of disk) |
# | **Checked against** | torch 2.13, transformers 5.23, peft 0.21.2 |
# | **Paper** | Hu et al. 2021, *LoRA*, section 4.1; Kalajdzievski 2023, *rsLoRA*, section 3 |
#
# A big model is to learn something small. Instead of changing its weight matrix $W$, LoRA freezes it
# and puts a thin detour beside it: two small matrices $A$ and $B$, which are trained.
#
# $$ y = W x + b + \frac{\alpha}{r} \, B A \, x \qquad A: (r, \text{in}), \quad B: (\text{out}, r) $$
#
# You will write that layer. It is then put into every attention layer of a real language model, next
# to Hugging Face's `peft`, and the two must not differ.

# %% jupyter={"source_hidden": true}
import logging
import math
import numbers
import warnings

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from peft_teach.course import (
    budget, check, claims, gallery, hint, measured, predict, progress, quiz, reveal, settings, show, solution, use, whose,
)

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls in it
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that nothing here needs
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# **How exercises work.** Fill in the body, run the cell, run the `check` below it. A check tries your
# code and `peft`'s on the same numbers. `hint("lora_layer.delta_weight")` gives the first of three
# hints; after two tries `solution("lora_layer.delta_weight")` opens. After twenty minutes on one
# exercise, look: it is no shame. Nothing below stops when an exercise is left blank: cells then take the reference
# and say so.
#
# **First a guess.** SmolLM2, a small language model, has 134.5 million parameters. We will put LoRA
# with r = 8 beside two matrices in each of its 30 layers. What share of the parameters will be
# trained, in percent?

# %%
predict("lora_layer.trained_percent", 1.0)

# %% [markdown]
# ## 1 · Two thin matrices
#
# By hand first. With r = 1, $A$ is a row and $B$ is a column. Their product is a full matrix, but
# each of its rows is a multiple of the same row.

# %%
W = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
A = torch.tensor([[1.0, 2.0, 3.0]])  # (r, in) = (1, 3)
B = torch.tensor([[2.0], [0.0], [-1.0]])  # (out, r) = (3, 1)
print(B @ A)
print("rank", torch.linalg.matrix_rank(B @ A).item(), "from", A.numel() + B.numel(), "numbers instead of", W.numel())

# %% [markdown]
# Six numbers instead of nine: no great saving at 3 × 3. At 576 × 192 it is another matter, and we
# come to that.
#
# ### Exercise: `delta_weight`
# {{lora_layer.delta_weight}}
#
# The change of the weight that $A$ and $B$ stand for: $\Delta W = \frac{\alpha}{r} B A$, of shape
# (out, in). With `use_rslora` the factor is $\alpha/\sqrt{r}$. The slow, obvious version:
#
# ```
# for o in range(out_features):
#     for i in range(in_features):
#         ΔW[o, i] = (lora_alpha / r) · sum over k of B[o, k] · A[k, i]
# ```

# %% key="lora_layer.delta_weight" role="answer"
# source: peft_teach.lora.layer: delta_weight

# %% key="lora_layer.delta_weight" role="check"
check("lora_layer.delta_weight", delta_weight)

# %% [markdown]
# Is that factor really in `peft`? People often write $W = W_0 + BA$ and leave it out. Take `peft`'s
# own layer with r = 4 and α = 7, merge it, and look at what was added to the weight.

# %% name="claim-no-scale"
from peft import LoraConfig, get_peft_model


def peft_around(linear: nn.Module, r: int, lora_alpha: float, **more) -> nn.Module:
    """peft's layer around one linear layer, with B drawn: a new one would be zero."""
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"], r=r, lora_alpha=lora_alpha, **more))
    layer = model.base_model.model[0].eval()
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer


torch.manual_seed(0)
theirs = peft_around(nn.Linear(6, 5), r=4, lora_alpha=7)
A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
before = theirs.weight.detach().clone()
theirs.merge()
added = theirs.weight.detach() - before
print(f"added / BA = {(added / (B @ A)).mean():.4f}   α/r = {7 / 4}")

# %% [markdown]
# The factor is there: 1.75, and not 1. With $\alpha = r$ nobody would have noticed, which is why no
# check in this book uses that.

# %% name="claim-scale"
for use_rslora in (False, True):
    print(f"use_rslora={use_rslora!s:5}  scaling = {peft_around(nn.Linear(6, 5), r=4, lora_alpha=7, use_rslora=use_rslora).scaling['default']}")

# %% [markdown]
# ### Exercises: what it costs
#
# These two ask for a number. They are about `v_proj` of SmolLM2:

# %%
settings("lora_layer.parameter_count")

# %% [markdown]
# **`parameter_count`** · {{lora_layer.parameter_count}}
#
# How many numbers does LoRA train beside this one matrix? The frozen weight does not count.

# %% key="lora_layer.parameter_count" role="answer"
s = settings("lora_layer.parameter_count")  # given
parameter_count = s.r * s.in_features + s.out_features * s.r

# %% key="lora_layer.parameter_count" role="check"
check("lora_layer.parameter_count", parameter_count)

# %% [markdown]
# **`break_even_rank`** · {{lora_layer.break_even_rank}} · *optional*
#
# Up to which r does LoRA train *fewer* numbers than the weight of this layer has?

# %% key="lora_layer.break_even_rank" role="answer"
break_even_rank = (s.in_features * s.out_features - 1) // (s.in_features + s.out_features)

# %% key="lora_layer.break_even_rank" role="check"
check("lora_layer.break_even_rank", break_even_rank)

# %% [markdown]
# ## 2 · Where A and B start
#
# A new layer should do exactly what the old one did. So $BA$ has to be zero at the start, and for
# that it is enough that *one* of the two is. Which one? Or both?
#
# ### Exercise: `moving_factors`, a prediction
# {{lora_layer.moving_factors}}
#
# Four starts, two steps of plain gradient descent. What changes in the first step, and what in the
# second: `"neither"`, `"A"`, `"B"` or `"both"`? Answer before you run the cell after it. Pencil and
# paper: with $G$ the gradient of $\Delta W$, the gradient of $B$ is $\frac{\alpha}{r} G A^\top$.

# %% key="lora_layer.moving_factors" role="answer"
moving_factors = {  # start: (step 1, step 2)
    "A zero, B zero": ("neither", "neither"),
    "A drawn, B zero": ("B", "both"),
    "A zero, B drawn": ("A", "both"),
    "A drawn, B drawn": ("both", "both"),
}

# %% key="lora_layer.moving_factors" role="check"
check("lora_layer.moving_factors", moving_factors)

# %% [markdown]
# Now run it, on `peft`'s layer:

# %%
x, target = torch.randn(20, 6), torch.randn(20, 5)
for start in ("A zero, B zero", "A drawn, B zero", "A zero, B drawn", "A drawn, B drawn"):
    layer = peft_around(nn.Linear(6, 5), r=2, lora_alpha=3)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for factor, drawn in ((A, "A drawn" in start), (B, "B drawn" in start)):
        nn.init.normal_(factor) if drawn else nn.init.zeros_(factor)
    new_output = "" if torch.equal(layer(x), layer.base_layer(x)) else "a new layer is not the old one"
    optimizer = torch.optim.SGD([A, B], lr=0.05)
    for step in (1, 2):
        was = A.detach().clone(), B.detach().clone()
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        print(f"{start:18}  step {step}:  A moves {not torch.equal(A, was[0])!s:5}  B moves {not torch.equal(B, was[1])!s:5}"
              f"  {new_output if step == 1 else ''}")

# %% [markdown]
# Each factor's gradient has the *other* factor in it. Two zeros never move; if both are drawn, the
# new layer does not give the old output. Drawing one and zeroing the other is what is left, and `peft`,
# like the paper, draws $A$.
#
# ### Exercise: `init_lora_`
# {{lora_layer.init_lora_}}
#
# In place, as the underscore says ($A$ and $B$ are `nn.Parameter`: nothing of this may be recorded
# for a gradient): every number of $A$ uniform between $-1/\sqrt{\text{in}}$ and
# $+1/\sqrt{\text{in}}$, every number of $B$ zero. That is `nn.init.kaiming_uniform_` with
# $a = \sqrt 5$, the start that `nn.Linear` gives its own weight.

# %% key="lora_layer.init_lora_" role="answer"
# source: peft_teach.lora.layer: init_lora_

# %% key="lora_layer.init_lora_" role="check"
check("lora_layer.init_lora_", init_lora_)

# %% [markdown]
# Many tutorials have $A = 0.01 \cdot N(0, 1)$ instead. What does `peft` do? If it were that, the
# largest number would not depend on the width.

# %% name="claim-init"
for in_features in (64, 1024):
    A = peft_around(nn.Linear(in_features, 32), r=16, lora_alpha=7).lora_A["default"].weight
    print(f"in = {in_features:4}:  largest |A| = {A.abs().max():.3f}   1/√in = {1 / math.sqrt(in_features):.3f}")

# %% [markdown]
# ## 3 · Adding the update
#
# A layer in a real model often holds 16-bit numbers, while $A$ and $B$ stay in float32: training
# adds many small steps to them, and 16 bits would lose those. So two dtypes meet. The rule of
# `peft`, and ours: compute the update in the dtype of $A$ and $B$, add it there, and round **once**,
# at the end.
#
# What is at stake, on one number. Around 256, bfloat16 has only even numbers:

# %%
y, update = torch.tensor(256.0, dtype=torch.bfloat16), torch.tensor(1.002)
print("rounded once: ", (y + update).to(torch.bfloat16).item(), "   rounded twice:", (y + update.to(torch.bfloat16)).item())

# %% [markdown]
# ### Exercise: `add_update`
# {{lora_layer.add_update}}
#
# $y + \text{scaling} \cdot B A x$, in the dtype of $y$. The formula has $x$ as a column. In a batch the
# vectors are *rows*, so $A x$ is written `x @ A.T`, or `F.linear(x, A)`. In words: bring $x$ to the dtype of $A$; send
# it through $A$, then through $B$; scale; add to $y$; round. All leading axes of $x$ and $y$ are
# the same, usually `(batch, seq)`.

# %% key="lora_layer.add_update" role="answer"
# source: peft_teach.lora.layer: add_update

# %% key="lora_layer.add_update" role="check"
check("lora_layer.add_update", add_update)

# %% [markdown]
# ## 4 · The update as a module
#
# The whole layer, as a picture:
#
# ```
#         x (batch, seq, in)
#         ├──────────────────┐
#         │              dropout
#   ┌─────┴─────┐      ┌─────┴─────┐
#   │ W  frozen │      │     A     │  (r, in)     drawn
#   │ (out, in) │      └─────┬─────┘
#   │           │      ┌─────┴─────┐
#   │           │      │     B     │  (out, r)    zero
#   └─────┬─────┘      └─────┬─────┘
#         │              × scaling
#         └───────(+)────────┘
#         y (batch, seq, out)
# ```
#
# ### Exercise: `LoRALayer`
# {{lora_layer.LoRALayer}}
#
# The right half of it, without a frozen weight: $x \mapsto \frac{\alpha}{r} B A
# \,\text{dropout}(x)$. It needs `lora_A` (r, in) and `lora_B` (out, r) as `nn.Parameter`, started as
# above, `scaling` (α/r, or α/√r with `use_rslora`), and dropout **on the input of A only**, in
# training mode only. The output is in the dtype of $x$, the update is computed in that of $A$ and $B$,
# as `add_update` does it. The functions from above are yours to call. If you left one blank, take the
# reference for now: `add_update = use("lora_layer.add_update")`.
#
# Folded below are two functions that are given: one refuses bad arguments, the other tells the
# sizes of a layer, `nn.Linear` or GPT-2's `Conv1D`. Call them or don't: the check does not try bad
# arguments, whatever the docstring promises for them.

# %% role="given" jupyter={"source_hidden": true}
# source: peft_teach.lora.layer: check_lora_arguments linear_sizes

# %% key="lora_layer.LoRALayer" role="answer"
# source: peft_teach.lora.layer: LoRALayer

# %% key="lora_layer.LoRALayer" role="check"
check("lora_layer.LoRALayer", LoRALayer)

# %% [markdown]
# ## 5 · Around a frozen layer
#
# ### Exercise: `LoRALinear`
# {{lora_layer.LoRALinear}}
#
# The whole layer. What it has to do:
#
# - `.linear` is the layer that was given, and nothing in it is trained, its bias included;
# - `.lora_A`, `.lora_B`, `.scaling` stand on this layer itself, with the shapes and the start of
#   `LoRALayer`; $A$ and $B$ are in the dtype of the frozen weight, and in float32 if that has 16 bits;
# - `.delta_weight()` gives $\frac{\alpha}{r} BA$; `.r` and `.lora_alpha` are what the given `extra_repr`
#   prints;
# - a new layer gives exactly what the frozen one gives;
# - dropout on the input of $A$, never on the frozen path, and only in training mode;
# - `.merge()` adds ΔW to `.linear.weight`; after it, `forward` is the linear layer alone. Merging a
#   merged layer does nothing;
# - `.unmerge()` brings the old weight back; without a merge before it, it does nothing. Up to rounding
#   is enough here. The reference restores it exactly; the end of this section shows why;
# - `.merged` is True while the update is inside the weight. It may be a plain attribute: delete the
#   property then.
#
# Begin with `__init__` and `forward`: the check gives points for what is right already.
# GPT-2's `Conv1D` keeps its weight the other way round, (in, out), and `linear_sizes` lets it through.
# Either handle it, in `merge` too, or refuse it in `__init__`: refusing costs no points, a wrong merge does.
# What happens over 16 bits, and with other leading axes than (batch, seq), is told but not graded.

# %% key="lora_layer.LoRALinear" role="answer"
# source: peft_teach.lora.layer: LoRALinear

# %% key="lora_layer.LoRALinear" role="check"
check("lora_layer.LoRALinear", LoRALinear)

# %% [markdown]
# From here on, cells use *your* layer if it has passed, and the reference if not:

# %%
Layer = use("lora_layer.LoRALinear")

# %% [markdown]
# ### What goes wrong, met on purpose
#
# It pays to read these errors before you meet them. The reference refuses these when the layer is
# built:

# %%
from peft_teach import LoRALinear as Reference

attempts = {
    "r = 0": lambda: Reference(nn.Linear(6, 5), r=0),
    "dropout = 1": lambda: Reference(nn.Linear(6, 5), lora_dropout=1.0),
    "not a linear layer": lambda: Reference(nn.LayerNorm(6)),
    "wrapped twice": lambda: Reference(Reference(nn.Linear(6, 5), r=2), r=2),
}
for what, attempt in attempts.items():
    try:
        attempt()
    except (TypeError, ValueError) as error:
        print(f"{what}: {type(error).__name__}\n    {error}")

# %% [markdown]
# And these are not refused. A rank above what the layer can hold is allowed, with a warning; `peft`
# takes it without a word. Merging twice is silent here, and a warning in `peft`:

# %%
def warnings_of(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


ours, theirs = Reference(nn.Linear(6, 5), r=2, lora_alpha=3), peft_around(nn.Linear(6, 5), r=2, lora_alpha=3)
print("r = 7 over 6 × 5, here:   ", warnings_of(lambda: Reference(nn.Linear(6, 5), r=7)))
print("r = 7 over 6 × 5, in peft:", warnings_of(lambda: peft_around(nn.Linear(6, 5), r=7, lora_alpha=3)))
print("merged twice, here:       ", warnings_of(lambda: (ours.merge(), ours.merge())))
print("merged twice, in peft:    ", warnings_of(lambda: (theirs.merge(), theirs.merge())))

# %% [markdown]
# Over a half-precision layer, $A$ and $B$ are float32 and the output stays in 16 bits:

# %%
half = Reference(nn.Linear(6, 5).bfloat16(), r=2, lora_alpha=3)
print("base", half.linear.weight.dtype, "· A", half.lora_A.dtype, "· output", half(torch.randn(1, 6).bfloat16()).dtype)

# %% [markdown]
# ### What merging costs in 16 bits
#
# Merged, a layer is one product again. In float32 the output is the same up to rounding: that is what
# the check compared. In bfloat16, $W + \Delta W$ has to fit into 16 bits. Guess first: by what share of the largest output
# will the merged layer be off? And does subtracting ΔW again bring $W$ back?

# %%
torch.manual_seed(0)
half = Reference(nn.Linear(256, 192).bfloat16(), r=4, lora_alpha=6).eval()
nn.init.normal_(half.lora_B, std=0.1)
x, W = torch.randn(8, 256).bfloat16(), half.linear.weight.detach().clone()
apart = half(x)
half.merge()
measured("merged minus unmerged output, as a share of the largest output", (half(x) - apart).abs().max() / apart.abs().max(), expect=0.007, tol=0.7)
subtracted = half.linear.weight - half.delta_weight()
measured("error left in W after adding and subtracting, as a share of the largest weight", (subtracted.bfloat16() - W).abs().max() / W.abs().max(), expect=0.004, tol=0.9)
half.unmerge()
print("W after unmerge() from a copy is exactly the old one:", torch.equal(half.linear.weight, W))

# %% [markdown]
# Under one percent on one layer. Through all thirty of SmolLM2 it is 2.6 % of the largest logit
# (the package's `tests/lora/test_smollm2.py` measures it). And what was rounded off does not come back by
# subtracting, which is why the reference keeps a copy of the weight while it is merged.
#
# ## 6 · A test that is worth something
#
# ### Exercise: `merge_changes_nothing`
# {{lora_layer.merge_changes_nothing}} · *optional*
#
# Now you write the check. Your function gets a layer, perhaps a wrong one, and answers whether
# merging leaves its output as it was: after `merge()`, after a *second* `merge()`, and after
# `unmerge()`. It is run on right layers, which it must let pass, and on wrong ones, which it must
# catch. Some are fresh (B = 0), some are in training mode with dropout.

# %% key="lora_layer.merge_changes_nothing" role="answer"
# source: peft_teach.course.answers.lora_layer: merge_changes_nothing

# %% key="lora_layer.merge_changes_nothing" role="check"
check("lora_layer.merge_changes_nothing", merge_changes_nothing)

# %% [markdown]
# ## 7 · What rank means: the planted rank
#
# A target matrix is made of four directions, with strengths 4, 2, 1 and 0.5. LoRA has to find it,
# starting from a weight of zeros, with r = 1, 2, 3, 4 and 8. The best that a matrix of rank r can do
# is to take the r strongest directions (Eckart and Young, chapter 02) and leave the rest: the error
# is then the sum of the squares of what is left. For r = 1 that is 2² + 1² + 0.5² = 5.25.
#
# Does training find it?

# %%
torch.manual_seed(0)
U, _ = torch.linalg.qr(torch.randn(32, 4))
V, _ = torch.linalg.qr(torch.randn(48, 4))
strengths = torch.tensor([4.0, 2.0, 1.0, 0.5])
target = U @ torch.diag(strengths) @ V.T  # (out, in) = (32, 48)
x = math.sqrt(512) * torch.linalg.qr(torch.randn(512, 48))[0].view(8, 64, 48)  # whitened: xᵀx = 512 · 1


def find_target(r: int, steps: int) -> list[float]:
    """The squared error at each step, of LoRA with rank r around a weight of zeros."""
    torch.manual_seed(r)
    base = nn.Linear(48, 32, bias=False)
    nn.init.zeros_(base.weight)
    layer = Layer(base, r=r, lora_alpha=1.5 * r)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = ((layer(x) - x @ target.T) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {r: find_target(r, steps=budget(600, 5)) for r in (1, 2, 3, 4, 8)}

# %% role="figure"
tails = {r: (strengths[r:] ** 2).sum().item() for r in curves}
figure, axes = plt.subplots(figsize=(7, 4))
for (r, losses), style, marker in zip(curves.items(), ("-", "--", "-.", ":", "-"), ("", "", "", "", "o")):
    axes.semilogy(losses, linestyle=style, marker=marker, markevery=40, markersize=4, color="black", label=f"r = {r}")
    if tails[r]:
        axes.axhline(tails[r], color="0.6", linewidth=0.8, linestyle=(0, (2, 4)), zorder=0)
        axes.annotate(f"tail after {r}: {tails[r]:g}", (len(losses), tails[r]), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8)
axes.set(xlabel="training step", ylabel="squared error (log)", title="LoRA lands on what its rank can reach", ylim=(1e-4, 60))
axes.legend()
fact = "\n".join(f"r = {r}: error {losses[-1]:.2f}, best possible {tails[r]:.2f}" for r, losses in curves.items())
show(figure, alt="Squared error against training step for five ranks. Ranks 1, 2 and 3 each level off on the dotted "
     "grey line of their tail, 5.25, 1.25 and 0.25; ranks 4 and 8 fall on towards zero.", fact=fact)

# %% [markdown]
# With r = 1, 2 and 3 each curve lands on its line; with 4 and 8 nothing is left. Four directions need
# r = 4; r = 8 costs twice the numbers, and all it gains is getting there in fewer steps. Real weight
# changes are not made of four directions; how far low rank carries there is the question of chapter 02.
#
# ## 8 · Equal to the real thing
#
# Your layer and `peft`'s, with the same numbers in them:

# %%
torch.manual_seed(0)
linear = nn.Linear(576, 192)
x = torch.randn(4, 7, 576)
theirs = peft_around(nn.Linear(576, 192), r=8, lora_alpha=12)
theirs.base_layer.load_state_dict(linear.state_dict())
mine = Layer(linear, r=8, lora_alpha=12).eval()
with torch.no_grad():
    mine.lora_A.copy_(theirs.lora_A["default"].weight)
    mine.lora_B.copy_(theirs.lora_B["default"].weight)
difference = (mine(x) - theirs(x)).abs().max().item()
print(f"{whose(Layer)}: largest difference from peft {difference:.1e}, equal up to rounding: {difference < 1e-5}")

# %% [markdown]
# Now into a real model: SmolLM2-135M, thirty layers, with LoRA beside every `q_proj` and `v_proj`.
# (Chapter 04 makes a careful function of this loop.)

# %%
from peft_teach import models
from peft_teach.data import python_docs

model, tokenizer = models.load("smollm2-135m", device=device)


def put_lora(model: nn.Module, layer, r: int, lora_alpha: float) -> nn.Module:
    """Freeze everything, then put the layer around q_proj and v_proj, everywhere."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, layer(getattr(block.self_attn, name), r=r, lora_alpha=lora_alpha).to(device))
    return model


total = sum(p.numel() for p in model.parameters())
put_lora(model, Layer, r=8, lora_alpha=12)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{trained:,} of {total:,} parameters are trained")
reveal("lora_layer.trained_percent", round(100 * trained / total, 2), close=0.3)

# %% [markdown]
# A third of a percent. Next the same with `peft`, on a fresh copy of the model, with the same random
# $A$, and $B$ drawn too, so that there is something to compare.

# %%
theirs, _ = models.load("smollm2-135m", device=device)
theirs = get_peft_model(theirs, LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=12)).eval()
pairs = [
    (getattr(mine.self_attn, name), getattr(block.self_attn, name))
    for mine, block in zip(model.model.layers, theirs.base_model.model.model.layers)
    for name in ("q_proj", "v_proj")
]


@torch.no_grad()
def same_start(std: float) -> None:
    """Give both models the same A and B."""
    generator = torch.Generator().manual_seed(0)
    for mine, other in pairs:
        for factor, to, scale in ((mine.lora_A, other.lora_A, 0.05), (mine.lora_B, other.lora_B, std)):
            factor.copy_(torch.randn(factor.shape, generator=generator) * scale)
            to["default"].weight.copy_(factor)


same_start(std=0.05)
model.eval()
ids = python_docs(tokenizer, "train", block=32)[: budget(20, 2)].to(device)
with torch.no_grad():
    ours, other = model(ids[:2]).logits, theirs(ids[:2]).logits
difference = ((ours - other).abs().max() / other.abs().max()).item()
print(f"logits {tuple(ours.shape)}, {whose(Layer)} against peft: largest difference {difference:.1e} of the largest logit")
print("equal up to rounding:", difference < 1e-4)

# %% [markdown]
# And training. Ten steps on the Python documentation, both models from the same start, on the same
# text. Were a gradient wrong, the losses would part.

# %%
def train(model: nn.Module, blocks: Tensor) -> list[float]:
    """The loss at each step of AdamW, two blocks of text a step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for batch in blocks.split(2):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


same_start(std=0.0)
theirs_losses = train(theirs, ids)
del theirs
prompt = tokenizer("The with statement in Python is used to", return_tensors="pt").to(device)
text_before = tokenizer.decode(model.generate(**prompt, max_new_tokens=budget(30, 2), do_sample=False)[0])
our_losses = train(model, ids)
text_after = tokenizer.decode(model.generate(**prompt, max_new_tokens=budget(30, 2), do_sample=False)[0])
gap = max(abs(a - b) for a, b in zip(our_losses, theirs_losses))
print(f"{len(our_losses)} steps with {whose(Layer)}, largest difference of the two losses: {gap:.1e}, equal up to rounding: {gap < 1e-3}")
measured("loss at the first step", our_losses[0], expect=4.4, tol=0.25)
measured("loss at the last step", our_losses[-1], expect=3.5, tol=0.25)

# %% [markdown]
# The two losses are equal at each of the ten steps. If it says "your own" above, what you wrote *is*
# LoRA as `peft` has it. And what does the model say, before and after?

# %% tags=["nbval-ignore-output"]
# Not compared by nbval: which word comes next can hang on the last bit of a logit, and so on the machine.
print("before:", text_before, "\n\nafter: ", text_after)

# %% [markdown]
# The text has changed, so the ten steps did something, but it isn't better. Chapter 04 trains until it
# is.
#
# ## 9 · The trap gallery · *optional*
#
# Wrong layers of the kind that people write. Each was run just now; open one after you have guessed
# what would show it.

# %% role="optional"
gallery("lora_layer.add_update", "lora_layer.LoRALinear")

# %% [markdown]
# ## 10 · Three questions · *optional*

# %% role="optional"
quiz("lora_layer.1")  # then quiz("lora_layer.1", "a"), or another letter

# %% role="optional"
quiz("lora_layer.2")

# %% role="optional"
quiz("lora_layer.3")

# %% [markdown]
# ## 11 · What people say, and what you saw

# %%
claims("03_lora_layer")

# %% [markdown]
# ## 12 · Where this lives in `peft`
#
# | here | in `peft` 0.21.2, under `peft/tuners/lora/layer.py` |
# |---|---|
# | `LoRALinear` | `class Linear`: its `forward` is the same sum, its `merge` adds to `weight.data` |
# | `init_lora_` | `LoraLayer.reset_lora_parameters` |
# | `scaling` | `LoraLayer.update_layer`, with `use_rslora` |
# | `delta_weight` | `Linear.get_delta_weight` |
#
# That file has 2,766 lines; you now know what the inner two hundred do. What its users stumble over:
# `r` and `lora_alpha` are both 8 by default, so the scaling is 1 and a missing one goes unnoticed;
# layers are made in training mode, even inside a model in eval mode, so call `.eval()` afterwards;
# and `get_peft_model` changes the model that it is given.
#
# **Bonus.** Let your `LoRALinear` take a `Conv1D`, and run the check again. Then write a layer with
# one rank for each attention head: what becomes of α/r?

# %%
progress()
