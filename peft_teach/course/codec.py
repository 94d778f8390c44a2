"""What crosses between a check and the code that it checks: tensors and plain data, never pickle.

One message is a JSON text and the safetensors that it points into:

    8 bytes, length of the JSON · JSON · safetensors

The same codec stands between a check and a class in the same notebook, so that a value is the same
there and in grading, where a pipe lies between the two.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Callable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

MAX_BYTES = 256 * 2**20  # a message above this is refused: 256 MiB
MAX_DEPTH = 32
MAX_BITS = 4096  # of a whole number
DTYPES = frozenset({  # those that safetensors writes and reads; a tensor of another one can't cross
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
})


class CodecError(ValueError):
    """A value can't cross, or a message is not one of ours."""


@dataclass(frozen=True)
class Ref:
    """An object that stays on the other side, by its number."""

    id: int


@dataclass(frozen=True)
class Remote:
    """An object that stays on this side and that the other side may use through a stand-in."""

    object: Any
    methods: tuple[str, ...] = ()  # what may be called on it by name


@dataclass(frozen=True)
class Opaque:
    """Stands for a result that can't cross: what type it had."""

    type: str


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer described by its kind and tensors; it is built where it is used.

    kind: "Linear" with weight (out, in), or transformers' "Conv1D" with weight (in, out).
    """

    weight: Tensor
    bias: Tensor | None = None
    kind: str = "Linear"

    def build(self) -> nn.Module:
        """The layer itself, with copies of the tensors."""
        if self.kind == "Linear":
            out_features, in_features = self.weight.shape
            layer = nn.Linear(in_features, out_features, bias=self.bias is not None)
        elif self.kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            in_features, out_features = self.weight.shape
            layer = Conv1D(out_features, in_features)
        else:
            raise CodecError(f"unknown kind of layer {self.kind!r}")
        layer.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer


def encode(value: Any, expose: Callable[[Remote], int] | None = None, strict: bool = True) -> bytes:
    """The bytes of a message. `expose` numbers the objects in Remote; not strict: the rest is Opaque."""
    tensors: dict[str, Tensor] = {}

    def walk(v, depth):
        if depth > MAX_DEPTH:
            raise CodecError(f"nested more than {MAX_DEPTH} deep")
        if v is None or isinstance(v, (bool, float, str)) or isinstance(v, int) and v.bit_length() <= MAX_BITS:
            return v
        if isinstance(v, Tensor) and v.layout == torch.strided and v.dtype in DTYPES and v.device.type in ("cpu", "cuda"):
            name = str(len(tensors))
            tensors[name] = v.detach().to("cpu", copy=True).contiguous()
            return {"$": "tensor", "name": name, "grad": v.requires_grad, "device": str(v.device)}
        if isinstance(v, list):
            return [walk(item, depth + 1) for item in v]
        if isinstance(v, (tuple, torch.Size)):
            return {"$": "tuple", "items": [walk(item, depth + 1) for item in v]}
        if isinstance(v, dict) and all(isinstance(k, str) for k in v):
            return {"$": "dict", "items": {k: walk(item, depth + 1) for k, item in v.items()}}
        if isinstance(v, torch.dtype):
            return {"$": "dtype", "name": str(v).removeprefix("torch.")}
        if isinstance(v, torch.device):
            return {"$": "device", "name": str(v)}
        if isinstance(v, Ref):
            return {"$": "ref", "id": v.id}
        if isinstance(v, Opaque):
            return {"$": "opaque", "type": v.type}
        if isinstance(v, LinearSpec):
            fields = {"weight": v.weight, "bias": v.bias}
            return {"$": "linear", "kind": v.kind} | {k: walk(t, depth + 1) for k, t in fields.items()}
        if isinstance(v, Remote) and expose is not None:
            return {"$": "remote", "id": expose(v), "methods": list(v.methods)}
        if type(v).__module__ == "numpy" and getattr(v, "ndim", 1) == 0 and isinstance(v.item(), (bool, int, float, str)):
            return walk(v.item(), depth + 1)
        if strict:
            raise CodecError(f"a {type(v).__name__} can't cross: tensors and plain data only")
        return {"$": "opaque", "type": type(v).__name__}

    text = json.dumps(walk(value, 0)).encode()
    message = struct.pack("<Q", len(text)) + text + (save(tensors) if tensors else b"")
    if len(message) > MAX_BYTES:
        raise CodecError(f"a message of {len(message)} bytes is above the limit of {MAX_BYTES}")
    return message


def decode(message: bytes, stand_in: Callable[[int, list[str]], Any] | None = None) -> Any:
    """The value of a message; `stand_in` makes what a Remote becomes. CodecError for all else."""
    if len(message) > MAX_BYTES:
        raise CodecError(f"a message of {len(message)} bytes is above the limit of {MAX_BYTES}")
    try:
        (length,) = struct.unpack("<Q", message[:8])
        if length > len(message) - 8:
            raise EOFError(f"it ends before its {length} bytes of text do")
        tree = json.loads(message[8 : 8 + length])
        body = message[8 + length :]
        tensors = load(body) if body else {}
    except Exception as error:
        raise CodecError(f"not a message of ours: {error}") from None

    def walk(v, depth=0):
        if depth > 2 * MAX_DEPTH:
            raise CodecError("nested too deep")
        if isinstance(v, list):
            return [walk(item, depth + 1) for item in v]
        if not isinstance(v, dict):
            return v
        tag = v.get("$")
        if tag == "tensor":
            tensor = tensors[v["name"]]
            if v["device"] != "cpu":
                if torch.device(v["device"]).type != "cuda":
                    raise CodecError(f"a tensor on {v['device']!r} can't cross")
                tensor = tensor.to(v["device"])
            return tensor.requires_grad_() if v["grad"] else tensor
        if tag == "tuple":
            return tuple(walk(item, depth + 1) for item in v["items"])
        if tag == "dict":
            return {k: walk(item, depth + 1) for k, item in v["items"].items()}
        if tag == "dtype" and isinstance(getattr(torch, v["name"], None), torch.dtype):
            return getattr(torch, v["name"])
        if tag == "device":
            return torch.device(v["name"])
        if tag == "ref":
            return Ref(v["id"])
        if tag == "opaque":
            return Opaque(str(v["type"]))
        if tag == "linear":
            return LinearSpec(walk(v["weight"], depth + 1), walk(v["bias"], depth + 1), v["kind"])
        if tag == "remote" and stand_in is not None:
            return stand_in(v["id"], v["methods"])
        raise CodecError(f"unknown tag {tag!r}")

    try:
        return walk(tree)
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"not a message of ours: {error}") from None
