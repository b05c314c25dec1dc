"""Run history and run configuration, as the pytorch-accelerated document describes them."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from slimkit import InMemoryRunHistory, RunHistory, TrainerRunConfig, set_logger_level


def test_history_records_by_metric_and_epoch():
    history = InMemoryRunHistory()
    assert isinstance(history, RunHistory)
    assert history.current_epoch == 1
    history.update_metric("loss", 2.0)
    history.update_metric("loss", 1.0)
    history._increment_epoch()
    assert history.get_metric_names() == {"loss"}
    assert list(history.get_metric_values("loss")) == [2.0, 1.0]
    assert history.get_latest_metric("loss") == 1.0
    assert history.current_epoch == 2
    history.reset()
    assert history.current_epoch == 1
    assert history.get_metric_names() == set()


def test_asking_changes_nothing():
    history = InMemoryRunHistory()
    assert list(history.get_metric_values("accuracy")) == []
    assert history.get_metric_names() == set()
    with pytest.raises(ValueError, match="No values have been recorded for the metric accuracy"):
        history.get_latest_metric("accuracy")
    history.update_metric("loss", 1.0)
    history.get_metric_values("loss").append(5.0)
    assert history.get_latest_metric("loss") == 1.0


def test_history_survives_a_checkpoint():
    history = InMemoryRunHistory()
    history.update_metric("loss", 1.0)
    history._increment_epoch()
    other = InMemoryRunHistory()
    other.load_state_dict(history.state_dict())
    assert other.current_epoch == 2
    assert other.get_metric_values("loss") == [1.0]


def test_the_abstract_history_cannot_be_made():
    with pytest.raises(TypeError):
        RunHistory()


def test_run_config_has_the_documented_fields_and_is_frozen():
    names = [f.name for f in dataclasses.fields(TrainerRunConfig)]
    assert names == [
        "num_epochs", "train_per_device_batch_size", "train_dl_kwargs", "eval_per_device_batch_size", "eval_dl_kwargs",
        "gradient_accumulation_steps", "gradient_clip_value", "train_total_batch_size", "eval_total_batch_size",
        "num_update_steps_per_epoch", "max_num_train_steps", "is_local_process_zero", "is_world_process_zero",
        "is_distributed", "mixed_precision",
    ]  # fmt: skip
    config = TrainerRunConfig(1, 2, {}, 2, {}, 1, None, 2, 2, 5, None, True, True, False, "no")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_epochs = 3
    assert config.to_dict()["mixed_precision"] == "no"


def test_logger_level_takes_any_case_and_refuses_other_words():
    logger = logging.getLogger("slimkit")
    before = logger.level
    try:
        for word, level in (("INFO", 20), ("Warn", 30), ("warning", 30), ("fatal", 50), ("notset", 0), ("debug", 10)):
            set_logger_level(word)
            assert logger.level == level
        with pytest.raises(ValueError, match="Received: 'loud'"):
            set_logger_level("loud")
        with pytest.raises(TypeError):
            set_logger_level(20)
    finally:
        logger.setLevel(before)
