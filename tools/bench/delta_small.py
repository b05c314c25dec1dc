"""Fully fine-tuned models as small deltas (compress_delta): bytes, and accuracy beside the tuned model's own.

    python tools/bench/delta_small.py [--task digits,minilm] [--steps 200] [--length 64] [--test 1000]
        [--ways bits:0.07,bits:0.09,low_rank:0.09] [--calibration 0,256]

MiniLM learns which package a docstring comes from (delta_task.py); a small network that knows digits learns
them mirrored. Differences are in points, on the same texts; the error is that of a paired difference.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import itertools
import json
import pathlib
import tempfile
import time

import delta_task
import numpy as np

# kind, share of the bfloat16 bytes of a weight
WAYS = "bits:0.07,bits:0.09,low_rank:0.09"


def digits():
    """A base that knows digits, the same after learning them mirrored, and which mirrored ones a model gets right."""
    from sklearn.datasets import load_digits

    import torch
    from torch import nn

    torch.manual_seed(0)
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order][:, None] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    rest = slice(0, 1000), slice(1000, None)
    base = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip
    learn(base, lambda m, rows: m(x[rest[0]][rows]), y[rest[0]], 600, 1e-3)
    tuned = copy.deepcopy(base)
    x = x.flip(-1)  # seen in a mirror
    learn(tuned, lambda m, rows: m(x[rest[0]][rows]), y[rest[0]], 600, 3e-4)

    def right(model):
        with torch.no_grad():
            return (model.eval()(x[rest[1]]).argmax(1) == y[rest[1]]).numpy()

    return base, tuned, right, None, lambda count: [x[:count]]


def minilm(steps, length, test):
    """The same of MiniLM and the docstrings; the head is new and travels whole."""
    import torch
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = AutoModel.from_pretrained(delta_task.model_folder(), add_pooling_layer=False)
            self.head = torch.nn.Linear(self.body.config.hidden_size, delta_task.CLASSES)

        def forward(self, ids, mask):
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * mask).sum(1) / mask.sum(1))

    torch.manual_seed(0)
    parts = delta_task.data("packages", 800, 300, test, length)
    train, held = (tuple(map(torch.from_numpy, parts[n])) for n in ("train", "test"))
    base = Classifier()
    tuned = copy.deepcopy(base)
    learn(tuned, lambda m, rows: m(train[0][rows], train[1][rows]), train[2], steps, 1e-4, head=1e-2)

    def right(model):
        with torch.no_grad():
            found = [
                model.eval()(held[0][i : i + 50], held[1][i : i + 50]).argmax(1) for i in range(0, len(held[2]), 50)
            ]
        return (torch.cat(found) == held[2]).numpy()

    def given(count):
        return [(train[0][i : i + 32], train[1][i : i + 32]) for i in range(0, count, 32)]

    return base, tuned, right, ["head"], given


def learn(model, call, labels, steps, rate, head=None):
    """Train all of a model."""
    import torch

    model.train()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and not (head and n.startswith("head"))]
    groups = [{"params": trained, "lr": rate}]
    groups += [{"params": list(model.head.parameters()), "lr": head}] if head else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: delta_task.schedule(min(i, steps - 1), steps))
    for rows in delta_task.batches(len(labels), 16, steps, 0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(call(model, rows), labels[rows]).backward()
        optimizer.step()
        plan.step()


def measure(ways, calibration, base, tuned, right, exclude, given):
    import slimkit

    wanted, before = right(tuned), right(base)
    numbers = sum(v.numel() for v in tuned.state_dict().values() if v.is_floating_point())
    told = {
        "base": round(100 * before.mean(), 2),
        "tuned": round(100 * wanted.mean(), 2),
        "bf16 MB": round(2e-6 * numbers, 2),
    }
    print(json.dumps(told), flush=True)
    for way, count in itertools.product(ways.split(","), map(int, calibration.split(","))):
        kind, ratio = way.split(":")
        model = copy.deepcopy(base)
        began = time.process_time()
        data = given(count) if count else None
        slimkit.compress_delta(model, tuned, kind, bytes_ratio=float(ratio), exclude=exclude, calibration=data)
        taken = time.process_time() - began
        with tempfile.TemporaryDirectory() as place:
            folder = slimkit.save_delta(model, place)
            size = sum(f.stat().st_size for f in pathlib.Path(folder).iterdir())
            fresh = copy.deepcopy(base)
            slimkit.load_delta(fresh, folder)
        difference = right(fresh).astype(float) - wanted
        row = {
            "way": way,
            "calibration": count,
            "points": round(100 * difference.mean(), 2),
            "error": round(100 * difference.std() / len(difference) ** 0.5, 2),
            "times smaller": round(2 * numbers / size, 1),
            "CPU seconds": round(taken, 1),
        }
        print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits,minilm")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--ways", default=WAYS, help="kind:bytes_ratio, several by commas")
    parser.add_argument("--calibration", default="0,256", help="training texts (images) to fit to, several by commas")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for task in given.task.split(","):
        made = digits() if task == "digits" else minilm(given.steps, given.length, given.test)
        print(task, flush=True)
        measure(given.ways, given.calibration, *made)


if __name__ == "__main__":
    main()
