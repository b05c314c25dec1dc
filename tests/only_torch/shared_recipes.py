"""Run by test_shared_recipes.py, alone, forked or under torchrun: tiny recipes, and what becomes of their stages."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path
from unittest import mock

from slimkit.core.run import report
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import parse_recipe
from slimkit.core.run.stages import Stages
from slimkit.core.train.callbacks import Checkpoints  # noqa: F401  (loads what trains before processes are counted)
from slimkit.jobs import TorchJobs

import torch

TASK = """
    import os
    import torch
    from torch import nn

    def build(width=16):
        body = [nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        return nn.Sequential(*body, nn.Linear(width, 4))

    def data():
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(48, 8, generator=generator)
        y = (x @ torch.randn(8, 4, generator=generator)).argmax(1)
        return {
            "train": torch.utils.data.TensorDataset(x, y), "example": x[:4], "calibration": list(x.split(8)),
            "distill": list(x.split(8)), "held_out": [(x[:32], y[:32])],
        }

    def other_data():
        return {**data(), "example": torch.full((4, 8), float(os.environ.get("RANK", "0")))}

    def metrics(model, data, dense):
        with torch.no_grad():
            return {"norm": float(model(data["example"]).norm())}

    def broken(model, data, dense):
        if sum(p.numel() for p in model.parameters()) < 700:
            raise ValueError("no such metric")
        return {}
"""

PRUNE = {"prune": {"reserved_ratio": 0.6, "alignment": 4, "compensation_batches": 4}}
TRAIN = {"train": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}}
RECIPES = {
    # what one process does, and what all do on shares of the calibration data
    "smaller": [PRUNE, {"sparsify": {"method": "hessian", "sparse_ratio": 0.5}}, {"compare": {"task": "classifier"}}],
    "measured": [{"sparsify": {"method": "hessian", "sparse_ratio": 0.5, "uniform": False}}],
    "trained": [
        TRAIN,
        PRUNE,
        {"distill": {"epochs": 2, "learning_rate": 0.01}},
        {"sparsify": {"method": "magnitude", "sparse_ratio": 0.5}},
        {"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "keep_zeros": True}},
        {"adapt": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "targets": ["4"], "rank": 2}},
    ],
}


def write(folder):
    """The functions of the recipes."""
    (Path(folder) / "tiny_task.py").write_text(textwrap.dedent(TASK))


def recipe(name, **changes):
    content = {
        "version": 1, "name": name, "model": "tiny_task.py:build", "data": "tiny_task.py:data",
        "metrics": "tiny_task.py:metrics", "stages": RECIPES[name],
    }  # fmt: skip
    return parse_recipe({**content, **changes})


def run(folder, name, out, **changes):
    """One recipe in one process, or in this one of several."""
    torch.set_num_threads(1)
    with mock.patch.object(report.plots, "all_plots", return_value=dict.fromkeys(report.plots.PICTURES, "")):
        return run_recipe(recipe(name, **changes), Path(folder), Stages(TorchJobs()), Path(folder) / out)


def dies(folder, name, out, at):
    """The same, and the last process is killed when a stage begins."""
    inner = Stages.run

    def wrapped(self, kind, options, model, stage):
        if os.environ["RANK"] == "1" and stage.directory is not None and kind == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, kind, options, model, stage)

    Stages.run = wrapped
    run(folder, name, out)


if __name__ == "__main__":
    place, what, *rest = sys.argv[1:]
    {"run": run, "dies": dies}[what](place, *rest)
