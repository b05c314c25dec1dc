"""What MindSpore's users hand over as data: iterators of pipelines, and NumPy arrays."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import slimkit_ms
from slimkit.core.batch import dataset
from slimkit.core.errors import ArgumentTypeError
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


ROWS = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)


def net():
    layers = nn.Dense(6, 16), nn.ReLU(), nn.Dense(16, 12), nn.ReLU(), nn.Dense(12, 3)
    return zoo_ms.randomise(nn.SequentialCell(*layers))


def pipeline(columns=("x",)):
    rows = [tuple(row for _ in columns) for row in ROWS]
    return ms.dataset.GeneratorDataset(rows, list(columns), shuffle=False).batch(8)


# Every form of the same two batches.
FORMS = {
    "tensors": lambda: [ms.Tensor(ROWS[:8]), ms.Tensor(ROWS[8:])],
    "numpy": lambda: [ROWS[:8], ROWS[8:]],
    "numpy tuples": lambda: [(ROWS[:8],), (ROWS[8:],)],
    "pipeline": lambda: pipeline(),
    "tuple iterator": lambda: pipeline().create_tuple_iterator(),
    "read once": lambda: pipeline().create_tuple_iterator(num_epochs=1, output_numpy=True),
    "dict iterator": lambda: pipeline(["input_data"]).create_dict_iterator(num_epochs=1),
}


class Named(nn.Cell):
    """A net whose argument has the name of a column."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def construct(self, input_data):
        return self.body(input_data)


@pytest.mark.parametrize("form", list(FORMS))
def test_sparsity_pruning_and_measures_read_every_form(form):
    expected, model = Named(), Named()
    slimkit_ms.Compressor(expected, slimkit_ms.SparseConfig(method="hessian")).compress(FORMS["tensors"]())
    slimkit_ms.Compressor(model, slimkit_ms.SparseConfig(method="hessian")).compress(FORMS[form]())
    for p, q in zip(expected.get_parameters(), model.get_parameters()):
        np.testing.assert_array_equal(p.asnumpy(), q.asnumpy())
    kept = []
    for data in ("tensors", form):
        model = Named()
        pruner = slimkit_ms.PruneMindSpore(model, ROWS[:2] if data == form else ms.Tensor(ROWS[:2])).set_alignment(2)
        pruner.set_importance_evaluation_function("taylor", calibration=FORMS[data]())
        pruner.set_compensation(FORMS[data]())
        kept.append(pruner.prune(0.6, [-1])["variables"])
        kept.append({p.name: p.asnumpy().tolist() for p in model.get_parameters()})
    assert kept[0] == kept[2]
    assert kept[1] == kept[3]
    measured = [slimkit_ms.measure_activations(Named(), FORMS[data]()) for data in ("tensors", form)]
    assert all(np.array_equal(measured[0][n], measured[1][n]) for n in measured[0])


@pytest.mark.parametrize("form", ["tuple iterator", "read once"])
def test_an_iterator_is_read_once_and_the_log_says_so(form, caplog):
    data = FORMS[form]()
    with caplog.at_level(logging.INFO, logger="slimkit"):
        batches = dataset(data)
    assert [len(batches), len(list(batches)), len(list(batches))] == [2, 2, 2]
    assert [r.message for r in caplog.records] == ["dataset: 2 batches of a pipeline's iterator were read into memory"]
    with pytest.raises(ArgumentTypeError, match="re-iterable"):
        dataset(iter(batches))


@pytest.mark.parametrize("form", ["pipeline", "tuple iterator", "read once"])
def test_a_trainer_takes_them_for_several_epochs(form):
    model = net()
    start = model[4].weight.asnumpy().copy()
    trainer = slimkit_ms.Trainer(model, loss_func=None, compute_loss=lambda m, batch: ops.square(m(batch[0])).mean())
    history = trainer.train(FORMS[form](), num_epochs=3, per_device_batch_size=8)
    assert trainer.global_step == 6
    assert history is not None
    assert not np.array_equal(model[4].weight.asnumpy(), start)


def test_labels_reach_the_loss_as_tensors_and_a_teacher_cache_tells_arrays_apart(tmp_path):
    seen = []

    def loss(output, batch):
        seen.append(type(batch[1]))
        return (output * batch[1]).sum()

    labels = np.ones((8, 3), np.float32)
    pruner = slimkit_ms.PruneMindSpore(net(), ROWS[:2]).set_alignment(2)
    pruner.set_importance_evaluation_function("taylor", calibration=[(ROWS[:8], labels)], loss=loss)
    pruner.analysis(0.6, [-1])
    assert set(seen) == {ms.Tensor}
    config = slimkit_ms.KnowledgeDistillConfig().add_output_soft_label(
        {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDCrossEntropy", "func_weight": 1}]}
    )
    teacher = net()
    cache = slimkit_ms.TeacherCache.build(teacher, FORMS["numpy"](), config, str(tmp_path / "cache"), top_k=3)
    dual = slimkit_ms.get_distill_model(cache, net(), config)
    live = slimkit_ms.get_distill_model(teacher, net(), config)
    for batch in FORMS["tensors"]():
        np.testing.assert_allclose(float(dual(batch)), float(live(batch)), rtol=1e-4)  # float32 logits, all three kept


def test_exports_take_arrays_as_examples(tmp_path):
    assert max(slimkit_ms.export_onnx(net(), ROWS[:2], str(tmp_path / "a.onnx")).differences.values()) < 1e-5
    assert max(slimkit_ms.export_mindir(net(), ROWS[:2], str(tmp_path / "a.mindir")).differences.values()) < 1e-5
