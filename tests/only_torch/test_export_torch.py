"""What only torch models have at export: both exporters, keyword inputs, Hugging Face outputs, open batch sizes."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit import export_onnx
from slimkit.core.onnxfile import onnx_latency
from slimkit.export import example_arrays

import torch
from torch import nn


@pytest.mark.parametrize("opset", [9, 18, 20])
def test_old_and_new_opsets_are_written_as_asked(tmp_path, opset):
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    report = export_onnx(net, torch.randn(3, 4), tmp_path / "net.onnx", opset=opset)
    assert report.opset == opset
    assert report.max_difference < 1e-5  # float32, 8 terms


def test_an_open_batch_size_takes_other_batches(tmp_path):
    import onnxruntime

    net = nn.Linear(4, 2)
    export_onnx(net, torch.randn(3, 4), tmp_path / "net.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x = torch.randn(7, 4)
    found = session.run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-6)


def test_a_bert_with_keyword_inputs_is_written_at_opset_13_and_keeps_its_attention(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )  # fmt: skip
    model = BertModel(config).eval()
    used = model.config._attn_implementation
    batch = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    report = export_onnx(model, batch, tmp_path / "bert.onnx")
    assert report.opset == 13
    assert report.inputs == ["input_ids", "attention_mask"]
    assert set(report.differences) == {"last_hidden_state", "pooler_output"}
    assert model.config._attn_implementation == used

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids).last_hidden_state.mean(1)

    assert export_onnx(Wrapped().eval(), batch["input_ids"], tmp_path / "wrapped.onnx").opset == 13
    assert model.config._attn_implementation == used


def test_torchs_own_encoder_layer_is_written_without_its_fused_form(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert export_onnx(layer, torch.randn(2, 5, 16), tmp_path / "layer.onnx").opset == 13


def test_latency_is_measured_in_turn(tmp_path):
    x = torch.randn(1, 4)
    for name in ("a", "b"):
        export_onnx(nn.Linear(4, 2), x, tmp_path / f"{name}.onnx")
    found = onnx_latency({n: tmp_path / f"{n}.onnx" for n in "ab"}, example_arrays(x), budget_s=0.05)
    assert set(found) == {"a", "b"}
    assert all(0 < ms < 1000 for ms in found.values())


def test_a_model_that_cannot_be_written_leaves_no_file(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(ValueError, match="cannot be written as ONNX opset 13"):
        export_onnx(Odd(), torch.randn(3, 3), tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [13, 18])
def test_weights_beside_the_file_are_proven_and_replaced_together(tmp_path, opset):
    import onnx
    import onnxruntime

    net, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(3, 32)
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    for _ in range(2):  # the second time over the first one's files
        report = export_onnx(net, x, tmp_path / "net.onnx", opset=opset, external_data=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.data_file == "net.onnx.data"
    assert report.file_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert report.zeros >= 32 * 16
    bare = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in bare.graph.initializer)
    found = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)  # float32, 32 terms


def test_weights_beyond_one_file_go_beside_it_or_are_refused(tmp_path, monkeypatch):
    from slimkit.core import onnxfile

    monkeypatch.setattr(onnxfile, "_LARGEST_BYTES", 1000)
    net, x = nn.Linear(32, 32), torch.randn(3, 32)
    assert export_onnx(net, x, tmp_path / "net.onnx").data_file == "net.onnx.data"
    small = export_onnx(nn.Linear(4, 4), torch.randn(3, 4), tmp_path / "small.onnx")
    assert small.data_file is None
    with pytest.raises(ValueError, match="do not fit in one ONNX file"):
        export_onnx(net, x, tmp_path / "other.onnx", external_data=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data", "small.onnx"]


@pytest.mark.parametrize("opset", [18, 20])
def test_a_tied_table_is_stored_once(opset, tmp_path):
    onnx, transformers = pytest.importorskip("onnx"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(12)[None]}
    report = export_onnx(model, ids, tmp_path / "m.onnx", opset=opset, dynamic={"input_ids": {1: "sequence"}})
    assert report.max_difference < 1e-4
    proto = onnx.load(tmp_path / "m.onnx")
    tables = [t.name for t in proto.graph.initializer if sorted(t.dims) == [32, 500]]
    assert len(tables) == 1
    held = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == tables[0]))
    table = model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(held if held.shape == table.shape else held.T, table)
