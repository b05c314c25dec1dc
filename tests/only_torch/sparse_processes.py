"""Run under torchrun, or alone: sparsify small models on this process's share of the data, and save what became."""

import sys

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse import processes
from slimkit.sparse import Compressor, SparseConfig

import torch
from torch import nn
from torch.nn import functional as F


class Experts(nn.Module):
    """Experts of one parameter; the last is only chosen by rows of the last batch."""

    def __init__(self):
        super().__init__()
        self.n_experts = 3
        self.w = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x):
        choice = (x[:, 0] > 0).long() + (x[:, 1] > 50).long()
        out = x.new_zeros(len(x), 8)
        for i in choice.unique().flip(0).tolist():  # another order in every batch
            out[choice == i] = F.linear(x[choice == i], self.w[i])
        return out


def attention():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)


def chain():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def cases():
    """Name -> model, data and configuration."""
    torch.manual_seed(0)
    rows = [torch.randn(64, 16) for _ in range(4)]
    rows[3][:, 1] = 100.0
    sequences = [torch.randn(4, 12, 16) * torch.rand(16) for _ in range(4)]
    return {
        "chain": (chain(), rows, SparseConfig(method="par")),
        "measured": (chain(), rows, SparseConfig(method="hessian", uniform=False)),
        "experts": (Experts(), rows, SparseConfig(method="par")),
        "attention": (attention(), sequences, SparseConfig(method="par", ignore=["*.out_proj"])),
        "together": (attention(), sequences, SparseConfig(method="hessian", sequential=False)),
        "residual": (attention(), sequences, SparseConfig(method="par", residual=True)),
    }


def run(rank, n):
    """What becomes of every case on this process's share of the data."""
    torch.set_num_threads(1)
    processes.SECONDS_PER_CALL = 0.0  # so that even small layers are spread
    processes.BYTES_PER_SECOND = float("inf")
    found = {}
    for name, (model, data, config) in cases().items():
        if n == 1 and not config.uniform:  # one batch measures in each process: here the two of both
            data = [torch.cat(data[i : i + 2]) for i in range(0, len(data), 2)]
        compressor = Compressor(model, config)
        report = compressor.compress(data[rank::n])
        found |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
        found |= {f"{name}/masks/{key}": value.contiguous() for key, value in compressor.masks.items()}
        rows = [row["rows"] for row in report["layers"].values()]
        found[f"{name}/rows"] = torch.tensor(rows)
        found[f"{name}/errors"] = torch.tensor([row["output_error"] for row in report["layers"].values()])
    model, data, config = cases()["attention"]
    if rank == n - 1:
        data[rank][0, 0, 0] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        Compressor(model, config).compress(data[rank::n])
    except ArgumentError as error:
        found["refused"] = torch.tensor("finite" in str(error))
    found["untouched"] = torch.tensor(all(torch.equal(before[k], v) for k, v in model.state_dict().items()))
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    spread = []
    owners = processes.owners
    processes.owners = lambda *args: spread.append(owners(*args)) or spread[-1]
    found = run(rank, n)
    found["spread"] = torch.tensor(sum(bool(owner) for owner in spread))
    save_file(found, f"{sys.argv[1]}/{rank}.safetensors")
    dist.destroy_process_group()
