"""Deltas on models that processes share or that are compiled: trained, saved by plain names, loaded, merged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimkit

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

ROOT = Path(__file__).parents[2]


def test_two_processes_train_save_load_and_merge_as_one_does(tmp_path):
    script = Path(__file__).with_name("sharded_delta.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f.name for f in tmp_path.glob("done*")} == {"done0", "done1"}
    one = {f.name: f.read_bytes() for f in (tmp_path / "alone_lora_0").iterdir()}
    assert set(one) == {f.name for f in (tmp_path / "lora_before_slimkit").iterdir()}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6))


def region(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPED = {
    "whole": lambda m: torch.compile(m, backend="eager"),
    "region": region,
    "both": lambda m: torch.compile(region(m), backend="eager"),
    "in place": lambda m: (m.compile(backend="eager"), m)[1],
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "parallel and compiled": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("format", ["slimkit", "peft"])
def test_names_in_files_are_the_plain_models(wrap, order, format, tmp_path):
    def put_on(model):
        report = slimkit.apply_delta(model, "lora", ["0.0"], rank=2, also_train=["1.*"])
        assert list(report.layers) == ["0.0"]
        return model

    plain = put_on(net())
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1)
    slimkit.save_delta(plain, tmp_path / "plain", format=format)
    model = wrap(put_on(net())) if order == "before" else put_on(wrap(net()))
    assert torch.equal(model(X), net()(X))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    expected = plain(X)
    torch.testing.assert_close(model(X), expected)  # compiled anew once the layer carries a delta
    slimkit.save_delta(model, tmp_path / "wrapped", format=format)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes(), file.name
    # Each way round: what was saved from either opens on either.
    for target in (net(), wrap(net())):
        with torch.no_grad():
            for p in target.parameters():
                p.add_(0.1)  # the base that was moved along above
        slimkit.load_delta(target, tmp_path / "wrapped")
        torch.testing.assert_close(target(X), expected)
        slimkit.merge_delta(target, unload=True)
        torch.testing.assert_close(target(X), expected)
