"""What a trainer asks of others: a callback that has only what it uses, and batches shared out among processes."""

from __future__ import annotations

import pytest

from slimkit.core.train.callbacks import MOMENTS, EarlyStopping, TrainerCallback, method_of
from slimkit.core.train.loading import LoaderOptions, shared_out


class Says:
    def __init__(self):
        self.said = []

    def on_epoch_end(self, trainer):
        self.said.append(trainer)


def test_a_callback_is_asked_for_what_it_has_and_the_rest_does_nothing():
    callback = Says()
    for moment in MOMENTS:
        method_of(callback, moment)("trainer")
    method_of(callback, "on_resume")("trainer", {})
    method_of(callback, "load_state_dict")({})
    assert callback.said == ["trainer"]
    assert method_of(callback, "state_dict")() is None
    assert method_of(EarlyStopping(), "state_dict")() == {"best": None, "waited": 0}


def test_every_moment_is_declared_and_going_on_alone_makes_no_callback():
    assert {f"on_{word}" for word in ("train_begin", "epoch_begin", "step_end", "epoch_end", "train_end")} < set(
        MOMENTS
    )
    assert "on_resume" in vars(TrainerCallback)
    assert "on_resume" not in MOMENTS


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_all_processes_read_as_many_batches_and_together_all(n, world):
    def share(rank):
        return list(shared_out(range(n), LoaderOptions(0, 1, rank, world, None, {"shuffle": False})))

    found = [share(rank) for rank in range(world)]
    assert {len(part) for part in found} == {-(-n // world)}
    in_turn = [batch for batches in zip(*found) for batch in batches]
    assert in_turn[:n] == list(range(n))
    assert in_turn[n:] == [0] * (-n % world)
