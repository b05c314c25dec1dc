"""The trainer and values that are not what one hopes for: streams, NaN, states that cannot be kept, odd factors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError, UnsupportedError
from slimkit.core.train.packing import pack, unpack
from tests.both.test_train import Pairs, SaveAt, made, steps


def stream(kit, data):
    """A stream of single samples, without length or indexing."""
    if kit.name == "mindspore":
        return kit.ms.dataset.GeneratorDataset(lambda: iter(data[i] for i in range(len(data))), ["x", "y"])

    class Stream(kit.torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data[i] for i in range(len(data)))

    return Stream()


@pytest.mark.parametrize(("n", "size", "drop_last", "updates"), [(37, 8, False, 5), (37, 8, True, 4), (5, 8, False, 1)])
def test_a_stream_of_samples_is_batched(kit, n, size, drop_last, updates):
    kwargs = {"drop_last": drop_last}
    trainer = made(kit)
    history = trainer.train(stream(kit, Pairs(n)), 2, per_device_batch_size=size, train_dataloader_kwargs=kwargs)
    assert len(steps(history)) == 2 * updates
    # The same batches as a map-style data set gives in its own order.
    same = {"shuffle": False, **kwargs}
    expected = made(kit).train(Pairs(n), 2, per_device_batch_size=size, train_dataloader_kwargs=same)
    assert (steps(history) == steps(expected)).all()
    whole = trainer.evaluate(Pairs(n), per_device_batch_size=n)["loss"]
    # float32 sums in other orders
    np.testing.assert_allclose(trainer.evaluate(stream(kit, Pairs(n)), size)["loss"], whole, rtol=1e-5)


def test_a_data_set_that_is_used_up_after_one_epoch_is_an_error(kit):
    class Once:
        def __init__(self):
            data = Pairs(4)
            self.rest = iter([(kit.tensor(data.x), kit.tensor(data.y))])

        def __iter__(self):
            return self.rest

    with pytest.raises(ConfigError, match="no batch in epoch 2"):
        made(kit).train(Once(), 3)


class Scripted:
    """A metric whose values are given, one an evaluation."""

    def __init__(self, values):
        self.values, self.now = values, 0.0

    def on_epoch_begin(self, trainer):
        self.now = self.values[trainer.epoch - 1]

    def __call__(self, outputs, targets):
        return self.now


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "mode", "epochs", "best"),
    [
        ((NAN, 0.5, 0.4, 0.3, 0.2), "min", 5, 0.2),
        ((INF, 0.5, 0.4, 0.3, 0.2), "min", 5, 0.2),
        ((-INF, 0.5, 0.4, 0.3, 0.2), "min", 5, 0.2),
        ((INF, 0.2, 0.3, 0.4, 0.5), "max", 5, 0.5),
        ((0.5, NAN, 0.4, NAN, 0.3), "min", 5, 0.3),
        ((0.5, NAN, INF, 0.4, 0.3), "min", 3, 0.5),  # two epochs without an improvement
        ((NAN, NAN, 0.1, 0.1, 0.1), "max", 2, None),
    ],
)
def test_a_metric_that_is_not_finite_is_no_improvement_and_never_the_best(kit, tmp_path, values, mode, epochs, best):
    metric = Scripted(values)
    slim = kit.slim
    stopping = slim.EarlyStopping("eval_m_epoch", 2, mode)
    keeper = slim.Checkpoints(tmp_path, "eval_m_epoch", mode)
    logs = [slim.CSVLogger(tmp_path / "run.csv"), slim.JSONLogger(tmp_path / "run.jsonl"), slim.ProgressBar(0)]
    trainer = made(kit, metrics={"m": metric}, callbacks=[metric, stopping, keeper, *logs])
    history = trainer.train(Pairs(8), 5, eval_dataset=Pairs(8))
    assert history.current_epoch == epochs + 1
    assert stopping.best.value == best
    assert (tmp_path / "best").exists() == (best is not None)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    shown = [row["eval_m_epoch"] for row in rows]
    assert shown == [v if math.isfinite(v) else None for v in np.float32(values[:epochs]).tolist()] or shown == [
        v if math.isfinite(v) else None for v in values[:epochs]
    ]
    again = made(kit, metrics={"m": metric}, callbacks=[slim.EarlyStopping("eval_m_epoch", 2, mode)])
    resumed = again.train(Pairs(8), epochs, eval_dataset=Pairs(8), resume_from=tmp_path / "last")
    np.testing.assert_array_equal(  # NaN equals NaN here
        resumed.get_metric_values("eval_m_epoch"), history.get_metric_values("eval_m_epoch")
    )


@pytest.mark.parametrize("odd", [(NAN,), (INF, -INF), (NAN, INF)])
def test_a_step_that_is_not_finite_is_recorded_and_left_out_of_the_epochs_mean(kit, tmp_path, odd, caplog):
    factors = [1.0, *odd, 1.0]

    def compute(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean() * 0 + batch["f"].mean()

    data = Pairs(4)
    batches = [
        {"x": kit.tensor(data.x), "y": kit.tensor(data.y), "f": kit.tensor(np.full(4, f, np.float32))} for f in factors
    ]
    keeper = kit.slim.Checkpoints(tmp_path, "train_loss_epoch")
    history = made(kit, compute_loss=compute, callbacks=[keeper]).train(batches, 1)
    assert not np.isfinite(steps(history)[1 : 1 + len(odd)]).any()
    # whether a step's NaN spoils the steps after it is the model's affair; here the first one is finite
    finite = steps(history)[np.isfinite(steps(history))]
    assert history.get_latest_metric("train_loss_epoch") == finite.mean()
    assert "are not finite and not in its mean" in caplog.text
    assert (tmp_path / "best").exists()
    assert (tmp_path / "last").exists()


class Deaf:
    """A scheduler that tells no state."""

    def __init__(self, optimizer):
        self.n = 0

    def step(self):
        self.n += 1


def test_a_state_that_could_not_be_put_back_is_refused_when_it_is_saved(kit, tmp_path):
    made(kit, callbacks=[SaveAt(2, tmp_path / "at")]).train(Pairs(), 1)
    before = {f.name: f.read_bytes() for f in (tmp_path / "at").iterdir()}
    with pytest.raises(UnsupportedError, match="Deaf"):
        made(kit, callbacks=[SaveAt(3, tmp_path / "at")]).train(Pairs(), 1, create_scheduler_fn=Deaf)

    class Strange:
        def state_dict(self):
            return {"what": object()}

        def on_step_end(self, trainer):
            """Nothing."""

    with pytest.raises(UnsupportedError, match="object"):
        made(kit, callbacks=[Strange(), SaveAt(3, tmp_path / "at")]).train(Pairs(), 1)
    assert {f.name: f.read_bytes() for f in (tmp_path / "at").iterdir()} == before


def test_a_callbacks_numbers_come_back_whatever_their_kind(kit, tmp_path):
    class Remembers:
        state = None

        def on_step_end(self, trainer):
            """Nothing."""

        def state_dict(self):
            one = kit.tensor(np.array(2.5, np.float32))
            return {"nan": NAN, "np": np.float32(0.1), "n": np.int64(3), "yes": True, "deep": [{"inf": -INF}], "t": one}

        def load_state_dict(self, state):
            self.state = state

    made(kit, callbacks=[Remembers(), SaveAt(2, tmp_path / "at")]).train(Pairs(), 1)
    fresh = Remembers()
    made(kit, callbacks=[fresh]).train(Pairs(), 1, resume_from=tmp_path / "at")
    assert math.isnan(fresh.state["nan"])
    del fresh.state["nan"]
    assert fresh.state == {"np": float(np.float32(0.1)), "n": 3, "yes": True, "deep": [{"inf": -INF}], "t": 2.5}


def own_schedules(kit):
    if kit.name == "torch":
        lr = kit.torch.optim.lr_scheduler
    else:
        lr = kit.ms.experimental.optim.lr_scheduler
    return [
        lambda o: lr.StepLR(o, 2, 0.5),
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.5, 3), lr.ExponentialLR(o, 0.9)], [2]),
        lambda o: lr.LambdaLR(o, lambda step: 1 / (1 + step)),
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_frameworks_own_schedule_goes_on_where_it_was(kit, tmp_path, number):
    create = own_schedules(kit)[number]
    optimizer = (
        (lambda p: kit.torch.optim.SGD(p, lr=0.1))
        if kit.name == "torch"
        else (lambda p: kit.ms.experimental.optim.SGD(p, lr=0.1))
    )
    plan = {"num_epochs": 2, "create_scheduler_fn": create}
    whole = made(kit, optimizer=optimizer, callbacks=[SaveAt(3, tmp_path / "at")]).train(Pairs(), **plan)
    resumed = made(kit, optimizer=optimizer).train(Pairs(), **plan, resume_from=tmp_path / "at")
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.array(0.5), np.array([0.5]), "tensor"])
def test_a_schedules_factor_may_be_any_one_number(kit, value):
    factor = kit.tensor(np.float32(0.5)) if isinstance(value, str) else value
    trainer = made(kit)
    history = trainer.train(Pairs(8), 1, create_scheduler_fn=lambda o: lambda step: factor)
    expected = 0.1 * (1 if value == 1 else 0.5)
    np.testing.assert_allclose(history.get_metric_values("learning_rate"), [expected], rtol=1e-6)  # float32


@pytest.mark.parametrize("value", [NAN, INF, -0.5, True, None, "fast", np.ones(2)])
def test_a_schedules_factor_that_is_no_number_is_refused(kit, value):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="factor"):
        made(kit).train(Pairs(8), 1, create_scheduler_fn=lambda o: lambda step: value)


@pytest.mark.parametrize("value", [0.5, [0.1, 0.2], "linear"])
def test_what_is_no_scheduler_is_refused_at_the_start(kit, value):
    with pytest.raises(ArgumentTypeError, match="create_scheduler_fn's result"):
        made(kit).train(Pairs(8), 1, create_scheduler_fn=lambda o: value)


ARRAYS = [
    np.array([1.5, NAN, INF], np.float32), np.zeros((0, 3)), np.array(7, np.uint8), np.arange(6).reshape(2, 3),
    np.array([0.1], np.float16), np.array([True, False]), np.array([2**64 - 1], np.uint64), np.array([5e-324]),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_come_back_with_shape_type_and_every_bit(array):
    packed = json.loads(json.dumps(pack({"a": (array, 1)}, lambda value: None), allow_nan=False))
    found = unpack(packed, {}.__getitem__)["a"][0]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array(["a"]), np.ones(2, complex), {1, 2}, b"x", 1j, np.datetime64("2020-01-01")]
)
def test_what_would_not_come_back_is_refused(value):
    with pytest.raises(UnsupportedError, match="cannot hold"):
        pack([value], lambda _: None)


def test_training_while_deltas_are_merged_says_so(kit, caplog):
    trainer = made(kit)
    layer = next(iter(kit.slim.apply_delta(trainer.model, "lora", rank=2, also_train=["*"]).layers))
    kit.slim.merge_delta(trainer.model)
    trainer.train(Pairs(8), 1)
    assert caplog.text.count("merged and do not train") == 1, layer
    caplog.clear()
    with pytest.raises(ValueError, match="trained since the deltas were merged"):
        kit.slim.unmerge_delta(trainer.model)  # also_train changed the merged weight: it is nowhere else
    again = made(kit)
    kit.slim.apply_delta(again.model, "lora", rank=2, also_train=["*"])
    again.train(Pairs(8), 1)
    kit.slim.merge_delta(again.model)
    again.evaluate(Pairs(8))  # no training
    assert "merged" not in caplog.text


def in_training(kit, model, on=True):
    """A step of a loop of one's own: training mode, and a run of which gradients are taken."""
    kit.train_mode(model, on)
    x = kit.tensor(np.ones((2, 5), np.float32))
    if kit.name == "torch":
        model(x).sum()
    else:
        kit.ms.grad(lambda x: model(x).sum())(x)


def test_a_loop_of_ones_own_is_told_as_well(kit, caplog):
    model = made(kit).model
    kit.train_mode(model, False)
    kit.slim.apply_delta(model, "lora", rank=2)
    kit.slim.merge_delta(model)
    in_training(kit, model, on=False)
    assert "merged" not in caplog.text
    for _ in range(2):
        in_training(kit, model)
    assert caplog.text.count("merged and do not train") == 1
    caplog.clear()
    kit.slim.unmerge_delta(model)
    in_training(kit, model)
    assert "merged" not in caplog.text


@pytest.mark.parametrize("value", ["0.5", None, 1 + 2j, np.zeros(2)], ids=repr)
def test_a_metric_that_is_no_number_is_named(kit, value):
    trainer = made(kit, metrics={"accuracy": lambda outputs, targets: value})
    with pytest.raises(ArgumentTypeError, match=r"metrics\['accuracy'\] must be one number"):
        trainer.evaluate(Pairs(8))


@pytest.mark.parametrize("value", [True, 3, np.float32(2), np.full((1, 1), 2.0)], ids=repr)
def test_a_metric_may_be_any_one_number(kit, value):
    found = made(kit, metrics={"m": lambda outputs, targets: value}).evaluate(Pairs(8))["m"]
    assert found == float(np.asarray(value).reshape(()))
    tensor = kit.tensor(np.asarray(value, np.float32))
    assert made(kit, metrics={"m": lambda outputs, targets: tensor}).evaluate(Pairs(8))["m"] == found


def test_a_loss_has_one_element(kit):
    def loss(shape):
        def compute(model, batch):
            error = (model(batch[0]) - batch[1]) ** 2
            return error.reshape(-1) if shape is None else error.mean().reshape(shape)

        return compute

    plain = steps(made(kit, compute_loss=loss(())).train(Pairs(8), 1))
    assert steps(made(kit, compute_loss=loss((1, 1))).train(Pairs(8), 1)) == plain
    trainer = made(kit, compute_loss=loss(None))
    before = kit.values(trainer.model)
    with pytest.raises(ArgumentTypeError, match=r"the loss must be one number.*of shape \(16,\)"):
        trainer.train(Pairs(8), 1)
    assert all((kit.values(trainer.model)[n] == v).all() for n, v in before.items())


@pytest.mark.parametrize("scheduled", [False, True])
def test_each_group_of_parameters_keeps_its_rate(kit, scheduled):
    def grouped(parameters):
        first, *rest = parameters
        groups = [{"params": [first], "lr": 0.2}, {"params": rest}]
        return kit.torch.optim.SGD(groups, 0.1) if kit.name == "torch" else kit.ms.nn.SGD(groups, 0.1)

    def halved(optimizer):
        if kit.name == "torch":
            return kit.torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        return lambda step: 0.5

    trainer = made(kit, optimizer=grouped)
    before = [kit.array(p) for p in kit.params(trainer.model).values()]
    seen = trainer.train(Pairs(8), 1, create_scheduler_fn=halved if scheduled else None)
    assert seen.get_latest_metric("learning_rate") == pytest.approx(0.1 if scheduled else 0.2)
    moved = [kit.array(p) - b for p, b in zip(kit.params(trainer.model).values(), before)]
    # One rate for all, against which each group is compared.
    plain = made(kit)
    plain.train(Pairs(8), 1)
    same = [kit.array(p) - b for p, b in zip(kit.params(plain.model).values(), before)]
    factor = 0.5 if scheduled else 1.0
    np.testing.assert_allclose(moved[0], same[0] * 2 * factor, rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(moved[1:], same[1:]):
        np.testing.assert_allclose(ours, theirs * factor, rtol=1e-4, atol=1e-7)
