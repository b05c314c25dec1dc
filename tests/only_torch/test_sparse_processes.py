"""Several processes with split data find what one process finds, whatever each has seen of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.processes import agreed, owners
from tests.only_torch import sparse_processes

import torch

SCRIPT = Path(sparse_processes.__file__)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process finds, and what each of two finds."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    constants = sparse_processes.processes.SECONDS_PER_CALL, sparse_processes.processes.BYTES_PER_SECOND
    try:
        single = sparse_processes.run(0, 1)
    finally:
        torch.set_num_threads(threads)
        sparse_processes.processes.SECONDS_PER_CALL, sparse_processes.processes.BYTES_PER_SECOND = constants
    return single, *(load_file(folder / f"{rank}.safetensors") for rank in range(2))


@pytest.mark.parametrize("case", ["chain", "measured", "experts", "attention", "together", "residual"])
def test_two_processes_with_split_data_equal_one(found, case):
    single, first, second = ({k: v for k, v in f.items() if k.startswith(case)} for f in found)
    assert single.keys() == first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name  # one model, to the bit
        if "/masks/" in name:
            # Sums in another order differ in their last bits, so only entries that nearly tie may change sides.
            assert float((value != single[name]).float().mean()) <= 0.01, name
        elif not value.is_floating_point():
            assert torch.equal(value, single[name]), name
        else:
            torch.testing.assert_close(value, single[name], atol=1e-3, rtol=1e-3, msg=name)


def test_layers_were_spread_and_errors_reach_every_process(found):
    _, first, second = found
    assert int(first["spread"]) == int(second["spread"]) > 3
    for each in found:
        assert bool(each["refused"])
        assert bool(each["untouched"])


def test_experts_that_one_process_never_saw_count_in_both(found):
    rows = found[0]["experts/rows"]
    assert int(rows[2]) >= 16  # of the last batch alone
    assert int(rows.sum()) == 256


class Heard:
    """A host that has heard these feeds from every process."""

    def __init__(self, every):
        self.every = every

    def gather(self, _value):
        return self.every


def test_feeds_that_processes_saw_differently_become_one_list():
    here = [["q", "k"], ["e1"], ["d1"], ["o"]]
    there = [["q", "k"], ["e0"], ["d0"], ["e1"], ["d1"], ["o"]]
    both = agreed(Heard([here, there]), [tuple(f) for f in here])
    assert both == agreed(Heard([here, there]), [tuple(f) for f in there])
    assert both == [("q", "k"), ("e0",), ("d0",), ("e1",), ("d1",), ("o",)]
    assert agreed(Heard([[["q", "k"]], [["q"], ["k"]]]), []) == [("q",), ("k",)]


def test_work_is_spread_by_its_cost():
    layers = [
        SparseLayer("wide", "linear", (4096, 8192)),
        *(SparseLayer(f"{i}", "linear", (4096, 4096)) for i in range(4)),
    ]
    owner = owners(layers, "hessian", 2)
    assert owner["wide"] == 0
    assert [owner[f"{i}"] for i in range(4)] == [1] * 4  # together they are cheaper than the wide one
    assert owners(layers, "magnitude", 2) == owners(layers, "hessian", 1) == owners(layers[:1], "hessian", 2) == {}
