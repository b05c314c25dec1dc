"""Run under msrun, or alone: sparsify cells block by block from files. A worker may kill itself on its way."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

from slimkit.core.sparse import processes, reconstruct
from slimkit_ms import SparseConfig, sparsify_checkpoint
from tests.only_ms import stacks_ms

import mindspore as ms

CASES = {
    "par": {"method": "par"},
    "block": {"method": "block", "uniform": False, "options": {"passes": 2, "rate": 0.001}},
}


def batches():
    """Five batches: two workers have not as many each."""
    rng = np.random.default_rng(1)
    return [ms.Tensor(rng.integers(0, 20, (4, 12)).astype(np.int32)) for _ in range(5)]


def walk(folder, case):
    """One case."""
    patches = [
        mock.patch.object(processes, "SECONDS_PER_CALL", 0.0),  # so that even small layers are spread
        mock.patch.object(processes, "BYTES_PER_SECOND", float("inf")),
        mock.patch.object(reconstruct, "HOLD_OUT", 2),  # so that every worker has samples that judge
    ]
    with patches[0], patches[1], patches[2]:
        return sparsify_checkpoint(
            Path(folder, "src"),
            Path(folder, "out", case),
            SparseConfig(min_tokens=1, **CASES[case]),
            batches(),
            build=stacks_ms.built,
            blocks=[f"blocks.{i}" for i in range(3)],
            names=lambda name: f"stem.{name}" if name.startswith("embed.") else name,
        )


def dying(folder):
    """Let this worker be killed as a block but the first is calibrated; it leaves word of when."""
    from slimkit_ms.sparse.checkpoint import CheckpointCells

    write, settled = CheckpointCells._write, CheckpointCells.settled
    done = []

    def note(self, index, *rest):
        write(self, index, *rest)
        done.append(index)

    def kill(self, *rest):
        if done:
            Path(folder, "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        settled(self, *rest)

    CheckpointCells._write, CheckpointCells.settled = note, kill


if __name__ == "__main__":
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    ms.communication.init()  # in the scheduler that msrun starts, too
    cases, killed = sys.argv[2].split(","), sys.argv[3:]
    if killed == [str(ms.communication.get_rank())]:
        dying(sys.argv[1])
    for case in cases:
        walk(sys.argv[1], case)
    Path(sys.argv[1], f"done-{ms.communication.get_rank()}").touch()
