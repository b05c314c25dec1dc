"""`load` of folders whose model transformers can build: no network is asked for."""

from __future__ import annotations

import pytest

import slimkit
from slimkit import SparseConfig
from slimkit.core.errors import FileFormatError
from slimkit.core.files import write_json
from slimkit.core.jobs.sources import ModelPlace
from slimkit.jobs import TorchJobs

import torch
import transformers as hf

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8).reshape(1, 8)).logits


def equal(one, other):
    return torch.allclose(logits(one), logits(other), atol=1e-6)


def test_a_folder_of_transformers_gives_its_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "plain")
    found = slimkit.load(tmp_path / "plain")
    assert (found.kind, type(found.model)) == ("model", hf.LlamaForCausalLM)
    assert found.facts["architecture"] == "LlamaForCausalLM"
    assert equal(found.model, llama)


@pytest.mark.parametrize("form", ["config", "padded", "any"])
def test_a_pruned_folder_of_either_form_gives_its_model(llama, tmp_path, form):
    llama.save_pretrained(tmp_path / "plain")
    face = TorchJobs("cpu")
    opened = face.open(ModelPlace(tmp_path / "plain"))
    opened.desc = slimkit.PruneTorch(opened.model).set_form(form).set_alignment(4).prune(0.7)
    (tmp_path / "small").mkdir()
    face.write_model(opened, tmp_path / "small")
    found = slimkit.load(tmp_path / "small")
    assert found.kind == "pruned"
    assert equal(found.model, opened.model)
    assert not equal(found.model, llama)


def test_a_peft_folder_finds_its_base(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    slimkit.apply_delta(model, "lora", ["*q_proj"], rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    slimkit.save_delta(model, tmp_path / "delta", format="peft")
    found = slimkit.load(tmp_path / "delta", tmp_path / "base")
    assert found.kind == "peft"
    assert equal(found.model, model)
    config = tmp_path / "delta" / "adapter_config.json"
    write_json(config, {**slimkit.core.files.read_json(config), "base_model_name_or_path": str(tmp_path / "base")})
    assert equal(slimkit.load(tmp_path / "delta").model, model)


def test_a_w16a16s_folder_gives_the_model_that_its_config_names(llama, tmp_path):
    slimkit.Compressor(llama, SparseConfig(method="magnitude", sparse_ratio=0.3)).compress([])
    llama.config.architectures = ["LlamaForCausalLM"]
    slimkit.save_w16a16s(tmp_path / "npu", llama)
    found = slimkit.load(tmp_path / "npu")
    assert torch.allclose(logits(found.model), logits(llama), atol=1e-2)  # float16 holds the weights
    assert not found.model.training
    write_json(tmp_path / "npu" / "config.json", {**llama.config.to_dict(), "tie_word_embeddings": False})
    with pytest.raises(FileFormatError, match=r"lm_head\.weight"):
        slimkit.load(tmp_path / "npu")
