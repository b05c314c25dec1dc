"""Accuracy after pruning, before and after fine-tuning, against Torch-Pruning on the handwritten digits:

    python tools/bench/prune_accuracy.py [--peer DIR] [--seeds 5] [--ratios 0.5 0.25] [--alignment 8] [--budget latency]

For every seed one dense network of the digits recipe is trained; each method prunes a copy of it to the same number of
parameters and fine-tunes for three epochs, once with each learning rate, all methods with the same batches. A method's
row is its mean accuracy over the seeds before fine-tuning, and after it with the rate that serves it best. Methods see
the 1,438 training digits only. With `--budget latency` the ratio is of the latency in onnxruntime (one image, one
thread): ours is foretold by a table, theirs is measured in a bisection, and both are measured at the end. `--peer` is a
folder with torch-pruning (pip install --no-deps --target DIR torch-pruning).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn
from torch.nn import functional as F

Data = dict[str, torch.Tensor]


def recipe() -> Any:
    """The digits recipe's own module: its network and its split."""
    path = Path(__file__).parent.parent / "recipes" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(digits: Any) -> Data:
    found = digits.data()
    images, labels = found["test"]
    return {
        "train": torch.cat(found["calibration"]),
        "labels": found["train"].labels,
        "test": images,
        "test_labels": labels,
    }


def accuracy(net: nn.Module, data: Data) -> float:
    net.eval()
    with torch.no_grad():
        return 100 * (net(data["test"]).argmax(1) == data["test_labels"]).float().mean().item()


def train(net: nn.Module, data: Data, epochs: int, rate: float, batch: int, seed: int) -> None:
    """AdamW with one cosine cycle; digits are moved by up to a pixel each way, as the recipe does."""
    chance = torch.Generator().manual_seed(seed)
    padded = F.pad(data["train"], (1, 1, 1, 1))
    shifts = torch.tensor([0, 1, 1, 1, 1, 2])
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    steps = epochs * -(-len(padded) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(epochs):
        for at in torch.randperm(len(padded), generator=chance).split(batch):
            down, right = shifts[torch.randint(0, 6, (2, len(at)), generator=chance)]
            rows = down[:, None, None] + torch.arange(8)[:, None]
            columns = right[:, None, None] + torch.arange(8)
            x = padded[at[:, None, None], 0, rows, columns][:, None]
            optimizer.zero_grad()
            F.cross_entropy(net(x), data["labels"][at]).backward()
            optimizer.step()
            schedule.step()


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


BUDGET: dict[str, Any] = {"table": None}  # of --budget latency


def share_of(net: nn.Module, dense: nn.Module) -> float:
    """What a net keeps of what the ratio counts."""
    if BUDGET["table"] is None:
        return size(net) / size(dense)
    from slimkit.core.prune.onnx_times import OnnxTimes
    from slimkit.export import example_arrays, export_onnx

    x = BUDGET["input"]
    times = OnnxTimes(lambda m, f: export_onnx(m.eval(), x, f, opset=13, tolerance=1e-2), lambda _: example_arrays(x))
    small, large = times.networks([net, dense])
    return small / large


def ours(importance: str, allocation: str, compensate: bool) -> Callable[..., nn.Module]:
    def prune(net: nn.Module, data: Data, ratio: float, alignment: int) -> nn.Module:
        from slimkit.prune import PruneTorch

        batches = list(data["train"].split(128))
        pruner = (
            PruneTorch(net, data["test"][:1]).set_alignment(alignment).set_node_reserved_ratio(min(0.25, ratio / 2))
        )
        if importance in ("taylor", "hessian"):
            labelled = list(zip(data["train"].split(8), data["labels"].split(8), strict=True))
            pruner.set_importance_evaluation_function(
                importance, calibration=labelled, loss=lambda output, batch: F.cross_entropy(output, batch[1])
            )
        else:
            pruner.set_importance_evaluation_function(importance)
        pruner.set_allocation(allocation)
        if BUDGET["table"] is not None:
            pruner.set_budget("latency", BUDGET["table"])
        if compensate:
            pruner.set_compensation(batches[:8])
        pruner.prune(ratio, [-1])
        return net

    return prune


def theirs(importance: str, everywhere: bool) -> Callable[..., nn.Module]:
    def prune(net: nn.Module, data: Data, ratio: float, _alignment: int) -> nn.Module:
        import torch_pruning as tp

        kinds = {
            "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
            "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "lamp": tp.importance.LAMPImportance,
            "bn": tp.importance.BNScaleImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
        }

        def at(share: float) -> nn.Module:
            copied = copy.deepcopy(net)
            measure = kinds[importance]()
            pruner = tp.pruner.BasePruner(
                copied, data["test"][:1], importance=measure, pruning_ratio=share, global_pruning=everywhere,
                ignored_layers=[copied.head], max_pruning_ratio=0.9,
            )  # fmt: skip
            if importance in ("taylor", "hessian"):
                copied.zero_grad()
                if importance == "hessian":
                    measure.zero_grad()
                    for x, y in zip(data["train"][:64], data["labels"][:64], strict=True):
                        copied.zero_grad()
                        F.cross_entropy(copied(x[None]), y[None]).backward()
                        measure.accumulate_grad(copied)
                else:
                    F.cross_entropy(copied(data["train"]), data["labels"]).backward()
            pruner.step()
            return copied

        low, high, best, best_kept = 0.0, 0.9, None, 0.0
        for _ in range(9):  # the share of channels that leaves the asked share of parameters
            middle = (low + high) / 2
            found = at(middle)
            kept = share_of(found, net)
            if best is None or abs(kept - ratio) < abs(best_kept - ratio):
                best, best_kept = found, kept
            low, high = (middle, high) if kept > ratio else (low, middle)
        assert best is not None
        return best

    return prune


METHODS: dict[str, Callable[..., nn.Module]] = {
    "slimkit l2 + compensation": ours("l2", "uniform", True),
    "slimkit bn_scale + compensation": ours("bn_scale", "uniform", True),
    "slimkit lamp, global + compensation": ours("lamp", "global", True),
    "slimkit hessian, global + compensation": ours("hessian", "global", True),
    "slimkit lamp, global": ours("lamp", "global", False),
    "slimkit hessian, global": ours("hessian", "global", False),
}
PEERS: dict[str, Callable[..., nn.Module]] = {
    "Torch-Pruning l1, local": theirs("l1", False),
    "Torch-Pruning l2, global": theirs("l2", True),
    "Torch-Pruning LAMP, global": theirs("lamp", True),
    "Torch-Pruning Taylor, global": theirs("taylor", True),
    "Torch-Pruning Hessian, global": theirs("hessian", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--budget", choices=["params", "latency"], default="params")
    parser.add_argument("--alignment", type=int, default=8, help="slimkit's; Torch-Pruning does not round")
    parser.add_argument("--rates", type=float, nargs="*", default=[5e-4, 2e-3])
    parser.add_argument("--only", default="", help="run only methods whose name contains this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.peer:
        sys.path.insert(0, given.peer)
    methods = {n: m for n, m in {**METHODS, **(PEERS if given.peer else {})}.items() if given.only.lower() in n.lower()}
    digits = recipe()
    data = load(digits)
    rows: dict[str, dict[str, list[float]]] = {}
    dense_scores = []
    if given.budget == "latency":
        from slimkit import measure_latency

        BUDGET["input"] = data["test"][:1]
        BUDGET["table"] = measure_latency(digits.build().eval(), BUDGET["input"], alignment=given.alignment)
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        dense = digits.build()
        train(dense, data, 14, 4e-3, 64, seed)
        dense_scores.append(accuracy(dense, data))
        print(f"seed {seed}: dense {dense_scores[-1]:.2f} %, {size(dense):,} parameters", flush=True)
        for ratio in given.ratios:
            for name, prune in methods.items():
                pruned = prune(copy.deepcopy(dense).eval(), data, ratio, given.alignment)
                row = rows.setdefault(f"{ratio:g} {name}", {})
                row.setdefault("kept", []).append(share_of(pruned, dense))
                row.setdefault("before", []).append(accuracy(pruned, data))
                for rate in given.rates:
                    tuned = copy.deepcopy(pruned)
                    train(tuned, data, 3, rate, 32, seed + 100)
                    row.setdefault(f"after {rate:g}", []).append(accuracy(tuned, data))
                print(f"  {ratio:g} {name}: " + ", ".join(f"{k} {v[-1]:.4g}" for k, v in row.items()), flush=True)
    print(f"\ndense {statistics.mean(dense_scores):.2f} %, mean of {given.seeds} seeds")
    for name, row in rows.items():
        means = {k: statistics.mean(v) for k, v in row.items()}
        rate = max(given.rates, key=lambda r: means[f"after {r:g}"])
        after = row[f"after {rate:g}"]
        print(
            f"{name:44s} keeps {means['kept']:.3f}  before {means['before']:6.2f}  "
            f"after {means[f'after {rate:g}']:6.2f} (lowest {min(after):.2f}, rate {rate:g})"
        )
    if given.json:
        given.json.write_text(json.dumps({"dense": dense_scores, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
