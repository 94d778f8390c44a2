"""What models.py relies on in transformers (and in what it stands on)."""

import os

import pytest
import torch
from fact import fact
from gguf import GGMLQuantizationType, GGUFWriter, quants

from peft_teach.models import TINY, load, path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """(folder with model.gguf, the model in it): a tiny Llama in Q4_1, and a tokenizer of 256 words."""
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    config = AutoConfig.for_model(**{**TINY["tiny-llama"], "head_dim": 16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    writer = GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(256)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())[:-1] + ["ab"]  # one merge, one byte less
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256)
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(words.index("~"))
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk",
    }  # fmt: skip
    q4_1 = GGMLQuantizationType.Q4_1
    for key, value in model.state_dict().items():
        array = value.numpy()
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if array.ndim == 2:
            writer.add_tensor(key, quants.quantize(array, q4_1), raw_dtype=q4_1)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, model


@fact("gguf-loads", library="transformers", seen_in="5.23.0", chapters="00 03 04")
def test_a_gguf_file_is_read_and_comes_out_in_float32(gguf):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file="model.gguf", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours = gguf[1].model.layers[1].mlp.up_proj.weight
    theirs = model.model.layers[1].mlp.up_proj.weight
    assert 0 < (ours - theirs).norm() / ours.norm() < 0.1


@fact("gguf-cannot-be-saved", library="transformers", seen_in="5.23.0", chapters="03")
def test_a_model_from_gguf_counts_as_quantized_and_cannot_be_saved(gguf, tmp_path):
    """When this fails, gguf_to_safetensors may save the model as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file="model.gguf", dtype=torch.float32)
    assert model.config.quantization_config is not None
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


@fact("gguf-forgets-smollm-digits", library="transformers", seen_in="5.23.0", chapters="03 04")
def test_the_tokenizer_of_a_gguf_file_has_no_digits_rule(gguf):
    """When this fails, gguf_to_safetensors need not put the rule in."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf[0], gguf_file="model.gguf")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x   12")
    assert [piece for piece, _ in pieces] == ["x", "ĠĠ", "Ġ12"]  # "smollm" is x, ĠĠĠ, 1, 2


@fact("meta-then-assign-can-be-saved", library="transformers", seen_in="5.23.0", chapters="03")
def test_a_model_made_on_meta_and_assigned_its_state_is_saved_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    model = load("tiny-llama")[0]
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.save_pretrained(tmp_path)
    again = load(str(tmp_path))[0]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@fact("loading-draws-nothing", library="transformers", seen_in="5.23.0", chapters="00 03 04")
def test_from_pretrained_leaves_the_random_state(tmp_path):
    from transformers import AutoModelForCausalLM

    load("tiny-gpt2")[0].save_pretrained(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@fact("mapped-weights-are-private", library="safetensors", seen_in="0.8.0", chapters="03")
def test_changing_loaded_weights_leaves_the_file(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
    load_file(tmp_path / "w.safetensors")["w"].add_(1)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.ones(1000))


@fact("hub-errors-are-oserrors", library="transformers", seen_in="5.23.0", chapters="00")
def test_what_the_hub_does_not_give_is_an_oserror(monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError):
        AutoConfig.from_pretrained("nobody/no-such-model")


@fact("config-names-the-head", library="transformers", seen_in="5.23.0", chapters="09 10")
def test_minilm_says_that_it_is_an_encoder():
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(path("minilm-l6")).architectures == ["BertModel"]


@fact("pip-tells-its-progress", library="pip", seen_in="26.3", chapters="00")
def test_pip_has_a_raw_progress_bar():
    """From 24.1 on: lines "Progress 262144 of 92871040" on its output."""
    pip = pytest.importorskip("pip")
    if tuple(int(n) for n in pip.__version__.split(".")[:2]) < (24, 1):
        pytest.skip(f"pip {pip.__version__} here, older than 24.1")
    with open(os.path.join(os.path.dirname(pip.__file__), "_internal", "cli", "progress_bars.py")) as source:
        assert "Progress {current} of {total}" in source.read()
