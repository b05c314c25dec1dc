"""The trainer, alike in both wings: order, history, accumulation, clipping, schedules, resuming, stopping, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimkit.core.errors import ConfigError
from slimkit.core.train.callbacks import TrainerCallback
from slimkit.core.train.history import InMemoryRunHistory
from slimkit.core.train.schedules import cosine_schedule, linear_schedule


class Pairs:
    """A map-style data set of 40 samples: y is a fixed linear function of x."""

    def __init__(self, n=40):
        rng = np.random.default_rng(3)
        self.x = rng.standard_normal((n, 5)).astype(np.float32)
        self.y = (self.x @ rng.standard_normal((5, 2))).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def made(kit, **kwargs):
    model = kit.fill(kit.sequential(kit.linear(5, 4), kit.relu(), kit.linear(4, 2)))
    if kit.name == "torch":
        nn = kit.torch.nn
        optimizer = kwargs.pop("optimizer", lambda p: kit.torch.optim.SGD(p, lr=0.1))
        loss = nn.functional.mse_loss
    else:
        optimizer = kwargs.pop("optimizer", lambda p: kit.ms.nn.SGD(p, learning_rate=0.1))
        loss = kit.ms.nn.MSELoss()
    if "compute_loss" in kwargs:
        loss = None
    return kit.room("train").Trainer(model, loss, optimizer, **kwargs)


def steps(history):
    return np.array(history.get_metric_values("train_loss_step"))


def by_hand(n_epochs, batch_size=8, lr=0.1, accumulate=1, clip=None):
    """The same training in NumPy: the referee."""
    from slimkit.core.train.loading import epoch_batches

    rng = np.random.default_rng(0)
    shapes = [(4, 5), (4,), (2, 4), (2,)]
    w1, b1, w2, b2 = (rng.standard_normal(s).astype(np.float32) * 0.3 for s in shapes)
    data, found = Pairs(), []
    for epoch in range(1, n_epochs + 1):
        batches = epoch_batches(40, batch_size, seed=0, epoch=epoch)
        for start in range(0, len(batches), accumulate):
            group, losses, total = batches[start : start + accumulate], [], None
            for rows in group:
                x, y = data.x[rows], data.y[rows]
                h = np.maximum(x @ w1.T + b1, 0)
                d = h @ w2.T + b2 - y
                losses.append((d**2).mean())
                d = 2 * d / d.size / len(group)
                dh = d @ w2 * (h > 0)
                grads = [dh.T @ x, dh.sum(0), d.T @ h, d.sum(0)]
                total = grads if total is None else [a + b for a, b in zip(total, grads)]
            if clip:
                total = [np.clip(g, -clip, clip) for g in total]
            w1, b1, w2, b2 = (p - lr * g for p, g in zip((w1, b1, w2, b2), total))
            found.append(np.mean(losses))
    return np.array(found)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_clip_value": 0.01}])
def test_losses_are_those_of_numpy(kit, options):
    history = made(kit).train(Pairs(), 2, **options)
    accumulate, clip = options.get("gradient_accumulation_steps", 1), options.get("gradient_clip_value")
    expected = by_hand(2, accumulate=accumulate, clip=clip)
    # float32 against float32 in another order of sums, after at most 10 updates
    np.testing.assert_allclose(steps(history), expected, rtol=2e-5)


def test_history_holds_each_epoch(kit):
    trainer = made(kit, metrics={"error": lambda out, y: abs(out - y).mean()})
    history = trainer.train(Pairs(), 3, eval_dataset=Pairs(12), per_device_batch_size=10)
    assert history.current_epoch == 4
    assert len(steps(history)) == 12
    for name in ("train_loss_epoch", "eval_loss_epoch", "eval_error_epoch", "learning_rate"):
        assert len(history.get_metric_values(name)) == 3, name
    np.testing.assert_allclose(history.get_metric_values("train_loss_epoch")[0], steps(history)[:4].mean(), rtol=1e-6)
    again = trainer.evaluate(Pairs(12), per_device_batch_size=5)
    # batches of 5 and of 10 sum the same samples in another order
    np.testing.assert_allclose(again["loss"], history.get_latest_metric("eval_loss_epoch"), rtol=1e-5)


def test_run_config_says_how_it_ran(kit):
    trainer = made(kit)
    trainer.train(Pairs(), 2, per_device_batch_size=4, gradient_accumulation_steps=3)
    config = trainer.run_config.to_dict()
    assert config["train_total_batch_size"] == 12
    assert config["num_update_steps_per_epoch"] == 4
    assert config["is_world_process_zero"]
    assert not config["is_distributed"]
    assert config["mixed_precision"] == "no"


def test_max_num_train_steps_overrides_epochs(kit):
    history = made(kit).train(Pairs(), 1, max_num_train_steps=7)
    assert len(steps(history)) == 7


def test_the_same_seed_gives_the_same_losses_and_another_does_not(kit):
    first, second, other = (steps(made(kit).train(Pairs(), 1, seed=s)) for s in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("create", [linear_schedule(2), cosine_schedule()])
def test_a_schedule_is_followed(kit, create):
    trainer = made(kit)
    history = trainer.train(Pairs(), 2, create_scheduler_fn=create)
    factor = create(None, 10)
    np.testing.assert_allclose(
        history.get_metric_values("learning_rate"), [0.1 * factor(5), 0.1 * factor(10)], atol=1e-8
    )


class SaveAt:
    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_step_end(self, trainer):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder)


def adam(kit):
    if kit.name == "torch":
        return lambda p: kit.torch.optim.AdamW(p, lr=0.01)
    return lambda p: kit.ms.nn.Adam(p, learning_rate=0.01)


def adamw(kit):
    """MindSpore's experimental optimizers keep their rate where no list of their parameters shows it."""
    if kit.name == "torch":
        return adam(kit)
    return lambda p: kit.ms.experimental.optim.AdamW(p, lr=0.01)


@pytest.mark.parametrize(("step", "optimizer"), [(3, adam), (5, adamw), (8, adam)])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(kit, tmp_path, step, optimizer):
    plan = {"num_epochs": 3, "eval_dataset": Pairs(8), "create_scheduler_fn": linear_schedule(1)}
    whole = made(kit, optimizer=optimizer(kit), callbacks=[SaveAt(step, tmp_path / "at")]).train(Pairs(), **plan)
    resumed = made(kit, optimizer=optimizer(kit)).train(Pairs(), **plan, resume_from=tmp_path / "at")
    assert resumed.state_dict() == whole.state_dict()
    assert not [f for f in (tmp_path / "at").iterdir() if f.suffix not in (".json", ".safetensors")]


def test_resuming_with_another_batch_size_is_refused(kit, tmp_path):
    made(kit, callbacks=[SaveAt(2, tmp_path / "at")]).train(Pairs(), 1)
    with pytest.raises(ConfigError, match="batch_size 8, this run has 4"):
        made(kit).train(Pairs(), 1, per_device_batch_size=4, resume_from=tmp_path / "at")


def test_a_list_of_batches_is_read_as_batches(kit):
    data = Pairs()
    batches = [(kit.tensor(data.x[i : i + 10]), kit.tensor(data.y[i : i + 10])) for i in range(0, 40, 10)]
    history = made(kit).train(batches, 2)
    assert len(steps(history)) == 8


def test_compute_loss_takes_any_batch(kit):
    def compute(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    data = Pairs()
    batches = [{"x": kit.tensor(data.x), "y": kit.tensor(data.y)}]
    trainer = made(kit, compute_loss=compute)
    history = trainer.train(batches, 4)
    assert (np.diff(steps(history)) < 0).all()
    assert trainer.evaluate(batches)["loss"] < steps(history)[-1]


def test_callbacks_are_called_in_order_and_may_stop(kit):
    called = []

    class Note(TrainerCallback):
        def on_train_begin(self, trainer):
            called.append("train")

        def on_step_end(self, trainer):
            called.append(trainer.global_step)
            if trainer.global_step == 3:
                trainer.stop("enough")

        def on_epoch_end(self, trainer):
            called.append("epoch")

        def on_train_end(self, trainer):
            called.append("end")

    trainer = made(kit, callbacks=[Note()])
    trainer.train(Pairs(), 5)
    assert called == ["train", 1, 2, 3, "epoch", "end"]
    assert trainer.stop_reason == "enough"


def test_modes_are_as_before(kit):
    trainer = made(kit)
    model = trainer.model
    (model.eval() if kit.name == "torch" else model.set_train(False))
    seen = []

    class Look:
        def on_step_end(self, trainer):
            seen.append(model.training)

    trainer.callbacks.append(Look())
    trainer.train(Pairs(), 1)
    assert seen[0] is True
    assert model.training is False


def test_a_history_of_ones_own_is_used(kit):
    history = InMemoryRunHistory()
    trainer = made(kit, run_history=history)
    assert trainer.train(Pairs(), 1) is history
    trainer.train(Pairs(), 1, reset_run_history=False)
    assert history.current_epoch == 3
    assert len(steps(history)) == 10


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_epochs": 0}, ValueError),
        ({"per_device_batch_size": 2.5}, TypeError),
        ({"gradient_accumulation_steps": 0}, ValueError),
        ({"gradient_clip_value": -1.0}, ValueError),
        ({"train_dataset": 3}, TypeError),
        ({"train_dataset": []}, ValueError),
        ({"create_scheduler_fn": 3}, TypeError),
        ({"seed": -1}, ValueError),
    ],
)
def test_wrong_arguments_are_named(kit, change, error):
    trainer = made(kit)
    before = kit.values(trainer.model)
    with pytest.raises(error):
        trainer.train(**{"train_dataset": Pairs(), "num_epochs": 1, **change})
    after = kit.values(trainer.model)
    assert all((before[k] == after[k]).all() for k in before)


def test_loss_func_and_compute_loss_together_are_refused(kit):
    with pytest.raises(ConfigError, match="not both"):
        kit.room("train").Trainer(kit.linear(2, 2), abs, compute_loss=abs)
    with pytest.raises(TypeError):
        kit.room("train").Trainer(3)
    with pytest.raises(TypeError, match="on_epoch_end"):
        kit.room("train").Trainer(kit.linear(2, 2), abs, callbacks=[3])


def test_a_loss_that_is_not_finite_is_said(kit, caplog):
    batches = [(kit.tensor(np.zeros((2, 5), np.float32)), kit.tensor(np.full((2, 2), np.inf, np.float32)))]
    history = made(kit).train(batches, 1)
    assert not math.isfinite(steps(history)[0])
    assert "not finite" in caplog.text


class Tokens:
    """Rows of four labels, of which between none and four count."""

    def __init__(self):
        rng = np.random.default_rng(4)
        self.x = rng.standard_normal((6, 4, 5)).astype(np.float32)
        self.y = rng.integers(0, 2, (6, 4)).astype(np.int32)
        for row, counts in enumerate((4, 1, 0, 3, 2, 4)):
            self.y[row, counts:] = -100

    def batches(self, kit, size):
        labels = self.y.astype(np.int64 if kit.name == "torch" else np.int32)
        cuts = [slice(at, at + size) for at in range(0, 6, size)]
        return [(kit.tensor(self.x[cut]), kit.tensor(labels[cut])) for cut in cuts]


def by_labels(kit, **how):
    """A trainer whose loss is the mean over the labels that count."""
    if kit.name == "torch":
        entropy = kit.torch.nn.functional.cross_entropy
    else:
        entropy = kit.ms.ops.cross_entropy

    def loss(model, batch):
        return entropy(model(batch[0]).reshape((-1, 2)), batch[1].reshape((-1,)))

    return made(kit, compute_loss=loss, **how)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_of_one_update_are_averaged_over_the_labels_that_count(kit, size):
    whole, parts = by_labels(kit), by_labels(kit)
    expected = whole.train(Tokens().batches(kit, 6), 2)
    found = parts.train(Tokens().batches(kit, size), 2, gradient_accumulation_steps=6 // size)
    np.testing.assert_allclose(steps(found), steps(expected), rtol=1e-5)  # float32 sums in another order
    for name, value in kit.values(whole.model).items():
        np.testing.assert_allclose(kit.values(parts.model)[name], value, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_an_evaluation_is_a_mean_over_the_labels_that_count(kit, size):
    expected = by_labels(kit).evaluate(Tokens().batches(kit, 6))["loss"]
    assert abs(by_labels(kit).evaluate(Tokens().batches(kit, size))["loss"] - expected) < 1e-6  # float32


def test_tokens_are_counted_by_a_function_of_ones_own(kit, caplog):
    import logging

    count = by_labels(kit, count_tokens=lambda batch: 1.0 + len(batch[1]), callbacks=[kit.slim.ProgressBar(every_s=0)])
    with caplog.at_level(logging.INFO, "slimkit"):
        count.train(Tokens().batches(kit, 2), 1)
    assert count.tokens_seen == 9
    assert "tokens/s" in caplog.text
    assert "s left" in caplog.text
