"""Smoothing in a Llama: grouped heads share factors, and what a trace does not show is found out before any harm."""

import copy

import pytest

import slimkit
from slimkit.core.errors import ConfigError, UnsupportedError

import torch
from torch import nn

transformers = pytest.importorskip("transformers")

CONFIG = slimkit.SparseConfig(method="hessian", sparse_ratio=0.3, weight_bits=8, smooth=True)


@pytest.fixture(scope="module")
def loud():
    """A Llama with loud channels before each of its layers, and batches."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (
                layer.input_layernorm,
                layer.post_attention_layernorm,
                layer.mlp.up_proj,
                layer.self_attn.v_proj,
            ):
                part.weight[3] *= 30
    return model, [{"input_ids": torch.randint(0, 64, (4, 16))} for _ in range(6)]


def test_fewer_layers_stay_float_and_each_loses_less(loud, tmp_path):
    dense, batches = loud
    found = {}
    for smooth in (False, True):
        model = copy.deepcopy(dense)
        config = slimkit.SparseConfig(**{**CONFIG.to_dict(), "smooth": smooth})
        report = slimkit.Compressor(model, config).compress(batches)
        written = slimkit.save_w8a8s(tmp_path / str(smooth), model, batches, most_error=10.0)
        found[smooth] = {n: row["input_error"] for n, row in written.layers.items()}
    assert (set(report["smoothed"]), report["unsmoothed"]) == (set(found[True]), [])
    better = [found[True][n] < found[False][n] for n in found[True]]
    assert sum(better) >= len(better) - 1
    assert sum(found[True].values()) < 0.6 * sum(found[False].values())


class Peeking(nn.Module):
    """Reads its norm's scale where no trace follows."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.two(torch.relu(self.one(self.norm(x)))) * float(self.norm.weight.detach().numpy()[3])


def test_a_hidden_reader_is_found_and_the_model_is_as_it_was():
    torch.manual_seed(0)
    model = Peeking()
    with torch.no_grad():
        model.norm.weight[3] = 40.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="smooth=True changes what the model says"):
        slimkit.Compressor(model, CONFIG).compress([torch.randn(32, 16) for _ in range(3)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_walk_over_files_refuses_and_writes_nothing(loud, tmp_path):
    model, batches = loud
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="smooth"):
        slimkit.sparsify_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG, batches)
    assert not (tmp_path / "out").exists()
