"""One of two processes fails while what they hold together is put together and saved: the other ends, and says why."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import pytest

import slimkit
from slimkit import sharded, together
from slimkit.core.errors import ProcessLostError
from tests.only_torch.test_sparse_checkpoint_processes import LOST, processes

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork"),
    pytest.mark.usefixtures("one_thread"),
]

OWN, ALONE, TOLD = 11, 12, 13


class Spoilt(Exception):
    """What goes wrong in the process that fails."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def by_hand(folder):
    model = net()
    fully_shard(model)
    return lambda: slimkit.save_checkpoint(model, folder / "saved.safetensors")


def of_a_run(folder):
    model = net()
    fully_shard(model)
    trainer = slimkit.Trainer(model, nn.functional.mse_loss, lambda ps: torch.optim.Adam(ps, lr=0.1))
    x = torch.ones(4, 4)
    trainer.train(torch.utils.data.TensorDataset(x, x[:, :2]), 1, per_device_batch_size=2)
    return lambda: trainer.save_checkpoint(folder / "saved")


def of_a_delta(folder):
    model = net()
    slimkit.apply_delta(model, "lora", ["0", "2"], rank=2)
    fully_shard(model)
    return lambda: slimkit.save_delta(model, folder / "saved")


def failing(make, folder, fails, at, monkeypatch):
    """Save in this process of two; the one with the number `fails` does so at its gathering of that number."""
    together.join(torch.device("cpu"))
    save, gather, seen = make(folder), sharded.whole, []

    def whole(tensor):
        seen.append(tensor)
        if together.rank() == fails and len(seen) == at:
            raise Spoilt("of itself")
        return gather(tensor)

    for module in [m for n, m in sys.modules.items() if n.startswith("slimkit.") and getattr(m, "whole", 0) is gather]:
        monkeypatch.setattr(module, "whole", whole)
    heard = folder / "heard"
    try:
        save()
    except Spoilt:  # it lives on: nothing but what it says can end the other
        until = time.monotonic() + 30
        while not heard.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os._exit(OWN if heard.exists() else ALONE)
    except ProcessLostError as error:
        heard.touch()
        os._exit(LOST if "Spoilt: of itself" in str(error) else ALONE)
    except OSError as error:
        heard.touch()
        os._exit(TOLD if "the first process could not save" in str(error) and "of itself" in str(error) else ALONE)


@pytest.mark.parametrize("make", [by_hand, of_a_run, of_a_delta])
@pytest.mark.parametrize("fails", [0, 1])
def test_the_other_ends_when_one_fails_while_they_gather(make, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "GRACE", timedelta(seconds=1))
    codes, _ = processes(2, lambda: failing(make, tmp_path, fails, 2, monkeypatch))
    assert codes[fails] == OWN
    assert codes[1 - fails] == (TOLD if fails == 0 else LOST)
    assert [f.name for f in tmp_path.iterdir()] == ["heard"]


def test_the_others_hear_what_went_wrong_as_the_first_one_writes(tmp_path, monkeypatch):
    (tmp_path / "saved.safetensors").mkdir()  # no file can take its place

    def work():
        together.join(torch.device("cpu"))
        try:
            by_hand(tmp_path)()
        except OSError as error:
            if ("the first process could not save" in str(error)) == (together.rank() == 1):
                os._exit(OWN)

    assert processes(2, work)[0] == [OWN] * 2


def test_one_that_fails_inside_an_exchange_ends_the_others_as_it_ends(tmp_path, monkeypatch):
    from torch.distributed.tensor import DTensor

    monkeypatch.setattr(together, "GRACE", timedelta(seconds=1))
    gather, seen = DTensor.full_tensor, []

    def full(self):
        seen.append(self)
        if together.rank() == 0 and len(seen) == 2:
            raise Spoilt("out of memory, say")
        return gather(self)

    def work():
        together.join(torch.device("cpu"))
        save = by_hand(tmp_path)
        monkeypatch.setattr(DTensor, "full_tensor", full)
        try:
            save()
        except Spoilt:
            os._exit(OWN)

    codes, times = processes(2, work)
    assert codes == [OWN, LOST]
    assert times[1] - times[0] < 10
    assert not list(tmp_path.iterdir())
