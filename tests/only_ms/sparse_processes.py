"""Run under msrun, or alone: sparsify a small cell on this process's share of the data, and save what became."""

import sys

import numpy as np

from slimkit.core.sparse import processes
from slimkit_ms import Compressor, SparseConfig

import mindspore as ms
from mindspore import nn


class Gated(nn.Cell):
    """Two layers on one input, for two processes to solve, and one of more than 256 inputs: its sums are float32."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Dense(16, 300), nn.Dense(16, 300), nn.Dense(300, 8)
        rng = np.random.default_rng(0)
        for p in self.get_parameters():
            p.set_data(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32) * 0.3))

    def construct(self, x):
        return self.down(self.up(x) * self.gate(x))


def run(rank, n):
    """What becomes of each method on this process's share of the data."""
    processes.SECONDS_PER_CALL = 0.0  # so that even small layers are spread
    processes.BYTES_PER_SECOND = float("inf")
    rng = np.random.default_rng(2)
    data = [ms.Tensor(rng.standard_normal((256, 16)).astype(np.float32)) for _ in range(2)]
    found = {}
    for name, options in {"par": {}, "magnitude": {"uniform": False}}.items():
        model = Gated()
        if n == 1 and not options.get("uniform", True):  # one batch measures in each process: here the two of both
            data = [ms.ops.cat(data)]
        compressor = Compressor(model, SparseConfig(method=name, **options))
        report = compressor.compress(data[rank::n])
        found |= {f"{name}/{p.name}": p.asnumpy() for p in model.get_parameters()}
        found |= {f"{name}/masks/{layer}": mask for layer, mask in compressor.masks.items()}
        found[f"{name}/rows"] = np.array([row.get("rows", 0) for row in report["layers"].values()])
    return found


if __name__ == "__main__":
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    ms.communication.init()  # in the scheduler that msrun starts, too
    owners = processes.owners
    spread = []
    processes.owners = lambda *args: spread.append(owners(*args)) or spread[-1]
    rank = ms.communication.get_rank()
    found = run(rank, 2)
    np.savez(f"{sys.argv[1]}/2-{rank}.npz", spread=sum(bool(owner) for owner in spread), **found)
