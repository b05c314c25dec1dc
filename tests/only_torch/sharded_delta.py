"""Run by test_delta_sharded.py under torchrun: deltas on models that two processes share, against one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import slimkit

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

FOLDER = Path(sys.argv[1])
X, Y = (torch.randn(8, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2))


def net():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return nn.Sequential(block(), block(), nn.Linear(6, 6))


def put_on(model, kind="lora"):
    torch.manual_seed(3)
    if kind in ("lora", "dora"):
        slimkit.apply_delta(model, "lora", ["0.0", "1.0"], rank=2, alpha=4, dora=kind == "dora", also_train=["2.*"])
    elif kind == "ia3":
        slimkit.apply_delta(model, "ia3", ["0.0", "1.0"], feedforward=["1.0"], also_train=["2.*"])
    else:
        slimkit.apply_delta(model, "adapter", ["0.0", "1.0"], bottleneck_size=3, also_train=["2.*"])


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[1]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, parts):
    """Three updates over the same 8 rows, this process reading its part of them."""
    rank = dist.get_rank() if parts > 1 else 0
    x, y = X.chunk(parts)[rank], Y.chunk(parts)[rank]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def close(a, b, what):
    # float32: the mean over 8 rows is taken in two halves
    assert torch.allclose(a, b, atol=2e-6), f"{what}: off by {(a - b).abs().max():.2e}"


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind in ("lora", "dora", "ia3", "adapter"):
        alone = net()
        put_on(alone, kind)
        train(alone, 1)
        expected = alone(X).detach()
        slimkit.save_delta(alone, FOLDER / f"alone_{kind}_{rank}")
        models = {}
        models["before"] = net()
        put_on(models["before"], kind)
        sharded(models["before"])
        models["after"] = sharded(net())
        put_on(models["after"], kind)
        inner = net()
        put_on(inner, kind)
        models["ddp"] = nn.parallel.DistributedDataParallel(inner)
        for how, model in models.items():
            train(model, 2)
            close(model(X).detach(), expected, f"{kind} {how}, trained")
            for format in ("slimkit", "peft") if kind != "adapter" else ("slimkit",):
                folder = FOLDER / f"{kind}_{how}_{format}"
                assert slimkit.save_delta(model, folder, format=format) == folder
                dist.barrier()  # in DDP nobody waits for the one who writes
                fresh = net()
                slimkit.load_delta(fresh, folder)
                close(fresh(X).detach(), expected, f"{kind} {how}, saved as {format}")
                again = sharded(net())
                slimkit.load_delta(again, folder)
                close(again(X).detach(), expected, f"{kind} {how}, loaded on a sharded model")
            if kind != "adapter" and how != "ddp":
                slimkit.merge_delta(model, unload=True)
                close(model(X).detach(), expected, f"{kind} {how}, merged")
                assert not [n for n, _ in model.named_parameters() if "mindpet_delta" in n]
    # What goes wrong where the files are written goes wrong in every process.
    model = sharded(net())
    put_on(model)
    (FOLDER / "file").write_text("in the way") if rank == 0 else None
    dist.barrier()
    try:
        slimkit.save_delta(model, FOLDER / "file" / "delta")
    except OSError:
        pass
    else:
        raise AssertionError("a delta was saved below a file")
    dist.destroy_process_group()
    (FOLDER / f"done{rank}").touch()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
