"""GGUF files, written here by gguf's own writer, become Hugging Face folders that answer as the model did."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import slimkit
from slimkit.cli import app
from slimkit.core.convert.ggufwords import ARCHITECTURES
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError

import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def model_of(kind="llama", **more):
    sizes = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "dtype": "float32",
        "attn_implementation": "eager",
    }  # fmt: skip
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config[kind](**{**sizes, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def write(model, path, kind="F32", keys=(), tensors=(), leave_out=(), tokens=None):
    """The model as llama.cpp's converter writes it; tensors with one axis stay in float32."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    words = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": size, "attention.key_length": size, "attention.value_length": size,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    for key, value in words.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in keys:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens[0])
        writer.add_token_types(tokens[2])
        writer.add_token_merges(tokens[1])
        writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, role = name.rpartition(".")
        number = stem.split(".")[2] if stem.startswith("model.layers") else None
        stem = NAMES[stem if number is None else stem.partition(f"layers.{number}.")[2]]
        array = tensor.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stem)
        if arch == "llama" and heads:  # as LlamaModel.permute of convert_hf_to_gguf.py does
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        full = (f"blk.{number}." if number is not None else "") + f"{stem}.{role}"
        if full not in leave_out:
            add(writer, full, array, kind if array.ndim > 1 else "F32")
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, array, kind):
    quantisation = gguf.GGMLQuantizationType[kind]
    try:
        data = gguf.quantize(array, quantisation)
    except NotImplementedError:
        # No quantiser in Python: any bytes are numbers. Below 60 no half-precision scale among them is infinite.
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
        rng = np.random.default_rng(len(name))
        data = rng.integers(0, 60, (array.shape[0], array.shape[1] // block * size)).astype(np.uint8)
    writer.add_tensor(name, data, raw_dtype=quantisation)


def state(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) % 300).logits


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_as_transformers_reads_it(kind, tmp_path):
    file = write(model_of(), tmp_path / "m.gguf", kind)
    report = slimkit.convert_gguf(file, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32")
    ours = state(tmp_path / "out")
    assert set(ours) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert report.types[kind] >= 8
    assert report.parameters == sum(p.numel() for p in theirs.parameters())


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_answers_as_it_did(name, tmp_path):
    kind, more = MODELS[name]
    model = model_of(kind, **more)
    tensors = []
    if name == "llama3":
        plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
        tensors = [("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))]
    file = write(model, tmp_path / "m.gguf", tensors=tensors)
    report = slimkit.convert_gguf(file, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert report.architecture == type(again).__name__ == type(model).__name__
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # The same weights, an attention kernel that sums in another order, scaled frequencies computed anew.
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=0)
    assert again.config.rms_norm_eps == 1e-5
    assert (again.generation_config.bos_token_id, again.generation_config.eos_token_id) == (1, 2)


def test_every_architecture_of_the_table_is_tried():
    assert {kind for kind, _ in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_type_asked_for_is_rounded_as_torch_rounds(dtype, bits, tmp_path):
    model = model_of()
    slimkit.convert_gguf(write(model, tmp_path / "m.gguf"), tmp_path / "out", dtype=dtype)
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(bits)), name


def tokens_of():
    """Bytes, one merge, three special tokens: a byte-level tokenizer as small as it gets."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", "<a>", "<b>", *letters, "th"]
    return tokens, ["t h"], [3, 3, 3] + [1] * (len(tokens) - 3)


def test_the_tokenizer_comes_with_its_chat_template(tmp_path):
    tokens = tokens_of()
    file = write(model_of(vocab_size=len(tokens[0])), tmp_path / "m.gguf", tokens=tokens)
    report = slimkit.convert_gguf(file, tmp_path / "out")
    assert report.tokenizer
    assert report.chat_template
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the thing, 12.\n"
    assert found(text)["input_ids"] == theirs(text)["input_ids"]
    assert found.decode(found(text)["input_ids"]) == text
    asked = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "<user>Hi"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100_000])


def scrambled(path):
    data = bytearray(path.read_bytes())
    data[24:32] = (1 << 40).to_bytes(8, "little")  # the length of the first key
    path.write_bytes(bytes(data))


WRONG = {
    "architecture": ({"arch": "falcon"}, UnsupportedError, "architecture 'falcon'"),
    "key": ({"keys": [("llama.expert_count", 4)]}, UnsupportedError, "llama.expert_count = 4"),
    "scaling": ({"keys": [("llama.rope.scaling.type", "yarn")]}, UnsupportedError, "'yarn'"),
    "missing": ({"leave_out": ["blk.0.attn_v.weight"]}, FileFormatError, "blk.0.attn_v.weight is missing"),
    "extra": ({"tensors": [("blk.0.odd.weight", np.zeros((2, 2), np.float32))]}, UnsupportedError, "blk.0.odd.weight"),
    "shape": (
        {"leave_out": ["blk.0.attn_v.weight"], "tensors": [("blk.0.attn_v.weight", np.zeros((2, 256), np.float32))]},
        FileFormatError, "blk.0.attn_v.weight is of shape (2, 256), not (128, 256)",
    ),
    "type": (
        {"leave_out": ["output_norm.weight"], "tensors": [("output_norm.weight", np.zeros(256, np.int32))]},
        UnsupportedError, "output_norm.weight is of type I32",
    ),
    "factors": ({"tensors": [("rope_freqs.weight", np.ones(7, np.float32))]}, UnsupportedError, "not Llama 3's"),
    "parts": ({"keys": [("split.count", 3)]}, UnsupportedError, "one of several"),
    "cut": ({"after": cut_short}, FileFormatError, "not a readable GGUF file"),
    "scrambled": ({"after": scrambled}, FileFormatError, "not a readable GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_known_is_one_error_and_nothing_written(name, tmp_path):
    how, error, words = WRONG[name]
    file = tmp_path / "m.gguf"
    if "arch" in how:
        writer = gguf.GGUFWriter(file, how["arch"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        write(model_of(), file, **{k: v for k, v in how.items() if k != "after"})
    how.get("after", lambda path: None)(file)
    with pytest.raises(error) as caught:
        slimkit.convert_gguf(file, tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    file = write(model, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="float16 cannot"):
        slimkit.convert_gguf(file, tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    slimkit.convert_gguf(file, tmp_path / "out", dtype="bfloat16")


def test_a_folder_in_use_is_left_alone(tmp_path):
    file = write(model_of(), tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ArgumentError, match="does not exist yet or is empty"):
        slimkit.convert_gguf(file, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_command_says_what_it_wrote(tmp_path):
    file = write(model_of(), tmp_path / "m.gguf", "Q4_1")

    def run(*arguments):
        return CliRunner().invoke(app, ["convert", str(file), *map(str, arguments)])

    tried = run(tmp_path / "out", "--dry-run", "--json")
    assert json.loads(tried.stdout)["types"] == {"F32": 3, "Q4_1": 8}
    assert not (tmp_path / "out").exists()
    done = run(tmp_path / "out", "--dtype", "bfloat16")
    assert done.exit_code == 0
    assert "LlamaForCausalLM in bfloat16" in done.stdout
    assert "holds no tokenizer" in done.stdout
    assert "--to does not go with a .gguf file" in str(run(tmp_path / "b", "--to", "torch").exception)
    other = CliRunner().invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "x.ckpt"), "--dtype", "float16"])
    assert "--dtype goes with a .gguf file" in str(other.exception)
