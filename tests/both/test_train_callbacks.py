"""Callbacks: early stopping, best and last checkpoints, logs, gradual unfreezing."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest

from slimkit.core.errors import ConfigError
from tests.both.test_train import Pairs, adam, made, steps


def test_early_stopping_waits_and_stops(kit):
    stopping = kit.slim.EarlyStopping("train_loss_epoch", patience=2, min_delta=1e9)
    trainer = made(kit, callbacks=[stopping])
    history = trainer.train(Pairs(), 9)
    assert history.current_epoch == 4
    assert "has not improved" in trainer.stop_reason


def test_a_metric_nobody_records_is_named(kit):
    with pytest.raises(ConfigError, match="Did you mean 'train_loss_epoch'"):
        made(kit, callbacks=[kit.slim.EarlyStopping("train_loss_epch")]).train(Pairs(), 1)


def test_best_and_last_are_kept_and_lead_on(kit, tmp_path):
    class Worse:
        """Makes epoch 2 the best by spoiling the model in epoch 3."""

        def on_epoch_begin(self, trainer):
            if trainer.epoch == 3:
                weight = next(iter(kit.params(trainer.model).values()))
                if kit.name == "torch":
                    weight.data.mul_(50)
                else:
                    kit.ms.ops.assign(weight, weight * 50)

    keeper = kit.slim.Checkpoints(tmp_path, "eval_loss_epoch")
    trainer = made(kit, optimizer=adam(kit), callbacks=[Worse(), keeper])
    history = trainer.train(Pairs(), 3, eval_dataset=Pairs(8))
    losses = history.get_metric_values("eval_loss_epoch")
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]
    fresh = made(kit)
    fresh.load_weights(tmp_path / "best")
    # the same weights on the same batches
    np.testing.assert_allclose(fresh.evaluate(Pairs(8))["loss"], losses[1], rtol=1e-6)
    on = made(kit, optimizer=adam(kit), callbacks=[kit.slim.Checkpoints(tmp_path, "eval_loss_epoch")])
    on.train(Pairs(), 4, eval_dataset=Pairs(8), resume_from=tmp_path / "last")
    assert len(steps(on.run_history)) == 20
    assert on.callbacks[0].best.value == min(losses)


def test_a_resumed_early_stopping_remembers(kit, tmp_path):
    def callbacks():
        stopping = kit.slim.EarlyStopping("train_loss_epoch", patience=3, min_delta=1e9)
        return [stopping, kit.slim.Checkpoints(tmp_path, None)]

    made(kit, callbacks=callbacks()).train(Pairs(), 2)
    history = made(kit, callbacks=callbacks()).train(Pairs(), 9, resume_from=tmp_path / "last")
    assert history.current_epoch == 5


def test_logs_hold_every_epoch(kit, tmp_path):
    slim = kit.slim
    logs = [
        slim.CSVLogger(tmp_path / "run.csv"),
        slim.JSONLogger(tmp_path / "run.jsonl"),
        slim.TensorBoardLogger(tmp_path / "tb"),
    ]
    history = made(kit, callbacks=logs).train(Pairs(), 3)
    losses = history.get_metric_values("train_loss_epoch")
    with open(tmp_path / "run.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(r["train_loss_epoch"]) for r in rows] == losses
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"]) for r in lines] == [(1, 5), (2, 10), (3, 15)]
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (tmp_path / "tb").iterdir()
    values = [v for e in EventFileLoader(str(file)).Load() if e.HasField("summary") for v in e.summary.value]
    shown = [
        v.tensor.float_val[0] if v.HasField("tensor") else v.simple_value for v in values if v.tag == "train_loss_step"
    ]
    np.testing.assert_allclose(shown, steps(history), rtol=1e-6)


def test_progress_is_logged_without_a_terminal(kit, caplog):
    with caplog.at_level(logging.INFO, "slimkit"):
        made(kit, callbacks=[kit.slim.ProgressBar(every_s=0)]).train(Pairs(), 1)
    assert "1 of 5 updates" in caplog.text
    assert "epoch 1: train_loss" in caplog.text


def test_layers_open_one_after_the_other(kit, tmp_path):
    def build():
        trainer = made(kit, optimizer=adam(kit))
        if kit.name == "mindspore":
            trainer.optimizer = adam(kit)(trainer.model.trainable_params())
        freezer = kit.slim.ModelFreezer(trainer.model)
        freezer.freeze()
        trainer.callbacks = [
            kit.slim.GradualUnfreezing(freezer, every_n_epochs=2),
            kit.slim.Checkpoints(tmp_path, None),
        ]
        return trainer

    trainer, seen = build(), []

    class Look:
        def on_epoch_end(self, trainer):
            seen.append(kit.values(trainer.model))

    trainer.callbacks.append(Look())
    trainer.train(Pairs(), 5)
    first = next(iter(seen[0]))
    # groups: Linear, ReLU, Linear; the ReLU opens after epoch 2, the first Linear after epoch 4
    assert (seen[3][first] == seen[0][first]).all()
    assert (seen[4][first] != seen[3][first]).any()
    history = build().train(Pairs(), 6, resume_from=tmp_path / "last")
    assert len(history.get_metric_values("train_loss_epoch")) == 6
