"""Latency foretold by a table against latency measured, on small nets of three shapes cut to half of it:

    python tools/bench/latency.py [--table FILE] [--ratios 0.5] [--nets resnet mobilenet vit]

Each net is random. A table of its layers is made in onnxruntime (one thread, the thread's own clock), the pruner is
asked for a share of the latency by each way of sharing it, and the cut net is measured in turn with the dense one.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn


class Basic(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.b, self.nb = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.short = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            if stride != 1 or n_in != n_out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.nb(self.b(torch.relu(self.na(self.a(x))))) + self.short(x))


def resnet() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18's blocks at half its width, images of 64."""
    blocks = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    for n_in, n_out, stride in ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
        blocks.append(Basic(n_in, n_out, stride))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)), torch.ones(1, 3, 64, 64)


class Inverted(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        inner = 4 * n_in
        self.body = nn.Sequential(
            nn.Conv2d(n_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, n_out, 1, bias=False), nn.BatchNorm2d(n_out),
        )  # fmt: skip
        self.same = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet() -> tuple[nn.Module, torch.Tensor]:
    """MobileNet-V2's blocks, images of 64."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    for n_in, n_out, stride in (
        (32, 32, 1),
        (32, 48, 2),
        (48, 48, 1),
        (48, 64, 2),
        (64, 64, 1),
        (64, 96, 1),
        (96, 96, 1),
    ):
        blocks.append(Inverted(n_in, n_out, stride))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)), torch.ones(1, 3, 64, 64)


def vit() -> tuple[nn.Module, torch.Tensor]:
    """A ViT of four blocks of DeiT-Ti's width, images of 64 in patches of 8."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768, image_size=64, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.ones(1, 3, 64, 64)


NETS = {"resnet": resnet, "mobilenet": mobilenet, "vit": vit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--alignment", type=int, default=8)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from slimkit import PruneTorch, export_onnx, measure_latency
    from slimkit.core.prune.onnx_times import OnnxTimes

    torch.set_num_threads(1)
    path = given.table or str(Path(tempfile.mkdtemp()) / "table.json")
    for name in given.nets:
        torch.manual_seed(0)
        net, x = NETS[name]()
        net.eval()
        inputs = {"pixel_values": x} if name == "vit" else x
        began = time.process_time()
        table = measure_latency(net, inputs, path, alignment=given.alignment, opset=17)
        fitted = next(n for n in reversed(table.networks.values()) if n["model"] == type(net).__name__)
        print(f"{name}: table in {time.process_time() - began:.0f} CPU s; fit: {fitted}", flush=True)
        arrays = {"pixel_values" if name == "vit" else "input": x.numpy()}

        def export(model: nn.Module, file: Path, inputs: Any = inputs) -> None:
            export_onnx(model, inputs, file, opset=17, tolerance=1e-2)

        times = OnnxTimes(export, lambda _, arrays=arrays: arrays)  # type: ignore[misc]
        for ratio in given.ratios:
            for how, importance in (("uniform", "l1"), *(("global", "random"),) * given.seeds, ("global", "l1")):
                small = copy.deepcopy(net)
                pruner = PruneTorch(small, inputs).set_alignment(given.alignment).set_budget("latency", table)
                pruner.set_importance_evaluation_function(importance, seed=int(time.time()) % 100)
                desc = pruner.set_allocation(how).prune(ratio)
                dense_ms, small_ms = times.networks([net, small])
                before, after = desc["made"]["latency"].values()
                print(
                    f"  {name} {ratio:g} {how} {importance}: foretold {after:.3f} of {before:.3f} ms, measured "
                    f"{small_ms:.3f} of {dense_ms:.3f} ms ({small_ms / dense_ms:.3f}), off "
                    f"{100 * (after / small_ms - 1):+.1f} %; {desc['made']['left_params']:,} parameters", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
