"""MindSpore's own of distillation: compiled graphs equal PyNative, Model.train, names, hard labels, loss scaling."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ConfigError
from slimkit_ms import KnowledgeDistillConfig, get_distill_model
from tests.only_ms.nets_ms import Encoder, Supervised

import mindspore as ms
from mindspore import nn

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, (4, 6)).astype(np.int32)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2] * 2, np.int32)


@pytest.fixture(params=["pynative", "graph"])
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    yield request.param
    ms.set_context(mode=before)


@pytest.fixture(autouse=True)
def _device():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def entry(name, **kw):
    return {"func_name": name, "func_weight": 1, **kw}


def output(*terms, at=0, s=None, **kw):
    return {"t_output_idx": at, "s_output_idx": at if s is None else s, "loss_func": list(terms), **kw}


def config(shift=0):
    return (
        KnowledgeDistillConfig()
        .add_output_soft_label(output(entry("KDCrossEntropy", temperature=2), s=shift))
        .add_inter_soft_label(
            {
                "t_module": "layers.1",
                "s_module": "net.layers.0" if shift else "layers.0",
                **output(entry("HiddenMse"), entry("HiddenCosine"), entry("Relation", func_param=[2]), mask="mask"),
            }
        )
        .add_output_soft_label(output(entry("HiddenCosine"), at=1, s=1 + shift, mask="mask", pool="mean"))
    )


def brief():
    """An output and an inner layer: a graph compiles in half the time, where the terms themselves are not looked at."""
    inner = {"t_module": "layers.1", "s_module": "layers.0", **output(entry("HiddenMse"), mask="mask")}
    return (
        KnowledgeDistillConfig()
        .add_output_soft_label(output(entry("KDCrossEntropy", temperature=2)))
        .add_inter_soft_label(inner)
    )


def batch():
    return ms.Tensor(IDS), ms.Tensor(MASK)


def gradients(dual, scale=1.0):
    weights = dual.trainable_params()
    found = ms.ops.GradOperation(get_by_list=True, sens_param=True)(dual, weights)(
        *batch(), ms.Tensor(scale, ms.float32)
    )
    return {p.name: g.asnumpy() for p, g in zip(weights, found)}


_expected = {}


def test_a_compiled_graph_has_the_losses_and_gradients_of_pynative(mode):
    dual = get_distill_model(Encoder(16, 4, 0), Encoder(8, 2, 1), config(), batch())
    value, grads = float(dual(*batch())), gradients(dual)
    if mode == "pynative":
        _expected.update(value=value, grads=grads, losses=dual.losses)
        assert all(np.abs(g).sum() > 0 for g in grads.values())
        return
    # float32, another order of sums
    assert abs(value - _expected["value"]) < 1e-5
    assert dual.losses.keys() == _expected["losses"].keys()
    np.testing.assert_allclose(list(dual.losses.values()), list(_expected["losses"].values()), atol=1e-5)
    for name, gradient in _expected["grads"].items():
        np.testing.assert_allclose(grads[name], gradient, atol=1e-5)
    # Injected gradients cannot see a loss scale; they are told.
    dual.set_loss_scale(8.0)
    for name, gradient in gradients(dual, 8.0).items():
        np.testing.assert_allclose(gradient, 8 * _expected["grads"][name], atol=1e-4)


def test_model_train_distils_and_gives_the_student_back(mode):
    teacher, student = Encoder(16, 2, 0), Encoder(8, 2, 1)
    names = [p.name for p in (*teacher.get_parameters(), *student.get_parameters())]
    before = [p.asnumpy().copy() for p in teacher.get_parameters()]
    dual = get_distill_model(teacher, student, brief(), batch())
    first = float(dual(*batch()))
    rows = [(IDS[i], MASK[i]) for i in range(4)] * 4
    data = ms.dataset.GeneratorDataset(rows, ["ids", "mask"], shuffle=False).batch(4)
    model = ms.train.Model(dual, optimizer=nn.Adam(dual.trainable_params(), 1e-2))
    model.train(2, data, dataset_sink_mode=False)
    assert not teacher.training
    assert float(dual(*batch())) < first
    assert dual.get_student_model() is student
    assert [p.name for p in (*teacher.get_parameters(), *student.get_parameters())] == names
    assert isinstance(student.layers[0], nn.Dense)
    assert all((a == p.asnumpy()).all() for a, p in zip(before, teacher.get_parameters()))
    again = float(dual(*batch()))
    model.train(1, data, dataset_sink_mode=False)
    assert float(dual(*batch())) < again


def test_the_hard_label_is_the_students_own_loss(mode):
    dual = get_distill_model(Encoder(8, 4, 0), Supervised(8, 2, 1), config(shift=1).set_hard_label(0.3, 0), batch())
    total = float(dual(*batch()))
    soft = sum(dual.losses.values())
    hard = float(dual.get_student_model()(*batch())[0])
    assert abs(total - (0.3 * hard + 0.7 * soft)) < 1e-5


@pytest.mark.parametrize("made_in", ["pynative", "graph"])
def test_a_mode_that_is_set_anew_finds_the_taps_it_needs(made_in):
    """Made for one mode and run in the other: the same losses, and never the tensors of an earlier run."""
    modes = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}
    other = "graph" if made_in == "pynative" else "pynative"
    try:
        ms.set_context(mode=modes[made_in])
        dual = get_distill_model(Encoder(16, 2, 0), Encoder(8, 2, 1), brief(), batch())
        first, losses = float(dual(*batch())), dual.losses
        ms.set_context(mode=modes[other])
        step = nn.TrainOneStepCell(dual, nn.SGD(dual.trainable_params(), 0.05))
        assert abs(float(step(*batch())) - first) < 1e-5  # float32, another order of sums
        np.testing.assert_allclose(list(dual.losses.values()), list(losses.values()), atol=1e-5)
        dual.get_student_model()
        again = nn.TrainOneStepCell(dual, nn.SGD(dual.trainable_params(), 0.05)).set_train()
        assert float(again(*batch())) < first
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_graph_around_a_model_of_pynative_is_refused_in_words():
    """A function that a graph compiles hides the model from us: no noted tensor may become a constant."""
    try:
        ms.set_context(mode=ms.PYNATIVE_MODE)
        dual = get_distill_model(Encoder(8, 2, 0), Encoder(8, 2, 1), brief(), batch())
        dual(*batch())
        weights = ms.ParameterTuple(dual.trainable_params())
        ms.set_context(mode=ms.GRAPH_MODE)

        def loss(ids, mask):
            return dual(ids, mask)

        with pytest.raises(RuntimeError, match="made ready for PyNative"):
            ms.value_and_grad(loss, None, weights)(*batch())
        dual.set_train()
        value, gradients = ms.value_and_grad(loss, None, weights)(*batch())
        assert np.isfinite(float(value))
        assert any(np.abs(g.asnumpy()).sum() > 0 for g in gradients)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_inner_layers_in_a_graph_need_an_example():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with pytest.raises(ConfigError, match="example batch"):
            get_distill_model(Encoder(8, 4, 0), Encoder(8, 2, 1), config())
    finally:
        ms.set_context(mode=before)
