"""Distillation, alike in both wings: losses against NumPy, the dual model, its errors, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig, LossTerm
from slimkit.core.distill.losses import reference
from slimkit.core.distill.shapes import projection_values
from slimkit.core.errors import ConfigError

SHAPES = {
    "logits": ((4, 7), (4, 3, 7)),
    "hidden": ((4, 6), (4, 5, 6), (2, 6, 3, 3)),
    "relation": ((4, 6), (4, 5, 6), (2, 6, 3, 3)),
    "attention": ((2, 3, 5, 5), (2, 5, 5)),
}
CASES = [
    (name, shape, masked)
    for name, (kind, _, _) in LOSSES.items()
    for shape in SHAPES[kind]
    for masked in (False, True)
    if not masked or len(shape) == 3 or kind == "attention"
]


def value_and_gradient(kit, name, s, t, mask, **kw):
    term = LossTerm(name, 1.0, **kw)
    losses = kit.room("distill.losses")
    if kit.name == "torch":
        s = kit.tensor(s).requires_grad_()
        value = losses.LOSSES[name](s, kit.tensor(t), term, None if mask is None else kit.tensor(mask))
        value.backward()
        return float(value.detach()), kit.array(s.grad)
    loss = losses.LOSSES[name](term)
    mask = None if mask is None else kit.tensor(mask)
    value, gradient = kit.ms.value_and_grad(lambda s, t: loss(s, t, mask))(kit.tensor(s), kit.tensor(t))
    return float(value), kit.array(gradient)


def slope(name, s, t, mask, **kw):
    """The gradient by central differences in float64."""
    term, found, step = LossTerm(name, 1.0, **kw), np.zeros(s.shape), 1e-5
    for place in np.ndindex(s.shape):
        low, high = s.astype(np.float64), s.astype(np.float64)
        low[place] -= step
        high[place] += step
        found[place] = (reference(high, t, term, mask) - reference(low, t, term, mask)) / (2 * step)
    return found


@pytest.mark.parametrize(("name", "shape", "masked"), CASES)
def test_each_loss_agrees_with_numpy_in_value_and_gradient(kit, name, shape, masked):
    rng = np.random.default_rng(1)
    s, t = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    mask = None
    if masked:
        mask = (
            np.arange(shape[-2] if LOSSES[name][0] == "attention" else shape[1]) < np.array([[3], [2]] * 2)[: shape[0]]
        ).astype(np.float32)
    kw = {"temperature": 2.0} if LOSSES[name][1] else {}
    if name == "Relation":
        kw["func_param"] = (2,)
    value, gradient = value_and_gradient(kit, name, s, t, mask, **kw)
    # the contract's 1e-5, in float32
    assert abs(value - reference(s, t, LossTerm(name, 1.0, **kw), mask)) < 1e-5
    np.testing.assert_allclose(gradient, slope(name, s, t, mask, **kw), atol=1e-5)


def pieces(kit):
    """Teacher 5 -> 8 -> 8 -> 3 and student 5 -> 4 -> 4 -> 3."""

    def net(width):
        layers = {"first": kit.linear(5, width), "act": kit.relu(), "second": kit.linear(width, width)}
        return kit.named(**layers, head=kit.linear(width, 3))

    return kit.fill(net(8), 1), kit.fill(net(4), 2)


def names(model, kit):
    return list(kit.params(model))


def term(name="HiddenMse", weight=1, **kw):
    return {"func_name": name, "func_weight": weight, **kw}


def output(*terms, **kw):
    return {"t_output_idx": 0, "s_output_idx": 0, "loss_func": list(terms), **kw}


def inner(*terms, t="second", s="second", **kw):
    return {"t_module": t, "s_module": s, **output(*terms, **kw)}


def soft(kit, dual, x):
    found = dual(x)
    return found[0].detach() if kit.name == "torch" else found


def forward(values, x, upto="head"):
    h = x @ values["first.weight"].T + values["first.bias"]
    if upto == "first":
        return h
    h = np.maximum(h, 0) @ values["second.weight"].T + values["second.bias"]
    return h if upto == "second" else h @ values["head.weight"].T + values["head.bias"]


X = np.random.default_rng(5).standard_normal((6, 5)).astype(np.float32)


def test_the_soft_loss_is_the_weighted_sum_of_its_terms(kit):
    teacher, student = pieces(kit)
    config = (
        KnowledgeDistillConfig()
        .add_output_soft_label(output(term("KDCrossEntropy", 2, temperature=3), term("KDMse", 0.5)))
        .add_output_soft_label(output(term("KDKLDiv", 1, temperature=2, t_squared=True)))
        .add_inter_soft_label(inner(term("MMD"), t="first", s="first"))
        .add_inter_soft_label(inner(term("HiddenMse", 0.25), term("HiddenCosine")))
    )
    tv, sv = kit.values(teacher), kit.values(student)
    dual = kit.slim.get_distill_model(teacher, student, config, kit.tensor(X))
    value = float(soft(kit, dual, kit.tensor(X)))
    t, s = forward(tv, X), forward(sv, X)
    projected = forward(sv, X, "second") @ projection_values(4, 8, 3).T
    expected = {
        "output/KDCrossEntropy": (2, reference(s, t, LossTerm("KDCrossEntropy", 1, 3))),
        "output/KDMse": (0.5, reference(s, t, LossTerm("KDMse", 1))),
        "output#2/KDKLDiv": (4, reference(s, t, LossTerm("KDKLDiv", 1, 2))),
        "first/MMD": (1, reference(forward(sv, X, "first"), forward(tv, X, "first"), LossTerm("MMD", 1))),
        "second/HiddenMse": (0.25, reference(projected, forward(tv, X, "second"), LossTerm("HiddenMse", 1))),
        "second/HiddenCosine": (1, reference(projected, forward(tv, X, "second"), LossTerm("HiddenCosine", 1))),
    }
    found = {name: float(v) for name, v in dual.losses.items()}
    assert found.keys() == expected.keys()
    for name, (_, v) in expected.items():
        assert abs(found[name] - v) < 1e-5 * max(1, abs(v)), name
    total = sum(w * v for w, v in expected.values())
    assert abs(value - total) < 1e-5 * total


def test_training_moves_student_and_projection_and_not_the_teacher(kit):
    teacher, student = pieces(kit)
    config = KnowledgeDistillConfig().add_inter_soft_label(inner(term())).add_output_soft_label(output(term("KDMse")))
    t_names, s_names = names(teacher, kit), names(student, kit)
    before = kit.values(teacher)
    dual = kit.slim.get_distill_model(teacher, student, config, kit.tensor(X))
    if kit.name == "torch":
        trained = list(dual.parameters())
        optimizer = kit.torch.optim.SGD(trained, lr=0.05)
    else:
        trained = dual.trainable_params()
        optimizer = kit.ms.nn.SGD(trained, learning_rate=0.05)
    assert len(trained) == len(s_names) + 1
    trainer = kit.room("train").Trainer(dual, optimizer=optimizer)
    history = trainer.train([(kit.tensor(X),)] * 10, 6)
    losses = history.get_metric_values("train_loss_epoch")
    assert losses[-1] < 0.5 * losses[0]
    got = dual.get_student_model()
    assert got is student
    assert names(student, kit) == s_names
    assert names(teacher, kit) == t_names
    after = kit.values(teacher)
    assert all((before[k] == after[k]).all() for k in before)
    # the student is whole on its own, and the dual goes on
    np.testing.assert_allclose(kit.array(student(kit.tensor(X))), forward(kit.values(student), X), atol=1e-5)
    assert abs(float(soft(kit, dual, kit.tensor(X))) - losses[-1]) < losses[-1]
    assert trainer.train([(kit.tensor(X),)] * 10, 2).get_latest_metric("train_loss_epoch") <= losses[-1]


def test_the_teacher_stays_in_eval_mode(kit):
    teacher, student = pieces(kit)
    dual = kit.slim.get_distill_model(
        teacher, student, KnowledgeDistillConfig().add_output_soft_label(output(term("KDMse")))
    )
    (dual.train() if kit.name == "torch" else dual.set_train())
    assert not teacher.training
    assert student.training
    dual(kit.tensor(X))
    assert not teacher.training


def test_a_trained_teacher_gets_gradients(kit):
    teacher, student = pieces(kit)
    config = KnowledgeDistillConfig().set_teacher_train().add_output_soft_label(output(term("KDMse")))
    dual = kit.slim.get_distill_model(teacher, student, config)
    n = len(list(dual.parameters())) if kit.name == "torch" else len(dual.trainable_params())
    assert n == 12
    if kit.name == "torch":
        dual(kit.tensor(X))[0].backward()
        assert teacher.head.weight.grad is not None
    else:
        gradients = kit.ms.value_and_grad(dual, None, dual.trainable_params())(kit.tensor(X))[1]
        assert all(float(abs(g).sum()) > 0 for g in gradients)


def test_inputs_of_a_module_can_be_compared(kit):
    teacher, student = pieces(kit)
    config = KnowledgeDistillConfig().add_inter_soft_label(
        inner(term("MMD"), t="head", s="head", t_side="input", s_side="input")
    )
    tv, sv = kit.values(teacher), kit.values(student)
    dual = kit.slim.get_distill_model(teacher, student, config, kit.tensor(X))
    expected = reference(forward(sv, X, "second"), forward(tv, X, "second"), LossTerm("MMD", 1))
    assert abs(float(soft(kit, dual, kit.tensor(X))) - expected) < 1e-5 * max(1, expected)


def test_custom_losses_are_called_and_trained(kit):
    teacher, student = pieces(kit)
    if kit.name == "torch":

        class Scaled(kit.Module):
            def __init__(self):
                super().__init__()
                self.scale = kit.torch.nn.Parameter(kit.torch.ones(()))

            def forward(self, s, t):
                return (self.scale * s - t).abs().mean()
    else:
        from tests.both.scaled_ms import Scaled
    config = (
        KnowledgeDistillConfig().add_custom_loss_func("scaled", Scaled()).add_output_soft_label(output(term("scaled")))
    )
    tv, sv = kit.values(teacher), kit.values(student)
    dual = kit.slim.get_distill_model(teacher, student, config)
    assert abs(float(soft(kit, dual, kit.tensor(X))) - np.abs(forward(sv, X) - forward(tv, X)).mean()) < 1e-5
    trained = (
        [n for n, _ in dual.named_parameters()] if kit.name == "torch" else [p.name for p in dual.trainable_params()]
    )
    assert any("scale" in n for n in trained)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (inner(term(), t="secnd"), "Did you mean 'second'"),
        (inner(term(), s="nothing.here"), "s_module"),
        (inner(term(), s_output_idx=2), "out of range"),
        (output(term("KDMse"), t_output_idx=1), "out of range"),
        (inner(term("KDMse")), "needs equal shapes"),
        (inner(term(), shape=[9]), "shape"),
        (inner(term("Relation", func_param=[3])), "3 heads"),
        (inner(term(), mask="padding"), "mask"),
    ],
)
def test_mistakes_are_found_on_an_example_and_change_nothing(kit, label, said):
    teacher, student = pieces(kit)
    t_names, s_names = names(teacher, kit), names(student, kit)
    (teacher.train() if kit.name == "torch" else teacher.set_train())
    config = KnowledgeDistillConfig()
    (config.add_inter_soft_label if "t_module" in label else config.add_output_soft_label)(label)
    with pytest.raises(ConfigError, match=said):
        kit.slim.get_distill_model(teacher, student, config, kit.tensor(X))
    assert teacher.training
    assert names(teacher, kit) == t_names
    assert names(student, kit) == s_names
    np.testing.assert_allclose(kit.array(student(kit.tensor(X))), forward(kit.values(student), X), atol=1e-5)


def test_without_an_example_the_first_batch_tells(kit):
    teacher, student = pieces(kit)
    dual = kit.slim.get_distill_model(teacher, student, KnowledgeDistillConfig().add_inter_soft_label(inner(term())))
    with pytest.raises(ConfigError, match="widths 4 and 8 differ"):
        dual(kit.tensor(X))
    config = KnowledgeDistillConfig().add_inter_soft_label(inner(term(), widths=[4, 8]))
    dual = kit.slim.get_distill_model(*pieces(kit), config)
    assert float(soft(kit, dual, kit.tensor(X))) > 0


def test_wrong_arguments_are_refused(kit):
    teacher, student = pieces(kit)
    config = KnowledgeDistillConfig().add_output_soft_label(output(term("KDMse")))
    for arguments in ((3, student, config), (teacher, 3, config), (teacher, student, 3)):
        with pytest.raises(TypeError):
            kit.slim.get_distill_model(*arguments)
    with pytest.raises(ValueError, match="another"):
        kit.slim.get_distill_model(teacher, teacher, config)
