"""Walks over folders that several processes do together, and one alone."""

from pathlib import Path
from unittest import mock

from slimkit.core.sparse import SparseConfig, processes, reconstruct
from slimkit.sparse import sparsify_checkpoint

import torch

CASES = {
    "hessian": ("llama", SparseConfig(method="hessian")),
    "residual": ("llama", SparseConfig(method="par", residual=True)),
    "experts": ("mixtral", SparseConfig(method="par")),
    "together": ("llama", SparseConfig(method="hessian", sequential=False)),
    "measured": ("llama", SparseConfig(method="hessian", uniform=False)),
    "magnitude": ("llama", SparseConfig(method="magnitude")),
    "block": ("llama", SparseConfig(method="block", options={"passes": 3, "rate": 0.001})),
}


def batches(tokens=12):
    """Five batches: two or three processes have not as many each; one is padded."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (2, tokens), generator=generator) for _ in range(5)]
    found = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    found[3]["attention_mask"][1, 8:] = 0
    return found


def walk(folder, case):
    """One case."""
    torch.set_num_threads(1)
    processes.SECONDS_PER_CALL, processes.BYTES_PER_SECOND = 0.0, float("inf")  # so that even small layers are spread
    family, config = CASES[case]
    data = batches(100 if config.row.reconstructs else 12)  # with few rows no pass of training would stay
    with mock.patch.object(reconstruct, "HOLD_OUT", 2):  # so that every process has samples that judge
        return sparsify_checkpoint(Path(folder, "src", family), Path(folder, "out", case), config, data)
