"""Query-key-value and gate-up matrices that one framework's network fuses and the other's keeps apart, both ways."""

import importlib

import numpy as np
import pytest

from tests.conftest import INSTALLED
from tests.only_ms import convert_cells as cells

import mindspore as ms

FAMILIES = ["gpt2", "multihead", "phi3", "bert into fused"] if "torch" in INSTALLED else []
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module", autouse=True)
def _device():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def family(name):
    """(torch network, MindSpore network, inputs, a fused tensor and its parts)."""
    torch, hf = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (2, 6))
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, n_positions=16)
        made = hf.GPT2Model(config), cells.Gpt(), ids, "h.1.attn.c_attn.weight"
    elif name == "multihead":
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, activation="gelu", batch_first=True)
        net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        made = (
            net,
            cells.Encoder(),
            rng.standard_normal((2, 5, 32)).astype(np.float32),
            "layers.1.self_attn.in_proj_weight",
        )
    elif name == "phi3":
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = hf.Phi3Config(vocab_size=64, num_key_value_heads=2, rms_norm_eps=1e-6, **tokens, **SIZES)
        made = hf.Phi3Model(config), cells.Llama(head=False), ids, "layers.1.self_attn.qkv_proj.weight"
    else:
        config = hf.BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES)
        cell = cells.Bert(attention=cells.FusedAttention)
        made = hf.BertModel(config, add_pooling_layer=False), cell, ids, None
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.add_((torch.rand_like(parameter) - 0.4) * 0.1)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_with_equal_outputs(tmp_path, name):
    torch_net, cell, inputs, fused = family(name)
    torch, slim = importlib.import_module("torch"), importlib.import_module("slimkit")
    slim_ms = importlib.import_module("slimkit_ms")
    first = slim.save_checkpoint(torch_net, tmp_path / "torch.safetensors").path
    report = slim.convert_checkpoint(first, tmp_path / "cell.ckpt", torch_net, cell, inputs=inputs)
    assert report.largest_difference < 1e-5  # float32, up to 48 terms per sum, two layers deep
    assert report.missing == report.unused == []
    if fused is None:
        assert [n.rpartition(".")[2] for n in report.joined] == ["weight", "bias"] * 2
    else:
        parts = [n.split(".")[-2][0] for n in report.split[fused]]
        assert parts == ["q", "k", "v"]
    # Into a fresh network: every value comes back bit for bit.
    fresh = family(name)[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    back = slim_ms.convert_checkpoint(tmp_path / "cell.ckpt", tmp_path / "back.pt", cell, fresh, inputs=inputs)
    assert back.largest_difference < 1e-5
    assert bool(back.joined) == bool(report.split)
    for key, value in torch_net.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key


@pytest.mark.parametrize("name", FAMILIES[:1])
def test_the_users_map_splits_and_joins_with_networks(tmp_path, name):
    torch_net, cell, inputs, _ = family(name)
    slim = importlib.import_module("slimkit")
    path = slim.save_checkpoint(torch_net, tmp_path / "net.safetensors").path
    parts = [rf"layers.\1.attention.{role}.\2" for role in ("query", "key", "value")]
    swapped = [parts[1], parts[0], parts[2]]
    pattern = r"re:^h\.(\d+)\.attn\.c_attn\.(\w+)$"
    report = slim.convert_checkpoint(path, tmp_path / "a.ckpt", torch_net, cell, {pattern: parts}, inputs=inputs)
    assert report.largest_difference < 1e-5
    assert len(report.split) == 4
    # Said otherwise, it is done otherwise: queries and keys change places, and the proof tells.
    report = slim.convert_checkpoint(path, tmp_path / "b.ckpt", torch_net, cell, {pattern: swapped}, inputs=inputs)
    assert report.largest_difference > 1e-4
    joined = {tuple(f"layers.{i}.attention.{r}.{k}" for r in ("query", "key", "value")): f"h.{i}.attn.c_attn.{k}"
              for i in range(2) for k in ("weight", "bias")}  # fmt: skip
    back = slim.convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "c.pt", cell, torch_net, joined, inputs=inputs)
    assert back.largest_difference < 1e-5
    with pytest.raises(ValueError, match="result network lacks"):
        slim.convert_checkpoint(path, tmp_path / "d.ckpt", torch_net, cell, {"h.0.attn.c_attn.weight": ["x", "y"]})
    few = [p.replace(r"\1", "0").replace(r"\2", "weight") for p in parts[:2]]
    with pytest.raises(ValueError, match="is not the rows of"):
        slim.convert_checkpoint(path, tmp_path / "d.ckpt", torch_net, cell, {"h.0.attn.c_attn.weight": few})
