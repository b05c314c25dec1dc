"""A Hugging Face folder walked in MindSpore through twin Cells: what PyTorch makes of it, tensor by tensor."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.errors import PlanError, UnsupportedError
from slimkit.core.sparse import SparseConfig
from tests.conftest import INSTALLED

pytestmark = pytest.mark.skipif({"torch", "mindspore"} - set(INSTALLED) != set(), reason="needs both frameworks")

# The twin has the MLP's layers in the block itself.
NAMES = {r"re:\.mlp\.": "."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = hf.LlamaForCausalLM(config)
    found = tmp_path_factory.mktemp("twin")
    model.save_pretrained(found / "fp32", max_shard_size="20KB")
    model.to(torch.bfloat16).save_pretrained(found / "bf16", max_shard_size="20KB")
    return found


def ids():
    return [np.random.default_rng(i).integers(0, 64, (4, 12)) for i in range(3)]


def build(path):
    from tests.only_ms import convert_cells

    return convert_cells.LlamaLayer(32, 4, 2, 48) if path else convert_cells.LlamaStem()


def tensors(folder):
    from slimkit.core.checkpoint import openweights

    with openweights.open_weights(folder, openweights.refuse_torch, "src") as weights:
        return {name: (weights.entries[name].dtype, weights.read(name)) for name in weights.entries}


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="module")
@pytest.mark.parametrize(
    ("form", "kw"), [("fp32", {"method": "hessian"}), ("fp32", {"method": "par", "uniform": "dlp"}), ("bf16", {})]
)
def test_a_folder_becomes_what_pytorch_makes_of_it(kit, folder, form, kw, tmp_path):
    from slimkit.sparse import sparsify_checkpoint

    import torch

    config = SparseConfig(min_tokens=1, **kw)
    batches = ids()
    sparsify_checkpoint(folder / form, tmp_path / "torch", config, [torch.from_numpy(x) for x in batches])
    report = kit.slim.sparsify_checkpoint(
        folder / form,
        tmp_path / "out",
        config,
        [kit.tensor(x.astype(np.int32)) for x in batches],
        build=build,
        blocks=["layers.0", "layers.1"],  # without the prefix "model."
        names=NAMES,
    )
    assert report["ratio"] == pytest.approx(0.5, abs=1e-3)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "torch")
    assert ours.keys() == theirs.keys()
    for name, (dtype, value) in ours.items():
        assert dtype == theirs[name][0]
        apart = np.abs(value - theirs[name][1]) > 1e-3
        assert apart.mean() <= 0.01, name  # entries that nearly tie may change sides
    assert (tmp_path / "out" / "config.json").exists()
    assert files.read_json(tmp_path / "out" / "config.json") == files.read_json(folder / form / "config.json")


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="module")
def test_names_that_lead_nowhere_are_refused(kit, folder, tmp_path):
    from slimkit.core.errors import PatternError

    def walk(names, blocks=("layers.0", "layers.1")):
        kit.slim.sparsify_checkpoint(
            folder / "fp32", tmp_path / "out", SparseConfig(), None, build=build, blocks=blocks, names=names
        )

    with pytest.raises(UnsupportedError, match=r"hold a tensor for 'layers\.0\.gate_proj\.weight'"):
        walk(None)
    with pytest.raises(PlanError, match="would both become"):
        walk({r"re:(q_proj|k_proj)": "q_proj"})
    with pytest.raises(PatternError, match="name_map"):
        walk({"nothing": "x"})
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
