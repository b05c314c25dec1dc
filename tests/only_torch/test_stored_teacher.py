"""A teacher larger than memory: its folder, walked block by block, answers as the model does."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError
from slimkit.distill import TeacherCache
from tests.only_torch.test_sparse_checkpoint import build

import torch


def config():
    def label(index, module="", loss="KDMse"):
        found = {"t_output_idx": index, "s_output_idx": index, "loss_func": [{"func_name": loss, "func_weight": 1}]}
        return found | ({"t_module": module, "s_module": module} if module else {})

    made = KnowledgeDistillConfig().add_output_soft_label(label("logits"))
    for module in ("model.layers.0", "model.layers.1.mlp", "model.norm"):
        made = made.add_inter_soft_label(label(0, module, "HiddenMse"))
    return made


def batches():
    generator = torch.Generator().manual_seed(1)
    found = [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(5)]
    for batch in found:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found[2]["attention_mask"][0, 7:] = 0
    return found


@pytest.mark.parametrize("half", [False, True])
def test_a_folder_answers_as_its_model_does(half, tmp_path, monkeypatch):
    from slimkit.distill import cache as rooms

    monkeypatch.setattr(rooms, "WALKED_TOGETHER", 2)  # three walks over the folder
    model = build("llama").eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    if half:
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    model = model.float()
    folder = TeacherCache.build(str(tmp_path / "teacher"), batches(), config(), tmp_path / "a", top_k=64)
    whole = TeacherCache.build(model, batches(), config(), tmp_path / "b", top_k=64)
    for batch in batches():
        one, other = (found.lookup((), batch)[1] for found in (folder, whole))
        assert one.keys() == other.keys() == set(range(4))
        for place, tensor in one.items():
            np.testing.assert_allclose(tensor, other[place], atol=1e-5, err_msg=str(place))  # float32, 32 terms
    with pytest.raises(ConfigError, match="another teacher"):
        TeacherCache.build(model, batches(), config(), tmp_path / "a", top_k=64)


def test_a_walk_that_was_stopped_goes_on(tmp_path, monkeypatch):
    from slimkit.distill import cache as rooms

    monkeypatch.setattr(rooms, "WALKED_TOGETHER", 1)
    build("llama").save_pretrained(tmp_path / "teacher")
    asked = []
    answers = rooms.StoredTeacher.answers

    def counting(self, calls):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(calls)
        return answers(self, calls)

    with monkeypatch.context() as patch:
        patch.setattr(rooms.StoredTeacher, "answers", counting)
        patch.setattr("slimkit.core.check.positive", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            TeacherCache.build(tmp_path / "teacher", batches(), config(), tmp_path / "a", shard_mb=0)
    done = TeacherCache.build(tmp_path / "teacher", batches(), config(), tmp_path / "a")
    whole = TeacherCache.build(tmp_path / "teacher", batches(), config(), tmp_path / "b")
    for batch in batches():
        for place, tensor in done.lookup((), batch)[1].items():
            np.testing.assert_array_equal(tensor, whole.lookup((), batch)[1][place])


def test_another_configuration_is_another_teacher(tmp_path):
    build("llama").save_pretrained(tmp_path / "teacher")
    TeacherCache.build(tmp_path / "teacher", batches(), config(), tmp_path / "a")
    told = tmp_path / "teacher" / "config.json"
    told.write_text(told.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    with pytest.raises(ConfigError, match="another config"):
        TeacherCache.build(tmp_path / "teacher", batches(), config(), tmp_path / "a")
