"""The digits network trained and sparsified by two processes.

    torchrun --nproc_per_node 2 tools/recipes/two_processes.py

The same script serves one process (python tools/recipes/two_processes.py). Each process holds its share of the
calibration data; second moments are summed over all of them, so every process ends with the same zeros. Stop it and
start it again in the same way: the training goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import digits

from slimkit import Checkpoints, Compressor, SparseConfig, Trainer, freeze_zeros

import torch
from torch import distributed, nn

EPOCHS = 2
FOLDER = Path("runs/two_processes")


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    torch.manual_seed(0)
    model, data = digits.build(width=16), digits.data()
    trainer = Trainer(model, nn.functional.cross_entropy, callbacks=[Checkpoints(FOLDER, metric=None)])
    last = FOLDER / "last"
    trainer.train(data["train"], EPOCHS, per_device_batch_size=32, resume_from=last if last.exists() else None)

    share = data["calibration"][rank::world]
    Compressor(model, SparseConfig(method="hessian", sparse_ratio=0.5)).compress(share)
    with freeze_zeros(model):
        Trainer(model, nn.functional.cross_entropy).train(data["train"], 1, per_device_batch_size=32)
    if rank == 0:
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        print(f"{world} processes: accuracy {digits.accuracy(model, data, model)['accuracy']:.4f}, {zeros} zeros")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
