"""Torch's own of distillation: Hugging Face models, compile, autocast, copies, FSDP2, hooks, devices."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from slimkit import KnowledgeDistillConfig, Trainer, get_distill_model
from slimkit.core.errors import ConfigError

import torch
from torch import nn


def entry(name, **kw):
    return {"func_name": name, "func_weight": 1, **kw}


def output(*terms, t=0, s=0, **kw):
    return {"t_output_idx": t, "s_output_idx": s, "loss_func": list(terms), **kw}


def inner(teacher, student, *terms, **kw):
    return {"t_module": teacher, "s_module": student, **output(*terms, **kw)}


class Encoder(nn.Module):
    def __init__(self, width, n_layers, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 7)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"logits": self.head(self.drop(x).mean(1)), "last": x}


BATCH = {
    "input_ids": torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2),
}


def dual(width=8, inputs=BATCH):
    config = (
        KnowledgeDistillConfig()
        .add_output_soft_label(output(entry("KDCrossEntropy", temperature=2), t="logits", s="logits"))
        .add_inter_soft_label(
            inner("layers.1", "layers.0", entry("HiddenMse"), entry("Relation"), mask="attention_mask")
        )
        .add_output_soft_label(output(entry("HiddenCosine"), t="last", s="last", mask="attention_mask", pool="mean"))
    )
    return get_distill_model(Encoder(16, 4, 0), Encoder(width, 2, 1), config, inputs)


@pytest.mark.slow
def test_a_hugging_face_bert_is_distilled_by_layers_attention_and_embedding():
    from transformers import BertConfig, BertModel

    def bert(layers, width):
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 16}
        torch.manual_seed(layers)
        settings = BertConfig(vocab_size=30, attn_implementation="eager", **shape)
        return BertModel(settings, add_pooling_layer=False)

    batch = {"input_ids": torch.randint(0, 30, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][0, 5:] = 0
    config = (
        KnowledgeDistillConfig()
        .add_inter_soft_label(inner("encoder.layer.1", "encoder.layer.0", entry("HiddenMse"), mask="attention_mask"))
        .add_inter_soft_label(
            inner("encoder.layer.3.attention.self", "encoder.layer.1.attention.self", entry("AttentionMse"), t=1, s=1)
        )
        .add_inter_soft_label(
            inner("encoder.layer.3.attention.self.value", "encoder.layer.1.attention.self.value", entry("Relation"))
        )
        .add_output_soft_label(output(entry("HiddenCosine"), t="last_hidden_state", s="last_hidden_state",
                                      mask="attention_mask", pool="mean"))
    )  # fmt: skip
    teacher, student = bert(4, 8), bert(2, 8)
    model = get_distill_model(teacher, student, config, batch)
    losses = Trainer(model, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01)).train([batch] * 8, 3)
    terms = [n for n in losses.get_metric_names() if "/" in n]
    assert len(terms) == 4
    values = losses.get_metric_values("train_loss_epoch")
    assert values[-1] < values[0]
    assert not any(m._forward_hooks for m in model.get_student_model().modules())
    # What is padded does not count.
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 5:] = 1
    found = {}
    for name, given in (("one", batch), ("two", other)):
        model.eval()
        model(**given)
        found[name] = {k: float(v) for k, v in model.losses.items() if "HiddenMse" in k or "HiddenCosine" in k}
    np.testing.assert_allclose(list(found["one"].values()), list(found["two"].values()), rtol=1e-4)


def test_only_student_and_projections_belong_to_the_module():
    model = dual()
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"student_model", "projections"}
    assert {n.split(".")[0] for n in model.state_dict()} == {"student_model", "projections"}
    model.half().float().train()
    assert model.teacher_model.head.weight.dtype == torch.float32
    assert not model.teacher_model.training


def test_a_teacher_in_another_dtype_is_left_in_it():
    teacher = Encoder(8, 4, 0).to(torch.bfloat16)
    config = KnowledgeDistillConfig().add_output_soft_label(output(entry("KDCrossEntropy"), t="logits", s="logits"))
    model = get_distill_model(teacher, Encoder(8, 2, 1), config)
    soft, _, answers = model(**BATCH)
    assert soft.dtype == torch.float32
    assert answers["logits"].dtype == torch.bfloat16
    soft.backward()


def test_a_copy_is_a_model_of_its_own():
    model = dual().eval()
    expected = model(**BATCH)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.student_model.head.weight.zero_()
    assert float(other(**BATCH)[0]) != float(expected)
    torch.testing.assert_close(model(**BATCH)[0], expected)


def test_hooks_keep_nothing_outside_the_distillation():
    model = dual()
    model.student_model(**BATCH)
    assert not model._stores["s"].seen
    model(**BATCH)
    assert not model._stores["s"].seen
    student = model.get_student_model()
    assert not any(m._forward_hooks for m in student.modules())
    assert not any(m._forward_hooks for m in model.teacher_model.modules())


def test_total_loss_mixes_hard_and_soft():
    teacher, student = Encoder(8, 2, 0), Encoder(8, 2, 1)
    label = output(entry("KDMse"), t="logits", s="logits")
    for weight, share in ((None, 0.5), (0.2, 0.2)):
        config = KnowledgeDistillConfig().add_output_soft_label(label)
        if weight:
            config.set_hard_label(weight, 0)
        model = get_distill_model(teacher, student, config)
        with pytest.raises(ConfigError, match="call the distillation model"):
            model.get_total_loss(torch.tensor(1.0))
        soft = model(**BATCH)[0]
        torch.testing.assert_close(model.get_total_loss(torch.tensor(3.0)), share * 3 + (1 - share) * soft)
        torch.testing.assert_close(model.get_total_loss(), soft)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = dual().eval()
    batch = {k: v.repeat(2, 1) for k, v in BATCH.items()}
    model(**batch)[0].backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for _ in range(2):
        (model(**BATCH)[0] / 2).backward()
    for name, parameter in model.named_parameters():
        # two halves of equal size, summed in float32
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_autocast_computes_the_losses_in_float32():
    model = dual().eval()
    expected = model(**BATCH)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft = model(**BATCH)[0]
    assert soft.dtype == torch.float32
    # bfloat16 has three digits
    torch.testing.assert_close(soft, expected, rtol=0.03, atol=0.03)
    soft.backward()


@pytest.mark.slow
def test_compiled_it_gives_the_same_loss_and_gradients():
    model = dual().eval()
    model(**BATCH)[0].backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**BATCH)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_module_that_did_not_run_is_named():
    class Skips(Encoder):
        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.head(self.embed(input_ids).mean(1))}

    config = KnowledgeDistillConfig().add_inter_soft_label(inner("layers.1", "layers.0", entry("HiddenMse")))
    with pytest.raises(ConfigError, match=r"'layers\.0' did not run"):
        get_distill_model(Encoder(8, 2, 0), Skips(8, 2, 1), config)(**BATCH)


@pytest.mark.slow
def test_fully_sharded_students_learn_the_same(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    expected = dual().eval()
    expected(**BATCH)[0].backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = dual().eval()
        for layer in model.student_model.layers:
            fully_shard(layer)
        fully_shard(model)
        model(**BATCH)[0].backward()
        plain = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), plain[name].grad, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()
