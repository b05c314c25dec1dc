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


TABLES = {  # families whose positions are computed and in no file
    "M2M100": ("M2M100ForConditionalGeneration", {}),
    "Marian": ("MarianMTModel", {"decoder_vocab_size": 64}),
    "XGLM": ("XGLMForCausalLM", {"num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
}


@pytest.mark.parametrize("family", TABLES)
def test_tables_of_positions_in_no_file_are_named_where_their_width_is_cut(family, tmp_path, caplog):
    from slimkit import PruneConfig, cut_checkpoint

    import transformers as hf

    cls, more = TABLES[family]
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    told = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 40, "pad_token_id": 1, **more}
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**told, **({} if family == "XGLM" else {**sides, **heads}))
    teacher = getattr(hf, cls)(config).eval()
    ids = {"input_ids": torch.arange(3, 12)[None]}
    ids |= {} if family == "XGLM" else {"decoder_input_ids": ids["input_ids"]}
    student, report = make_student(teacher, hidden=24, heads=3)
    assert report["computed"]
    assert all("embed_positions" in name for name in report["computed"])
    assert "in no file" in caplog.text
    student.save_pretrained(tmp_path / "student")  # and what it computes, a loaded one computes
    again = type(teacher).from_pretrained(tmp_path / "student").eval()
    assert torch.equal(again(**ids).logits, student.eval()(**ids).logits)
    caplog.clear()
    teacher.save_pretrained(tmp_path / "large")
    cut = PruneConfig().set_steps(["prune_bert_intra_block"])
    inner = {"ffn_dim": 48} if family == "XGLM" else {"encoder_ffn_dim": 48}
    report = cut_checkpoint(tmp_path / "large", tmp_path / "inner", inner, cut)
    assert not report["computed"]
    assert not caplog.text
    names = ["attention_heads"] if family == "XGLM" else list(heads)
    narrow = {"d_model": 24, **dict.fromkeys(names, 3)}
    report = cut_checkpoint(tmp_path / "large", tmp_path / "small", narrow, cut)
    assert report["computed"]
    assert "in no file" in caplog.text
    assert type(teacher).from_pretrained(tmp_path / "small").config.d_model == 24
