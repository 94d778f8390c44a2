"""Right answers that are not the reference's: the checks have to pass every one of them."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def scale(lora_alpha, r, use_rslora):
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class Base(nn.Module):
    """What the variants below share; each changes one thing in a way that is allowed."""

    def __init__(self, linear, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False):
        super().__init__()
        self.linear = linear
        for parameter in linear.parameters():
            parameter.requires_grad = False
        self.scaling = scale(lora_alpha, r, use_rslora)
        self.p = lora_dropout
        self.merged = False
        self.start(r, linear.in_features, linear.out_features)

    def start(self, r, in_features, out_features):
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta_weight(self):
        return self.scaling * self.lora_B @ self.lora_A

    def forward(self, x):
        if self.merged:
            return self.linear(x)
        return self.linear(x) + F.dropout(x, self.p, self.training) @ self.lora_A.T @ self.lora_B.T * self.scaling

    def merge(self):
        if not self.merged:
            self.linear.weight.data += self.delta_weight().detach()
            self.merged = True

    def unmerge(self):
        if self.merged:
            self.linear.weight.data -= self.delta_weight().detach()
            self.merged = False


class BackupFree(Base):
    pass


class ScaleFirst(Base):
    def forward(self, x):
        y = self.linear(x)
        if not self.merged:
            y = y + F.linear(F.linear(self.scaling * F.dropout(x, self.p, self.training), self.lora_A), self.lora_B)
        return y


class Einsum(Base):
    def forward(self, x):
        if self.merged:
            return self.linear(x)
        x_dropped = nn.functional.dropout(x, p=self.p, training=self.training)
        update = torch.einsum("bsi,ri,or->bso", x_dropped, self.lora_A, self.lora_B)
        return self.linear(x) + self.scaling * update


class MergedWeightForward(Base):
    def forward(self, x):
        if self.merged:
            return self.linear(x)
        if self.p == 0 or not self.training:
            return F.linear(x, self.linear.weight + self.delta_weight(), self.linear.bias)
        return super().forward(x)


class LinearPair(Base):
    """The factors inside two nn.Linear, the way peft has them."""

    def start(self, r, in_features, out_features):
        self.down = nn.Linear(in_features, r, bias=False)
        self.up = nn.Linear(r, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    lora_A = property(lambda self: self.down.weight)
    lora_B = property(lambda self: self.up.weight)

    def forward(self, x):
        if self.merged:
            return self.linear(x)
        return self.linear(x) + self.up(self.down(F.dropout(x, self.p, self.training))) * self.scaling


class Transposed(Base):
    """A kept as (in, r): a property shows it the other way round."""

    def start(self, r, in_features, out_features):
        self.down = nn.Parameter(torch.empty(in_features, r).uniform_(-1, 1) / math.sqrt(in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))

    lora_A = property(lambda self: self.down.T)


class UniformInit(Base):
    def start(self, r, in_features, out_features):
        bound = 1 / in_features**0.5
        self.lora_A = nn.Parameter((torch.rand(r, in_features) * 2 - 1) * bound)
        self.lora_B = nn.Parameter(torch.zeros((out_features, r)))


class MergedAsProperty(Base):
    """A copy is kept, and whether there is one is what merged says."""

    def __init__(self, *args, **kwargs):
        self.kept = None
        super().__init__(*args, **kwargs)
        self.kept = None

    merged = property(lambda self: self.kept is not None, lambda self, value: None)

    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.data
            self.linear.weight.data = self.kept + self.delta_weight().data

    def unmerge(self):
        if self.kept is not None:
            self.linear.weight.data, self.kept = self.kept, None


class DropoutModule(Base):
    def __init__(self, linear, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, **kwargs):
        super().__init__(linear, r, lora_alpha, lora_dropout, use_rslora)
        self.drop = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()

    def forward(self, x, *args, **kwargs):
        out = self.linear(x, *args, **kwargs)
        return out if self.merged else out + self.scaling * (self.drop(x) @ self.lora_A.t()) @ self.lora_B.t()


def delta_outer(A, B, lora_alpha, r, use_rslora=False):
    total = 0
    for i in range(A.shape[0]):
        total = total + torch.outer(B[:, i], A[i])
    return total * scale(lora_alpha, r, use_rslora)


def delta_scale_A(A, B, lora_alpha, r, use_rslora=False):
    return B.matmul(scale(lora_alpha, r, use_rslora) * A)


def init_uniform(A, B):
    bound = A.size(1) ** -0.5
    with torch.no_grad():
        A.uniform_(-bound, bound)
        B.fill_(0)


def init_data(A, B):
    A.data = (torch.rand_like(A) - 0.5) * 2 / A.shape[-1] ** 0.5
    B.data.zero_()


def add_transposed(y, x, A, B, scaling):
    return (y.float() + scaling * (x.float() @ A.T @ B.T)).to(y.dtype)


def add_delta(y, x, A, B, scaling):
    return (y.to(A.dtype) + x.to(A.dtype) @ (scaling * B @ A).T).type_as(y)


class PlainLayer(nn.Module):
    def __init__(self, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False):
        super().__init__()
        self.scaling = scale(lora_alpha, r, use_rslora)
        self.drop = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.randn(r, in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, r))
        init_uniform(self.lora_A, self.lora_B)

    def delta_weight(self):
        return self.lora_B @ self.lora_A * self.scaling

    def forward(self, x):
        return self.drop(x) @ self.lora_A.T @ self.lora_B.T * self.scaling


def merge_by_allclose(layer, x):
    layer.eval()
    B = layer.get("lora_B")
    layer.put("lora_B", torch.ones_like(B) + 0.1 * torch.randn_like(B))
    outputs = [layer(x)]
    for name in ("merge", "merge", "unmerge", "unmerge"):
        getattr(layer, name)()
        outputs.append(layer(x))
    scale = outputs[0].abs().mean()
    return all(torch.allclose(outputs[0], other, rtol=0, atol=float(1e-4 * scale)) for other in outputs)


def merge_relative_norm(layer, x):
    layer.train(False)
    layer.put("lora_B", torch.rand(layer.get("lora_B").shape))
    first = layer(x)
    layer.merge()
    second = layer(x)
    layer.merge()
    third = layer(x)
    layer.unmerge()
    fourth = layer(x)
    far = lambda a: ((a - first).norm() / first.norm()).item()  # noqa: E731
    return max(far(second), far(third), far(fourth)) < 1e-5


ANSWERS = {
    "lora_layer.delta_weight": [delta_outer, delta_scale_A],
    "lora_layer.init_lora_": [init_uniform, init_data],
    "lora_layer.add_update": [add_transposed, add_delta],
    "lora_layer.LoRALayer": [PlainLayer],
    "lora_layer.LoRALinear": [BackupFree, ScaleFirst, Einsum, MergedWeightForward, LinearPair, Transposed, UniformInit,
                              MergedAsProperty, DropoutModule],
    "lora_layer.merge_changes_nothing": [merge_by_allclose, merge_relative_norm],
}
