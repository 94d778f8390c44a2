"""peft_teach.lora.inject against peft: the same layers found, and the same bits from the whole model.

Over tiny-llama (grouped queries), tiny-gpt2 (Conv1D) and tiny-bert, padded left and right: forward,
gradients, ten AdamW steps in float64 and merged weights have peft's bits; no exception met on a CPU.
Merged against unmerged can only be near: as a share of the largest output, the largest met was

    float64  9.9e-15    float32  3.0e-6    SmolLM2, all-linear, float32  1.8e-6
"""

import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
from few import few
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peft_teach
from peft_teach.lora.inject import (
    ParameterCount,
    apply_lora_to_model,
    count_parameters,
    find_targets,
    merge_lora,
    unmerge_lora,
    wrapped_layers,
)
from peft_teach.lora.layer import LoRALinear
from peft_teach.models import load

LORA = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "use_rslora": False}  # 7/3 and 7/√3: no power of two
NAMES = ["tiny-llama", "tiny-gpt2", "tiny-bert"]
LAST_NAMES = {
    "tiny-llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "tiny-gpt2": ["c_attn", "c_fc", "c_proj"],
    "tiny-bert": ["query", "key", "value", "dense"],
}
USUAL = {"tiny-llama": ["q_proj", "v_proj"], "tiny-gpt2": ["c_attn", "c_proj"], "tiny-bert": ["query", "value", "dense"]}
LIMIT = {torch.float64: 1e-13, torch.float32: 1e-5}  # merged against unmerged, whole model
MEASURED = {}

each_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def print_what_was_measured():
    yield
    for what, share in sorted(MEASURED.items(), key=str):
        print(f"\n{what}: {share:.2g}", end="")


# ------------------------------------------------------------------------------- models and batches


@functools.cache
def original(name):
    return load(name)[0]


def new_model(name, dtype=torch.float32, device="cpu"):
    model = copy.deepcopy(original(name)).to(device, dtype)
    if dtype == torch.float64:
        # The plain attention of Llama takes its softmax in float32 even here: the mask's lowest float64
        # overflows to -inf, the padded rows on the left become nan, and in the next layer 0 · nan everything.
        model.set_attn_implementation("sdpa")
    return model


def with_peft(model, target_modules, exclude_modules=None, task_type=None, **lora):
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        task_type=task_type,
        fan_in_fan_out=conv,
        **(LORA | lora),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, and of excludes that match nothing
        return get_peft_model(model, config)


def peft_layers(model):
    """{name in the bare model: peft's layer}"""
    inner = model.base_model.model
    return {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


def factors(layer):
    if isinstance(layer, BaseTunerLayer):
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.lora_A, layer.lora_B


@torch.no_grad()
def fill(layers, seed=0):
    """Draw each A and B (B ≠ 0), by name."""
    draws = torch.Generator().manual_seed(seed)
    for name in sorted(layers):
        for factor in factors(layers[name]):
            factor.copy_(0.2 * torch.randn(factor.shape, generator=draws))


def both(name, dtype, device, target_modules, seed=0, **lora):
    """[(model, its layers)] of ours and of peft's, with the same A and B."""
    ours = apply_lora_to_model(new_model(name, dtype, device), target_modules, **(LORA | lora))
    theirs = with_peft(new_model(name, dtype, device), target_modules, **lora)
    pairs = [(ours, wrapped_layers(ours)), (theirs, peft_layers(theirs))]
    for _, layers in pairs:
        fill(layers, seed)
    return pairs


def new_batch(device, padding="right", lengths=(7, 4, 1), seed=0):
    """Token ids and the attention mask, 3 by 7."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        where = slice(0, length) if padding == "right" else slice(max(lengths) - length, None)
        ids[i, where] = torch.randint(1, 256, (length,), generator=draws)
        mask[i, where] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def outputs(model, batch):
    """Logits where the tokens are real, or an encoder's last states there and what its pooler gives."""
    out = model(**batch)
    real = out[0][batch["attention_mask"].bool()]
    return torch.cat([real, out.pooler_output]) if hasattr(out, "pooler_output") else real


def assert_same_bits(ours, theirs, what):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    if not torch.equal(ours, theirs):
        raise AssertionError(f"{what}: differs by up to {(ours.double() - theirs.double()).abs().max():.3g}")


def share(a, b):
    """The largest difference, as a share of the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


# ------------------------------------------------------------------------- equal to peft, bit for bit


@st.composite
def setting(draw):
    name = draw(st.sampled_from(NAMES))
    r = draw(st.sampled_from([1, 3, 5, 12]))
    return {
        "name": name,
        "target_modules": draw(st.lists(st.sampled_from(LAST_NAMES[name]), min_size=1, unique=True)),
        "padding": draw(st.sampled_from(["left", "right"])),
        "train": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "lora": {
            "r": r,
            "lora_alpha": draw(st.sampled_from([7, 3.3, 20]).filter(lambda a: math.frexp(a / r)[0] != 0.5)),
            "lora_dropout": draw(st.sampled_from([0.0, 0.3])),
            "use_rslora": draw(st.booleans()),
        },
    }


def usual(name, padding, **lora):
    return dict(name=name, target_modules=USUAL[name], padding=padding, train=True, seed=1, lora=LORA | lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@few(12)
@given(s=setting())
@example(s=usual("tiny-llama", "left", lora_dropout=0.3))
@example(s=usual("tiny-llama", "right"))
@example(s=usual("tiny-gpt2", "left", use_rslora=True))
@example(s=usual("tiny-gpt2", "right", lora_dropout=0.3))
@example(s=usual("tiny-bert", "left", lora_dropout=0.3))
@example(s=usual("tiny-bert", "right"))
def test_forward_gradients_and_merged_equal_peft(device, dtype, s):
    batch = new_batch(device, s["padding"], seed=s["seed"])
    with torch.no_grad():
        base = outputs(new_model(s["name"], dtype, device), batch)
    results = []
    for model, layers in both(s["name"], dtype, device, s["target_modules"], s["seed"], **s["lora"]):
        model.train(s["train"])
        torch.manual_seed(s["seed"])  # the same dropout, the base's included
        result = {"outputs": outputs(model, batch)}
        torch.manual_seed(s["seed"] + 1)
        result["outputs"].backward(torch.randn_like(result["outputs"]))
        for name, layer in sorted(layers.items()):
            result[f"grad of {name}.A"], result[f"grad of {name}.B"] = (f.grad for f in factors(layer))
        others = [p for p in model.parameters() if not any(p is f for x in layers.values() for f in factors(x))]
        assert all(p.grad is None and not p.requires_grad for p in others)

        model.eval()
        with torch.no_grad():
            result["eval"] = outputs(model, batch)
            if results:
                model.merge_adapter()
            else:
                assert_same_bits(outputs(unmerge_lora(merge_lora(model)), batch), result["eval"], "unmerged")
                merge_lora(model)
            result["merged"] = outputs(model, batch)
        results.append(result)
    ours, theirs = results
    assert list(ours) == list(theirs) and len(ours) >= 4
    for what in ours:
        assert_same_bits(ours[what], theirs[what], what)

    assert share(ours["eval"], base) > 1e-2, "the adapter must matter, else nothing was compared"
    merged = share(ours["merged"], ours["eval"])
    MEASURED["merged against unmerged", dtype] = max(merged, MEASURED.get(("merged against unmerged", dtype), 0))
    assert merged <= LIMIT[dtype]


@each_model
@pytest.mark.parametrize("padding", ["left", "right"])
@few(3)
@given(s=setting())
def test_ten_adamw_steps_in_float64_equal_peft(device, name, padding, s):
    runs = []
    for model, layers in both(name, torch.float64, device, USUAL[name], s["seed"], **s["lora"]):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        losses = []
        torch.manual_seed(s["seed"])
        for step in range(10):
            batch = new_batch(device, padding, lengths=(7, 3), seed=step)
            seen = outputs(model, batch)
            loss = F.mse_loss(seen, torch.ones_like(seen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert len(trained) == 2 * len(layers)
        assert not any(torch.equal(p, start) for p, start in zip(trained, before, strict=True))
        now = dict(model.named_parameters())
        assert all(torch.equal(now[n], p) for n, p in frozen.items()), "a frozen weight moved"
        runs.append({"losses": torch.stack(losses)} | {
            f"{n}.{which}": f for n, x in sorted(layers.items()) for which, f in zip("AB", factors(x), strict=True)
        })  # fmt: skip
    ours, theirs = runs
    assert list(ours) == list(theirs)
    for what in ours:
        assert_same_bits(ours[what], theirs[what], what)


def test_smollm2_with_adapters_everywhere_equals_peft(device):
    """All 210 linear layers. One model at a time in memory."""
    results = []
    for wrap in (apply_lora_to_model, with_peft):
        model, tokenizer = load("smollm2-135m", device=device)
        batch = tokenizer(["The train was late again, so", "Rain"], return_tensors="pt", padding=True).to(device)
        model = wrap(model, "all-linear", **(LORA | {"lora_dropout": 0.1})).eval()
        layers = wrapped_layers(model) if wrap is apply_lora_to_model else peft_layers(model)
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in sorted(layers):
                for factor in factors(layers[name]):
                    factor.copy_(0.03 * torch.randn(factor.shape, generator=draws))
            result = {"names": list(layers), "logits": outputs(model, batch)}
            if wrap is apply_lora_to_model:
                result["count"] = count_parameters(model)
                result["merged"] = outputs(merge_lora(model), batch)
                result["unmerged"] = outputs(unmerge_lora(model), batch)
            else:
                result["count"] = model.get_nb_trainable_parameters()
                model.disable_adapter_layers()
                result["base"] = outputs(model, batch)
        results.append(result)
        del model, layers
    ours, theirs = results
    assert ours["names"] == theirs["names"] and len(ours["names"]) == 210
    assert ours["count"] == theirs["count"]
    assert_same_bits(ours["logits"], theirs["logits"], "logits")
    assert_same_bits(ours["unmerged"], ours["logits"], "after unmerging")
    assert share(ours["logits"], theirs["base"]) > 0.05  # the adapters say something
    merged = share(ours["merged"], ours["logits"])
    MEASURED["SmolLM2, merged against unmerged, float32"] = merged
    assert 0 < merged < 1e-5


# ------------------------------------------------------------------------------------- which layers


def same_layers_as_peft(model, target_modules, exclude_modules=None, **config):
    theirs = list(peft_layers(with_peft(copy.deepcopy(model), target_modules, exclude_modules, **config)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = wrapped_layers(apply_lora_to_model(model, target_modules, exclude_modules=exclude_modules, **LORA))
    assert list(ours) == theirs
    assert all(isinstance(layer, LoRALinear) for layer in ours.values())
    return theirs


WHICH = [
    ("tiny-llama", ["q_proj", "v_proj"], None, 4),
    ("tiny-llama", ("self_attn.o_proj",), None, 2),
    ("tiny-llama", {"layers.1.mlp.up_proj", "k_proj"}, None, 3),
    ("tiny-llama", ["model.layers.0.self_attn.q_proj"], None, 1),
    ("tiny-llama", ["lm_head"], None, 1),
    ("tiny-llama", r".*\.(q|k)_proj", None, 4),
    ("tiny-llama", r"model\.layers\.1\..*_proj", r".*mlp.*", 4),
    ("tiny-llama", "all-linear", None, 14),
    ("tiny-llama", "All-Linear", None, 14),
    ("tiny-llama", "all-linear", ["down_proj", "layers.0.self_attn.q_proj"], 11),
    ("tiny-llama", "all-linear", ["lm_head"], 14),
    ("tiny-llama", ["q_proj", "v_proj"], ["layers.0.self_attn.q_proj"], 3),
    ("tiny-gpt2", ["c_proj"], None, 4),  # twice in a block
    ("tiny-gpt2", ["attn.c_proj"], None, 2),
    ("tiny-gpt2", ["c_proj"], ["mlp.c_proj"], 2),
    ("tiny-gpt2", ["lm_head", "c_attn"], None, 3),
    ("tiny-gpt2", "all-linear", None, 8),
    ("tiny-bert", ["dense"], None, 7),  # three times in a block, and the pooler
    ("tiny-bert", ["output.dense"], None, 4),
    ("tiny-bert", ["attention.output.dense"], None, 2),
    ("tiny-bert", r"encoder\.layer\.\d+\.output\.dense", None, 2),
    ("tiny-bert", ["dense"], r"pooler\..*", 6),
    ("tiny-bert", "all-linear", None, 13),
    ("tiny-bert", "all-linear", ["pooler.dense"], 12),
]


@pytest.mark.parametrize("name, targets, excluded, count", WHICH, ids=[f"{w[0]}-{w[1]}-{w[2]}" for w in WHICH])
def test_the_same_layers_as_peft(name, targets, excluded, count):
    assert len(same_layers_as_peft(new_model(name), targets, excluded)) == count


@st.composite
def endings(draw, max_size):
    """A model, and endings of names of its linear layers, each cut at some dot."""
    name = draw(st.sampled_from(NAMES))
    linear = [n for n, m in original(name).named_modules() if isinstance(m, (nn.Linear, Conv1D))]

    def ending():
        parts = st.sampled_from(linear).map(lambda n: n.split("."))
        return parts.flatmap(lambda p: st.integers(1, len(p)).map(lambda k: ".".join(p[-k:])))

    target = draw(st.lists(ending(), min_size=1, max_size=max_size))
    return name, target, draw(st.lists(ending(), max_size=2))


@few(60)
@given(drawn=endings(4))
def test_any_endings_find_what_they_find_in_peft(drawn):
    name, targets, excluded = drawn
    try:
        same_layers_as_peft(new_model(name), targets, excluded)
    except ValueError:  # peft's, since everything is excluded: then ours says so too
        with pytest.raises(ValueError, match="everything is excluded"):
            apply_lora_to_model(new_model(name), targets, exclude_modules=excluded)


part = st.sampled_from(["a", "ab", "b", "ba", "0", "proj", "q_proj"])
dotted = st.lists(part, min_size=1, max_size=4).map(".".join)


@few(300)
@given(
    names=st.lists(dotted, min_size=1, max_size=8, unique=True),
    targets=st.one_of(
        st.lists(dotted, min_size=1, max_size=3),
        st.sampled_from([r"a.*", r".*b", "ab", r"(.*\.)?q_proj", r"\w+", r"[a-b]+\.0", "", "a|b.*"]),
    ),
)
def test_find_targets_matches_as_peft_does(names, targets):
    config = LoraConfig(target_modules=targets)
    assert find_targets(names, targets) == [n for n in names if check_target_module_exists(config, n)]


def test_find_targets_keeps_order_and_repeats_nothing():
    names = ["h.1.b", "h.0.a", "h.0.ab", "b"]
    assert find_targets(iter(names), ["b", "a", "b", "1.b"]) == ["h.1.b", "h.0.a", "b"]


HEADS = [
    ("BertForSequenceClassification", "SEQ_CLS"),
    ("RobertaForSequenceClassification", "SEQ_CLS"),  # its classifier is two layers deep
    ("LlamaForSequenceClassification", "SEQ_CLS"),
    ("GPT2ForSequenceClassification", "SEQ_CLS"),
    ("BertForMaskedLM", None),
    ("BertForPreTraining", None),
    ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("AlbertForMaskedLM", None),  # all blocks are one
]


@pytest.mark.parametrize("kind, task_type", HEADS, ids=[kind for kind, _ in HEADS])
def test_all_linear_leaves_the_head_out_as_peft_does(kind, task_type):
    import transformers

    cls = getattr(transformers, kind)
    small = dict(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    if kind.startswith("T5"):
        small = dict(vocab_size=30, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2)
    if kind.startswith("GPT2"):
        small = dict(vocab_size=30, n_embd=12, n_layer=2, n_head=2)
    if kind.startswith("Albert"):
        small["embedding_size"] = 8
    model = cls(cls.config_class(pad_token_id=0, **small))
    names = same_layers_as_peft(model, "all-linear", task_type=task_type)
    assert len(names) >= 6
    heads = {"lm_head", "score", "classifier", "qa_outputs", "decoder"} - ({"decoder"} if "T5" in kind else set())
    assert not any(heads & set(name.split(".")) for name in names)


@pytest.mark.parametrize(
    "kind, task_type, head",
    [
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_all_linear_leaves_out_heads_that_peft_stumbles_over(kind, task_type, head):
    """peft wraps these heads, then can't train them, as it means to; without a task it just wraps them."""
    import transformers

    cls = getattr(transformers, kind)
    small = dict(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    model = cls(cls.config_class(**small))
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        with_peft(copy.deepcopy(model), "all-linear", task_type=task_type)
    theirs = list(peft_layers(with_peft(copy.deepcopy(model), "all-linear")))
    assert head in theirs
    assert list(wrapped_layers(apply_lora_to_model(model, "all-linear", **LORA))) == [n for n in theirs if n != head]


def test_in_a_plain_module_every_linear_layer_is_meant():
    """As in peft: without get_output_embeddings nobody knows which layer is the head."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(7, 5), nn.ReLU()), "classifier": nn.Linear(5, 4)})
    assert same_layers_as_peft(model, "all-linear") == ["body.0", "classifier"]


# ------------------------------------------------------------------------------ freezing, counting, mode


@each_model
def test_only_the_adapters_are_trained(device, name):
    model = new_model(name, device=device)
    weights = {n: p for n, p in model.named_parameters()}
    assert all(p.requires_grad for p in weights.values())
    assert apply_lora_to_model(model, USUAL[name], **LORA) is model
    layers = wrapped_layers(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{factor}" for name in layers for factor in ("lora_A", "lora_B")
    }
    now = {n.replace(".linear.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
    assert now.keys() == weights.keys() and all(now[n] is weights[n] for n in weights), "the weights are the same objects"
    assert all(p.device.type == device.type for p in model.parameters())
    for layer in layers.values():
        assert layer.r == 3 and layer.lora_alpha == 7 and layer.scaling == 7 / 3
        assert layer.lora_B.abs().max() == 0 and layer.lora_A.abs().max() > 0


@each_model
def test_a_model_that_was_just_wrapped_says_what_it_said(device, name):
    model, batch = new_model(name, device=device), new_batch(device, "left")
    with torch.no_grad():
        before = outputs(model, batch)
        apply_lora_to_model(model, USUAL[name], **LORA | {"lora_dropout": 0.5})
        assert_same_bits(outputs(model, batch), before, "outputs")
        assert_same_bits(outputs(merge_lora(model), batch), before, "merged")


def test_the_defaults():
    layers = wrapped_layers(apply_lora_to_model(new_model("tiny-llama")))
    assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "v_proj"} and len(layers) == 4
    for layer in layers.values():
        assert (layer.r, layer.lora_alpha, layer.scaling, layer.dropout.p) == (8, 16, 2.0, 0.0)


def test_all_arguments_arrive():
    got = []

    def layer(linear, **arguments):
        got.append(arguments)
        return LoRALinear(linear, **arguments)

    arguments = {"r": 5, "lora_alpha": 3.5, "lora_dropout": 0.2, "use_rslora": True}
    model = apply_lora_to_model(new_model("tiny-llama"), ["q_proj"], 5, 3.5, 0.2, True, layer=layer)
    assert got == [arguments] * 2
    assert all(layer.scaling == 3.5 / math.sqrt(5) for layer in wrapped_layers(model).values())


@each_model
@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("targets", ["usual", "all-linear"])
def test_counts_equal_peft(name, r, targets):
    targets = USUAL[name] if targets == "usual" else targets
    base = count_parameters(new_model(name))
    assert base.trainable == base.total == sum(p.numel() for p in new_model(name).parameters())
    count = count_parameters(apply_lora_to_model(new_model(name), targets, **LORA | {"r": r}))
    assert isinstance(count, ParameterCount) and (count.trainable, count.total) == count
    assert count == with_peft(new_model(name), targets, r=r).get_nb_trainable_parameters()
    assert count.total == base.total + count.trainable


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(7, 5))
    model[1].weight = model[0].weight.requires_grad_(False)
    assert count_parameters(model) == ParameterCount(trainable=5, total=40)


def test_a_4_bit_weight_counts_as_in_peft():
    bnb = pytest.importorskip("bitsandbytes")
    for storage in (torch.uint8, torch.bfloat16):
        quantized = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage)
        assert count_parameters(quantized).total == 64 * 32 + 32  # not yet quantized: plain numbers
        model = nn.ModuleDict({"q": quantized.to("cpu"), "v": nn.Linear(7, 5)})
        theirs = with_peft(copy.deepcopy(model), ["v"]).get_nb_trainable_parameters()
        assert count_parameters(apply_lora_to_model(model, ["v"], **LORA)) == theirs


def test_a_new_layer_takes_the_mode_of_the_one_it_replaces(device):
    """peft's is in training mode, so that two calls of a model in eval mode differ."""
    model = new_model("tiny-llama", device=device)  # load() gives it in eval mode
    assert not model.training
    batch = new_batch(device)
    apply_lora_to_model(model, USUAL["tiny-llama"], **LORA | {"lora_dropout": 0.5})
    fill(wrapped_layers(model))
    assert not any(module.training for module in model.modules())
    assert_same_bits(outputs(model, batch), outputs(model, batch), "two calls")
    model.train()
    assert all(module.training for module in model.modules())
    assert not torch.equal(outputs(model, batch), outputs(model, batch))

    mixed = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))
    mixed[0].eval()
    apply_lora_to_model(mixed, ["0", "1"], **LORA)
    assert [m.training for m in mixed] == [False, True] and not mixed[0].dropout.training
    theirs = with_peft(new_model("tiny-llama"), USUAL["tiny-llama"])
    assert all(layer.training for layer in peft_layers(theirs).values()), "peft has changed: tell the header"


# ------------------------------------------------------------------------------- merging, and tied weights


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(now, before):
    assert list(now) == list(before)
    for name in now:
        assert_same_bits(now[name], before[name], name)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unmerging_gives_every_weight_back(device, name, dtype):
    model = apply_lora_to_model(new_model(name, dtype, device), "all-linear", **LORA)
    layers = wrapped_layers(model)
    fill(layers)
    before = state(model)
    with pytest.raises(AssertionError):
        assert merge_lora(model) is model
        assert_same_state(state(model), before)
    assert all(layer.merged for layer in layers.values())
    once = state(model)
    merge_lora(model)
    assert_same_state(state(model), once)
    assert list(wrapped_layers(model)) == list(layers), "the wrappers stay"
    assert unmerge_lora(unmerge_lora(model)) is model
    assert_same_state(state(model), before)
    assert not any(layer.merged for layer in layers.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.{factor}" for n in layers for factor in ("lora_A", "lora_B")
    }


def test_merging_continues_what_was_merged_by_hand():
    model = apply_lora_to_model(new_model("tiny-llama"), **LORA)
    layers = wrapped_layers(model)
    fill(layers)
    before = state(model)
    list(layers.values())[1].merge()
    merge_lora(model)
    assert all(layer.merged for layer in layers.values())
    assert_same_state(state(unmerge_lora(model)), before)


def test_a_merge_that_fails_leaves_nothing_merged(monkeypatch):
    model = apply_lora_to_model(new_model("tiny-llama"), **LORA)
    layers = wrapped_layers(model)
    fill(layers)
    before = state(model)
    calls = []
    merge = LoRALinear.merge

    def failing(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        merge(self)

    monkeypatch.setattr(LoRALinear, "merge", failing)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(model)
    assert len(calls) == 3 and not any(layer.merged for layer in layers.values())
    assert_same_state(state(model), before)


class Tied(nn.Module):
    """Two linear layers, one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_two_adapters_over_one_weight_are_unmerged_in_reverse(device):
    with pytest.warns(UserWarning, match="shares its weight with") as caught:
        model = apply_lora_to_model(Tied().to(device), ["first", "second"], **LORA)
    assert len(caught) == 2, "each of the two is told of"
    assert model.first.linear.weight is model.second.linear.weight
    fill(wrapped_layers(model))
    x = torch.randn(2, 6, device=device)
    before, y = state(model), model(x)
    merge_lora(model)
    both = model.first.delta_weight() + model.second.delta_weight()
    assert torch.allclose(model.first.linear.weight, before["first.linear.weight"] + both, atol=1e-6)
    unmerge_lora(model)
    assert_same_state(state(model), before)
    assert_same_bits(model(x), y, "outputs")


def test_a_tied_head_warns_and_naming_what_goes_wrong_is_true(device):
    """GPT-2's head is its embedding: merged, the adapter of the one is in the other."""
    model, batch = new_model("tiny-gpt2", torch.float64, device), new_batch(device)
    with pytest.warns(UserWarning) as caught:
        apply_lora_to_model(model, ["c_attn", "lm_head"], **LORA)
    assert len(caught) == 1 and caught[0].filename == __file__, "once, and pointing at the caller"
    text = str(caught[0].message)
    for fragment in ("lm_head shares its weight with transformer.wte (tied weights)", "merging changes the weight",
                     "and so transformer.wte too", "exclude_modules", "untie"):  # fmt: skip
        assert fragment in text
    fill(wrapped_layers(model))
    before = state(model)
    with torch.no_grad():
        unmerged = outputs(model, batch)
        assert share(outputs(merge_lora(model), batch), unmerged) > 0.1
        assert_same_bits(outputs(unmerge_lora(model), batch), unmerged, "outputs")
    assert_same_state(state(model), before)


def test_no_warning_where_nothing_is_tied():
    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

    block = nn.Sequential(nn.Linear(7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            apply_lora_to_model(new_model(name), "all-linear", **LORA)
        # One block at two places, as in ALBERT: its layer is replaced once, for both.
        model = nn.ModuleDict({"a": Block(block), "b": Block(block)})
        apply_lora_to_model(model, ["block.0"], **LORA)
    assert list(wrapped_layers(model)) == ["a.block.0"]
    assert model["a"].block[0] is model["b"].block[0] and isinstance(block[0], LoRALinear)


def test_one_layer_at_two_places_warns():
    """As in peft, only the first place gets the adapter."""
    linear = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    with pytest.warns(UserWarning, match=r"a\.0 shares its weight with b\.0"):
        apply_lora_to_model(model, ["0"], **LORA)
    assert list(wrapped_layers(model)) == ["a.0"] and model["b"][0] is linear


# ------------------------------------------------------------------------------------------- other layers


class Scaled(nn.Module):
    """Not LoRA, and without the names of LoRA: one trained number per output."""

    def __init__(self, linear, r, lora_alpha, lora_dropout, use_rslora, start=1.0):
        super().__init__()
        self.inner = linear
        self.gain = nn.Parameter(torch.full((linear.out_features,), start))

    def forward(self, x):
        return self.inner(x) * self.gain


def test_any_callable_can_make_the_layers(device):
    model, batch = new_model("tiny-llama", device=device), new_batch(device)
    before = outputs(model, batch)
    layer = functools.partial(Scaled, start=1.5)
    apply_lora_to_model(model, "all-linear", layer=lambda linear, **kw: layer(linear, **kw).to(device))
    layers = wrapped_layers(model)
    assert len(layers) == 14 and all(isinstance(module, Scaled) for module in layers.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.gain" for n in layers}
    assert share(outputs(model, batch), before) > 1e-2
    with pytest.raises(ValueError, match="already has adapters"):
        apply_lora_to_model(model)
    for do in (merge_lora, unmerge_lora):
        with pytest.raises(TypeError, match=r"model\.layers\.0\.self_attn\.q_proj is a Scaled, which can't be merged"):
            do(model)


def test_a_learners_own_layer_wrapped_by_hand_is_found():
    class Mine(LoRALinear):
        pass

    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), Mine(nn.Linear(5, 4), r=3))
    assert wrapped_layers(model) == {"2": model[2]}
    fill(wrapped_layers(model))
    before = model[2].linear.weight.clone()
    merge_lora(model)
    assert torch.equal(model[2].linear.weight, before + model[2].delta_weight())
    assert wrapped_layers(nn.Linear(7, 5)) == {}
    assert list(wrapped_layers(model[2])) == [""]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_has_its_own_layers(copied):
    model = apply_lora_to_model(new_model("tiny-llama"), layer=Scaled)
    other = copied(model)
    assert list(wrapped_layers(other)) == list(wrapped_layers(model))
    assert not set(map(id, wrapped_layers(other).values())) & set(map(id, wrapped_layers(model).values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_models_keep_their_adapters_in_float32_as_peft_does(device, dtype):
    for model, layers in both("tiny-llama", dtype, device, USUAL["tiny-llama"]):
        assert all(factor.dtype == torch.float32 for layer in layers.values() for factor in factors(layer))
        assert next(p for n, p in model.named_parameters() if "embed" in n).dtype == dtype


def test_exported():
    for name in ("apply_lora_to_model", "merge_lora", "unmerge_lora", "count_parameters", "ParameterCount"):
        assert name in peft_teach.__all__ and getattr(peft_teach, name) is globals()[name]
    assert peft_teach.wrapped_layers is wrapped_layers


# ------------------------------------------------------------------------------- refused, and unchanged


def fails_at(call, error):
    """A layer= that goes wrong at its call-th call."""
    calls = []

    def layer(linear, **arguments):
        calls.append(linear)
        if len(calls) == call:
            calls.clear()  # the next device starts anew
            raise error
        return LoRALinear(linear, **arguments)

    return layer


Q0 = "model.layers.0.self_attn.q_proj"
ERRORS = [
    # unknown names
    (["q_porj"], {}, ValueError, ["target_modules", "no module is called 'q_porj'", "'q_proj'", "Linear layers here: down_proj"]),
    (["q_proj", "c_attn"], {}, ValueError, ["no module is called 'c_attn'", "gate_proj, k_proj, lm_head"]),
    (["proj"], {}, ValueError, ["no module is called 'proj'", "Near 'proj': "]),
    (["attn.q_proj"], {}, ValueError, ["'attn.q_proj'", "Near 'attn.q_proj': 'self_attn.q_proj'"]),
    (["zzz"], {}, ValueError, ["no module is called 'zzz'. Linear layers here"]),
    ([""], {}, ValueError, ["no module is called ''"]),
    (["all-linear"], {}, ValueError, ["'all-linear' is meant as one string"]),
    (["q_proj"], {"exclude_modules": ["layer.0"]}, ValueError, ["exclude_modules", "'layer.0'", "'layers.0'"]),
    (["q_proj"], {"exclude_modules": "layers.0"}, ValueError, ["exclude_modules='layers.0' matches no name"]),
    # one string
    ("q_proj", {}, ValueError, ["target_modules='q_proj'", "whole dotted names", "write a list, ['q_proj']", "Near 'q_proj'"]),
    ("", {}, ValueError, ["target_modules=''", "regular expression"]),
    (r".*(q_proj", {}, ValueError, ["target_modules='.*(q_proj' is no regular expression", "position"]),
    # nothing, or something else than names
    ([], {}, ValueError, ["target_modules must name at least one module, got []"]),
    (None, {}, TypeError, ["target_modules must be", "got None"]),
    ([7], {}, TypeError, ["target_modules must be", "got [7]"]),
    (["q_proj"], {"exclude_modules": 7}, TypeError, ["exclude_modules must be", "got 7"]),
    (["q_proj"], {"exclude_modules": ["q_proj"]}, ValueError, ["target_modules=['q_proj']", "everything is excluded"]),
    ("all-linear", {"exclude_modules": ".*"}, ValueError, ["everything is excluded by exclude_modules='.*'"]),
    # not linear
    (["q_proj", "embed_tokens"], {}, TypeError, ["model.embed_tokens", "Embedding", "nn.Linear and Conv1D"]),
    (["self_attn"], {}, TypeError, ["model.layers.0.self_attn", "LlamaAttention"]),
    (r".*attn.*", {}, TypeError, ["means model.layers.0.self_attn, too", "LlamaAttention"]),
    # numbers
    (["q_proj"], {"r": 0}, ValueError, ["r must be ≥ 1, got 0"]),
    (["q_proj"], {"r": 2.5}, TypeError, ["r must be a whole number ≥ 1, got 2.5"]),
    (["q_proj"], {"lora_alpha": -1}, ValueError, ["lora_alpha must be a finite number > 0, got -1"]),
    (["q_proj"], {"lora_dropout": 1.0}, ValueError, ["lora_dropout must be in [0, 1), got 1.0"]),
    # what makes the layers
    (["q_proj", "v_proj"], {"layer": fails_at(3, ValueError("not this one"))}, ValueError, ["not this one"]),
    (["q_proj", "v_proj"], {"layer": fails_at(4, KeyboardInterrupt("stop"))}, KeyboardInterrupt, ["stop"]),
    (["q_proj"], {"layer": lambda linear, **kw: None}, TypeError, ["layer must give an nn.Module", "NoneType", Q0]),
    (["q_proj"], {"layer": "lora"}, TypeError, ["not callable"]),
]  # fmt: skip


def picture(model):
    """All that must not change: the modules, their modes, the weights and what is trained."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


@pytest.mark.parametrize("targets, arguments, error, fragments", ERRORS, ids=[f"{i}-{e[0]}" for i, e in enumerate(ERRORS)])
def test_an_error_says_what_is_wrong_and_leaves_the_model_as_it_was(device, targets, arguments, error, fragments):
    model = new_model("tiny-llama", device=device)
    model.model.norm.requires_grad_(False)  # not all the same
    model.model.layers[1].train()
    before, values = picture(model), state(model)
    with pytest.raises(error) as caught:
        apply_lora_to_model(model, targets, **(LORA | arguments))
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert picture(model) == before
    assert_same_state(state(model), values)
    apply_lora_to_model(model, **LORA)  # and it can still be wrapped


def test_an_error_of_the_layer_says_which_one():
    with pytest.raises(ValueError) as caught:
        apply_lora_to_model(new_model("tiny-llama"), layer=fails_at(2, ValueError("no")))
    assert caught.value.__notes__ == ["while wrapping model.layers.0.self_attn.v_proj"]


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = new_model("tiny-gpt2")
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="tied weights"):
            apply_lora_to_model(model, ["c_attn", "lm_head"], **LORA)
    assert picture(model) == before


class Stubborn(nn.Module):
    """A module that refuses to have its second layer replaced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 4)

    def __setattr__(self, name, value):
        if name == "b" and isinstance(value, LoRALinear):
            raise RuntimeError("hands off")
        super().__setattr__(name, value)


def test_a_module_that_refuses_leaves_the_model_as_it_was():
    model = Stubborn()
    before = picture(model)
    with pytest.raises(RuntimeError, match="hands off"):
        apply_lora_to_model(model, ["a", "b"], **LORA)
    assert picture(model) == before


@pytest.mark.parametrize("wrapped_by", ["ours", "peft", "peft, inside"])
def test_wrapping_twice_is_refused(wrapped_by):
    if wrapped_by == "ours":
        model = apply_lora_to_model(new_model("tiny-llama"), **LORA)
    else:
        model = with_peft(new_model("tiny-llama"), ["q_proj", "v_proj"])
        model = model if wrapped_by == "peft" else model.base_model.model
    before = picture(model)
    for targets in (["q_proj"], ["o_proj"], "all-linear"):
        with pytest.raises(ValueError) as caught:
            apply_lora_to_model(model, targets, **LORA)
        for fragment in ("already has adapters, at ", f"{Q0}, ", ", … (4 in all)", "Load the model afresh"):
            assert fragment in str(caught.value)
    assert picture(model) == before


@pytest.mark.parametrize("model", [nn.Linear(7, 5), Conv1D(5, 7)], ids=["Linear", "Conv1D"])
def test_a_model_that_is_one_layer_is_refused(model):
    name = type(model).__name__
    for targets in ("all-linear", ["q_proj"], ".*"):
        with pytest.raises(TypeError, match=rf"model is itself a {name}: .*Wrap it with LoRALinear\(model, …\)"):
            apply_lora_to_model(model, targets)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="already has adapters, at its top"):
        apply_lora_to_model(LoRALinear(nn.Linear(7, 5), r=3), ["linear"])


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.Sequential(nn.ReLU(), nn.Embedding(3, 2))], ids=str)
def test_a_model_without_linear_layers_is_refused(model):
    with pytest.raises(ValueError, match="nothing is left to wrap, nothing is linear"):
        apply_lora_to_model(model, "all-linear")
    for targets in (["q_proj"], "q_proj"):
        with pytest.raises(ValueError, match="Linear layers here: none"):
            apply_lora_to_model(model, targets)


@pytest.mark.parametrize("model", [None, "smollm2-135m", {}], ids=str)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=f"model must be an nn.Module, got {type(model).__name__}"):
        apply_lora_to_model(model)


def test_a_layer_that_is_never_called_is_refused():
    """In nn.MultiheadAttention peft's adapter on out_proj does nothing, without a word."""
    model = nn.TransformerEncoderLayer(12, 3, 20)
    with pytest.raises(TypeError, match="self_attn.out_proj can't be wrapped: nn.MultiheadAttention"):
        apply_lora_to_model(model, "all-linear")
    assert all(p.requires_grad for p in model.parameters())
    apply_lora_to_model(model, "all-linear", exclude_modules=["out_proj"])
    assert list(wrapped_layers(model)) == ["linear1", "linear2"]


def test_a_quantized_layer_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "q": bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")})
    with pytest.raises(TypeError, match="QLoRALinear") as caught:
        apply_lora_to_model(model, ["a", "q"], **LORA)
    assert caught.value.__notes__ == ["while wrapping q"]
    assert isinstance(model["a"], nn.Linear) and model["a"].weight.requires_grad


@pytest.mark.parametrize("do", [merge_lora, unmerge_lora])
def test_merging_a_model_without_adapters_is_refused(do):
    for model in (new_model("tiny-llama"), with_peft(new_model("tiny-llama"), ["q_proj"])):
        with pytest.raises(ValueError, match="the model has no adapters of peft_teach: call apply_lora_to_model"):
            do(model)
