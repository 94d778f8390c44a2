"""What crosses the codec comes out as it went in; what can't cross is refused; no message does harm."""

import json
import math
import pickle
import struct

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from peft_teach.course import codec
from peft_teach.course.codec import CodecError, LinearSpec, Opaque, Ref, Remote, decode, encode

fast = settings(deadline=None, max_examples=60, database=None, derandomize=True)

# ---------------------------------------------------------------- what may cross

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(FLOATS + OTHERS))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = (torch.randn(shape, generator=generator) * 50).to(dtype)
    layout = draw(st.sampled_from(("as it is", "transposed", "every second one")))
    if tensor.dim() and layout == "transposed":
        tensor = tensor.transpose(0, -1)
    if tensor.dim() and layout == "every second one":
        tensor = tensor[::2]
    return tensor.requires_grad_(draw(st.booleans())) if dtype in FLOATS else tensor


plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
tagged = (
    st.sampled_from(FLOATS + OTHERS)
    | st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)])
    | st.builds(Ref, st.integers(0, 99))
    | st.builds(Opaque, st.text(max_size=8))
    | st.builds(LinearSpec, tensors(), st.none() | tensors(), st.sampled_from(("Linear", "Conv1D")))
)
values = st.recursive(
    plain | tagged | tensors(),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=4) | st.just("$"), inner, max_size=3),
    max_leaves=8,
)


def same(a, b):
    """Equal in type and value, all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad and a.device == b.device
        return equal and torch.equal(a.detach().nan_to_num(nan=7.0), b.detach().nan_to_num(nan=7.0))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, LinearSpec):
        return a.kind == b.kind and same(a.weight, b.weight) and same(a.bias, b.bias)
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


@fast
@given(values)
@example(math.nan)
@example([math.inf, -math.inf, -0.0])
@example({"$": "tensor", "name": "0"})  # a learner's dict that looks like a tag of ours
@example([torch.tensor(3.5), torch.empty(0, 4), torch.zeros(2, 3).T, torch.tensor(math.nan)])
@example(torch.ones(2, dtype=torch.complex64, requires_grad=True))
def test_what_may_cross_comes_out_as_it_went_in(value):
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_every_dtype_bit_for_bit(dtype, device):
    tensor = (torch.arange(12).reshape(3, 4) * 1.37).to(dtype).to(device)
    out = decode(encode(tensor))
    assert out.dtype == dtype and out.device.type == device.type
    assert torch.equal(out.view(torch.uint8), tensor.view(torch.uint8))


def test_a_copy_crosses_not_the_tensor_itself():
    tensor = torch.zeros(3, requires_grad=True)
    out = decode(encode(tensor))
    out.data.fill_(5)
    assert tensor.tolist() == [0, 0, 0]
    parameter = decode(encode(nn.Parameter(torch.ones(2))))
    assert type(parameter) is torch.Tensor and parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("value, expected", [
    (numpy.float64(0.1), 0.1), (numpy.float32(0.5), 0.5), (numpy.int64(-3), -3), (numpy.uint8(7), 7),
    (numpy.bool_(True), True), (numpy.str_("α"), "α"), (numpy.array(2.5), 2.5), (torch.Size([2, 3]), (2, 3)),
])
def test_numpy_scalars_and_sizes_become_plain(value, expected):
    out = decode(encode(value))
    assert type(out) is type(expected) and out == expected


@pytest.mark.parametrize("kind, shape, has_bias", [("Linear", (5, 4), True), ("Linear", (5, 4), False), ("Conv1D", (4, 5), True)])
def test_a_described_layer_is_built_with_these_very_numbers(kind, shape, has_bias):
    weight, bias, x = torch.randn(shape), torch.randn(5) if has_bias else None, torch.randn(2, 3, 4)
    layer = decode(encode(LinearSpec(weight, bias, kind))).build()
    assert type(layer).__name__ == kind and layer.weight.requires_grad
    expected = nn.functional.linear(x, weight if kind == "Linear" else weight.T, bias)
    torch.testing.assert_close(layer(x), expected)
    layer.weight.data.zero_()
    assert weight.abs().sum() > 0  # the description keeps its own


def test_a_layer_of_unknown_kind_is_refused():
    with pytest.raises(CodecError, match="Conv3D"):
        LinearSpec(torch.zeros(2, 2), kind="Conv3D").build()


def test_an_object_that_stays_here_is_numbered_and_gets_a_stand_in():
    message = encode([Remote("the object", ("merge",))], expose=lambda remote: 7)
    assert decode(message, lambda number, methods: (number, methods)) == [(7, ["merge"])]
    with pytest.raises(CodecError):  # from a side that has nothing to hand out
        decode(message)


# ---------------------------------------------------------------- what may not

UNFIT = {
    "object": object(), "function": len, "module": nn.Linear(2, 2), "set": {1}, "bytes": b"x", "ellipsis": ...,
    "dict with numbers as keys": {1: 2}, "generator": (i for i in ()), "complex": 1j, "array": numpy.zeros(2),
    "date": numpy.datetime64("2020-01-01"), "long double": numpy.longdouble(1), "huge number": 10**5000,
    "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(2, device="meta"), "complex128": torch.zeros(2, dtype=torch.complex128),
    "remote without a channel": Remote("x"),
}


@pytest.mark.parametrize("value", UNFIT.values(), ids=UNFIT.keys())
def test_what_may_not_cross_is_refused_or_stands_as_its_type(value):
    with pytest.raises(CodecError, match="can't cross"):
        encode({"deep": [value]})
    assert decode(encode([1, value], strict=False)) == [1, Opaque(type(value).__name__)]


def test_too_deep_and_endless_values_are_refused():
    endless = []
    endless.append(endless)
    for strict in (True, False):
        with pytest.raises(CodecError, match="deep"):
            encode(endless, strict=strict)
    nested = []
    for _ in range(codec.MAX_DEPTH - 1):
        nested = [nested]
    assert decode(encode(nested)) == nested


def test_too_large_is_refused_on_both_sides(monkeypatch):
    message = encode(torch.zeros(100))
    monkeypatch.setattr(codec, "MAX_BYTES", len(message) - 1)
    with pytest.raises(CodecError, match="above the limit"):
        encode(torch.zeros(100))
    with pytest.raises(CodecError, match="above the limit"):
        decode(message)


# ---------------------------------------------------------------- messages that are not ours


def framed(tree, body=b""):
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + body


GARBLED = {
    "nothing": b"",
    "half a length": b"\x01\x00",
    "a length beyond the end": struct.pack("<Q", 2**63) + b"1",
    "no JSON": framed(b"{"),
    "not UTF-8": framed(b'"\xff"'),
    "a number of too many digits": framed(b"9" * 5000),
    "JSON nested deep": framed(b"[" * 100_000 + b"]" * 100_000),
    "nested too deep for us": framed(b"[" * 100 + b"]" * 100),
    "no safetensors": framed(None, b"rubbish"),
    "unknown tag": framed({"$": "module"}),
    "a dict without a tag": framed({"a": 1}),
    "a tag that is a list": framed({"$": [1]}),
    "a tensor that is not there": framed({"$": "tensor", "name": "0", "grad": False, "device": "cpu"}),
    "tuple without items": framed({"$": "tuple"}),
    "tuple of a number": framed({"$": "tuple", "items": 3}),
    "dict of a list": framed({"$": "dict", "items": [1]}),
    "a dtype that is a function": framed({"$": "dtype", "name": "load"}),
    "a dtype without a name": framed({"$": "dtype", "name": 3}),
    "unknown device": framed({"$": "device", "name": "toaster"}),
    "a remote, unasked": framed({"$": "remote", "id": 0, "methods": []}),
}


@pytest.mark.parametrize("message", GARBLED.values(), ids=GARBLED.keys())
def test_a_garbled_message_is_a_codec_error(message):
    with pytest.raises(CodecError):
        decode(message)


@pytest.mark.parametrize("grad, name", [(True, "cpu"), (False, "meta"), (False, "toaster"), (False, None)])
def test_a_tensor_that_asks_for_what_it_can_not_be(grad, name):
    message = encode(torch.arange(3))
    (length,) = struct.unpack("<Q", message[:8])
    tree = json.loads(message[8 : 8 + length]) | {"grad": grad, "device": name}
    with pytest.raises(CodecError):
        decode(framed(tree, message[8 + length :]))


def decodes_or_refuses(message):
    try:
        decode(message, lambda number, methods: None)
    except CodecError:
        pass


@fast
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(text, body):
    decodes_or_refuses(text)
    decodes_or_refuses(framed(text, body))


WHOLE = encode(
    [torch.ones(3, 2), {"k": (1, torch.float32, torch.device("cpu"), Ref(3))}, LinearSpec(torch.ones(2, 2)), Opaque("x"), Remote(0, ("m",))],
    expose=lambda remote: 0,
)


@settings(fast, max_examples=200)
@given(st.data())
def test_a_message_changed_in_places_never_raises_anything_else(data):
    message = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(message))


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries(
        {"$": st.sampled_from(("tensor", "tuple", "dict", "dtype", "device", "ref", "opaque", "linear", "remote"))},
        optional={k: inner for k in ("name", "items", "id", "type", "kind", "weight", "bias", "grad", "device", "methods")},
    ),
    max_leaves=6,
)


@settings(fast, max_examples=200)
@given(json_trees)
def test_well_formed_nonsense_never_raises_anything_else(tree):
    decodes_or_refuses(framed(tree))


def test_every_truncation_is_refused():
    for length in range(len(WHOLE)):
        with pytest.raises(CodecError):
            decode(WHOLE[:length], lambda number, methods: None)


class Bomb:
    """Does what no message may: unpickled, it calls a function."""

    went_off = False

    def __reduce__(self):
        return setattr, (Bomb, "went_off", True)


def test_decoding_never_unpickles():
    pickled = pickle.dumps(Bomb())
    for message in (pickled, framed(pickled), framed(None, pickled), framed(json.dumps(pickled.decode("latin-1")).encode())):
        decodes_or_refuses(message)
    assert not Bomb.went_off
    pickle.loads(pickled)
    assert Bomb.went_off  # it would have
