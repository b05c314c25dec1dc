"""make_student on Hugging Face models: configuration changed, weights cut, ready to distil."""

from __future__ import annotations

import pytest

from slimkit import KnowledgeDistillConfig, get_distill_model, make_student
from slimkit.core.errors import ConfigError

import torch


@pytest.mark.slow
def test_a_bert_loses_layers_and_ffn_and_learns():
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(vocab_size=30, **shape), add_pooling_layer=False).eval()
    student, report = make_student(teacher, layers=2, ffn=16)
    assert report["layers"] == {0: 0, 1: 3}
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    assert student.encoder.layer[0].intermediate.dense.out_features == 16
    own, cut = teacher.encoder.layer[3].attention.self.query, student.encoder.layer[1].attention.self.query
    assert torch.equal(own.weight, cut.weight)
    config = KnowledgeDistillConfig()
    for s, t in report["layers"].items():
        config.add_inter_soft_label(
            {
                "t_module": f"encoder.layer.{t}",
                "s_module": f"encoder.layer.{s}",
                "t_output_idx": 0,
                "s_output_idx": 0,
                "loss_func": [{"func_name": "HiddenMse", "func_weight": 1}],
            }
        )
    batch = {"input_ids": torch.randint(0, 30, (2, 5))}
    get_distill_model(teacher, student, config, batch)(**batch)[0].backward()
    narrow, _ = make_student(teacher, heads=2, hidden=8)
    assert narrow(**batch).last_hidden_state.shape == (2, 5, 8)
    with pytest.raises(ConfigError, match="heads=2, hidden=8"):
        make_student(teacher, heads=2)
