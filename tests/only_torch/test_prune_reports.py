"""Nets that public reports are about: each traced, cut, proved, trained on, saved, and loaded in a fresh process."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from slimkit import PruneTorch, check_pruning, save_pruned
from tests.zoo import oracle, reports

import torch

_LOADS = """
import sys, torch
from slimkit import load_pruned
from tests.zoo import oracle, reports
for name in reports.NETS:
    net, _ = reports.build(name)
    load_pruned(f"{sys.argv[1]}/{name}", net)
    held = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    with torch.no_grad():
        found = oracle.call(net.eval(), held["inputs"])
        torch.testing.assert_close(found, held["output"], atol=5e-5, rtol=1e-4)  # float32, other threads
    print(name)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.mark.parametrize("name", reports.NETS)
def test_a_reported_shape_is_cut_proved_trained_and_saved(name, folder):
    net, inputs = reports.build(name)
    small = copy.deepcopy(net)
    job = PruneTorch(small, inputs).set_alignment(8)
    desc = job.prune(0.6, [])
    assert abs(job.report()["reached"] - 0.6) <= 0.03  # heads are coarse in nets this small
    assert not job.report()["without_rule"]
    # float32; sums of up to 192 products in another order
    assert check_pruning(net, inputs, desc, tolerance=1e-5).holds
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    oracle.call(small, inputs).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
    optimizer.step()
    small.eval()
    save_pruned(folder / name, small, desc)
    with torch.no_grad():
        torch.save({"inputs": inputs, "output": oracle.call(small, inputs)}, folder / f"{name}.pt")


def test_a_fresh_process_loads_them_all(folder):
    if not all((folder / f"{name}.pt").exists() for name in reports.NETS):
        for name in reports.NETS:
            test_a_reported_shape_is_cut_proved_trained_and_saved(name, folder)
    call = [sys.executable, "-c", _LOADS, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == list(reports.NETS)
