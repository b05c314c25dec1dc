"""Several processes sparsify one folder: the bytes of one process, whatever of them is killed, and when."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
import traceback

import pytest

from slimkit.core.errors import ProcessLostError, UnsupportedError
from slimkit.core.sparse import SparseConfig
from tests.only_torch import walked_processes
from tests.only_torch.test_sparse_checkpoint import CallsLeft, build, tree
from tests.only_torch.test_sparse_processes import free_port

import torch

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork"),
    pytest.mark.usefixtures("one_thread"),
]

LOST, REFUSED = 7, 8

# Moments to kill at: SLIMKIT_KILLS=20 python -m pytest tests/only_torch/test_sparse_checkpoint_processes.py
MOMENTS = int(os.environ.get("SLIMKIT_KILLS", "2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("walked")
    for family in ("llama", "mixtral"):
        build(family).save_pretrained(found / "src" / family, max_shard_size="30KB")
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of a case."""
    known = {}

    def of(case):
        if case not in known:
            report = walked_processes.walk(folder, case)
            if case == "block":
                assert {row["passes"] for row in report["layers"].values()} == {0, 3}  # one was trained in vain
            known[case] = tree(folder / "out" / case)
            shutil.rmtree(folder / "out" / case)
        return known[case]

    return of


def processes(n, work, dying=None, calls=0):
    """Fork processes that do the same work as torchrun's would; one may die after some calls. How each ended."""
    port, children = free_port(), []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if rank == dying:
                    sys.setprofile(CallsLeft(calls))
                work()
                code = 0
            except ProcessLostError:
                code = LOST
            except UnsupportedError:
                code = REFUSED
            except BaseException:
                os.write(2, traceback.format_exc().encode())  # past Python's buffers, which end with the process
                raise
            finally:
                os._exit(code)  # never back into pytest
        children.append(child)
    ends = {}
    began = time.monotonic()
    while len(ends) < n:
        assert time.monotonic() - began < 100
        for rank, child in enumerate(children):
            if rank not in ends and (found := os.waitpid(child, os.WNOHANG))[0]:
                ends[rank] = (os.waitstatus_to_exitcode(found[1]), time.monotonic())
        time.sleep(0.02)
    return [ends[rank][0] for rank in range(n)], [ends[rank][1] for rank in range(n)]


@pytest.mark.parametrize(
    ("case", "n"),
    [("hessian", 2), ("measured", 2), ("block", 2), ("residual", 3), ("experts", 3)]
    + [(case, n) for n in (2, 3) for case in walked_processes.CASES if MOMENTS > 2],
)
def test_the_bytes_are_those_of_one_process(case, n, folder, alone):
    expected = alone(case)
    assert processes(n, lambda: walked_processes.walk(folder, case))[0] == [0] * n
    assert tree(folder / "out" / case) == expected
    shutil.rmtree(folder / "out" / case)


def calls_of(folder, case):
    """How many calls one process makes of a case."""
    counter = CallsLeft()
    sys.setprofile(counter)
    try:
        walked_processes.walk(folder, case)
    finally:
        sys.setprofile(None)
    shutil.rmtree(folder / "out" / case)
    return counter.seen


def kill_and_go_on(folder, expected, case, dying, calls, n=2):
    """Kill one of two at a moment of its own; the other ends by itself, and the same command goes on."""
    work = lambda: walked_processes.walk(folder, case)
    codes, times = processes(2, work, dying, calls)
    killed = codes[dying] == -9
    if killed:
        assert codes[1 - dying] in (LOST, 0)
        assert times[1 - dying] - times[dying] < 30
    assert processes(n, work)[0] == [0] * n
    assert tree(folder / "out" / case) == expected
    shutil.rmtree(folder / "out" / case)
    return killed


@pytest.mark.parametrize(("case", "reach"), [("hessian", 1.0), ("block", 0.6)])  # training is half of the calls
def test_killed_at_random_moments_the_other_ends_and_the_bytes_are_the_same(case, reach, folder, alone):
    dice, killed = random.Random(0), 0
    moments = MOMENTS if case == "hessian" or MOMENTS > 2 else 1
    expected, calls = alone(case), calls_of(folder, case)
    for index in range(moments):
        point = int(reach * calls * (index + dice.random()) / moments)
        killed += kill_and_go_on(folder, expected, case, index % 2, point, n=dice.choice((1, 2, 3)))
    assert killed >= 0.7 * moments  # what the other still needs may be done before it is time to die


def test_processes_with_other_data_are_refused(folder):
    def other_data():
        torch.manual_seed(int(os.environ["RANK"]))
        data = [torch.randint(0, 64, (1, 8)) for _ in range(2)]
        walked_processes.sparsify_checkpoint(
            folder / "src" / "llama", folder / "other", SparseConfig(method="hessian"), data
        )

    assert processes(2, other_data)[0] == [REFUSED] * 2
    assert not (folder / "other").exists()
