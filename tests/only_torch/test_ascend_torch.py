"""Ascend checks of files that torch's two exporters write, and W16A16S folders of bfloat16 and tied models."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit import check_onnx, export_onnx, load_w16a16s, save_w16a16s

import torch
from torch import nn


class Block(nn.Module):
    """Embedding, one attention block written out, a classifier of five."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.act, self.head = nn.GELU(), nn.Linear(32, 5)

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.head(x + self.down(self.act(self.up(x))))


IDS = torch.arange(14).reshape(2, 7)
WEIGHTS = {(96, 32), (32, 32), (64, 32), (32, 64), (5, 32)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = Block().eval()
    files = {opset: folder / f"{opset}.onnx" for opset in (13, 17, 18)}
    for opset, file in files.items():
        export_onnx(model, IDS, file, opset=opset)
    return files


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_every_linear_layer_is_found_and_counted(exported, opset):
    found = check_onnx(exported[opset], "A2")
    assert {layer.shape for layer in found.layers} == WEIGHTS
    assert found.waste["macs"] == sum(14 * a * b for a, b in WEIGHTS)
    # Only the classifier's five channels do not fill a block; 14 rows fill one of 16.
    padded = sum(16 * (16 if a == 5 else a) * b for a, b in WEIGHTS)
    assert found.waste["padded_macs"] == padded


def test_the_opsets_differ_in_what_the_documents_name(exported):
    assert check_onnx(exported[13], "310P", "5.0.4").exit_code == 0
    assert check_onnx(exported[17], "310P", "6.0.1").exit_code == 1
    assert check_onnx(exported[17], "310P", "8.0").exit_code == 0
    # LayerNormalization appears at opset 17, and its page names float16 only.
    assert "LayerNormalization" in check_onnx(exported[17], "310P", precision="origin").operators
    kept = [f for f in check_onnx(exported[17], "310P", precision="origin").findings if f.rule == "dtype"]
    assert any("LayerNormalization" in f.message for f in kept)


def test_an_open_batch_closes_with_a_shape(tmp_path):
    export_onnx(Block().eval(), IDS, tmp_path / "m.onnx", opset=14, dynamic_batch=True)
    assert check_onnx(tmp_path / "m.onnx", "A2").waste["macs"] is None
    closed = check_onnx(tmp_path / "m.onnx", "A2", shapes={"input": [2, 7]})
    assert closed.command_ready
    # Shapes that go through shape tensors are followed to the last layer.
    assert closed.waste["layers_with_macs"] == len(WEIGHTS)
    assert closed.waste["macs"] == sum(14 * a * b for a, b in WEIGHTS)


def test_bfloat16_and_tied_models_become_float16(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "fc": nn.Linear(16, 16), "head": nn.Linear(16, 20, False)})
    model["head"].weight = model["embed"].weight
    with torch.no_grad():
        model["fc"].weight[:, ::3] = 0
    model.to(torch.bfloat16).register_buffer("steps", torch.tensor(3))
    report = save_w16a16s(tmp_path, model, {"torch_dtype": "bfloat16"})
    read = load_w16a16s(tmp_path)
    assert list(report.sparse) == ["fc.weight"]
    assert set(read.tensors) == {"embed.weight", "fc.weight", "fc.bias", "head.weight", "steps"}
    assert all(v.dtype == np.float16 for n, v in read.tensors.items() if n != "steps")
    np.testing.assert_array_equal(read.tensors["head.weight"], read.tensors["embed.weight"])
    np.testing.assert_array_equal(read.tensors["fc.weight"], model["fc"].weight.detach().to(torch.float16).numpy())
    assert model["fc"].weight.dtype == torch.bfloat16
    assert report.tied == {}


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_a_table_that_the_config_ties_is_written_once(zeros, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::3] = 0
        model.lm_head.weight[: int(40 * zeros)] = 0
    report = save_w16a16s(tmp_path, model)
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ("model.embed_tokens.weight" in report.sparse) == (zeros > 0)
    read = load_w16a16s(tmp_path)
    assert set(read.tensors) == set(model.state_dict()) - {"lm_head.weight"}
    assert read.config["tie_word_embeddings"] is True
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**read.config))
    state = {n: torch.from_numpy(a.astype(np.float32)) for n, a in read.tensors.items()}
    missing = again.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert missing.unexpected_keys == []
    for name, tensor in model.half().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name
