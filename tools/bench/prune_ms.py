"""Structural pruning of mindcv's models: share of parameters kept and time: `python tools/bench/prune_ms.py [net ...]`.

Every net is pruned twice, asked for 0.8 and for 0.5 of its parameters (alignment 16, node limit 0.5, the classifier
whole). Seconds are those of analysis and cut at 0.5 on a fresh net; the pruned net runs once, which is checked.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GLOG_v", "3")

import numpy as np
import peak

import mindspore as ms

# name in mindcv -> pixels along each side of the example
NETS = {
    "resnet18": 128,
    "resnet50": 128,
    "mobilenet_v2_100": 128,
    "vgg16": 224,
    "densenet121": 128,
    "efficientnet_b0": 128,
    "convnext_tiny": 128,
    "vit_b_32_224": 224,
    "swin_tiny": 224,
    "googlenet": 128,
    "shufflenet_v2_x1_0": 128,
    "regnet_x_400mf": 128,
}


def weights(net: Any) -> int:
    return sum(p.size for p in net.get_parameters() if p.is_floating_point() and "moving_" not in p.name)


def measure(name: str, pixels: int) -> dict[str, float]:
    import mindcv

    from slimkit_ms.prune import PruneMindSpore

    row: dict[str, float] = {}
    for ratio in (0.8, 0.5):
        net = mindcv.create_model(name, num_classes=1000)
        net.set_train(False)
        x = ms.Tensor(np.random.default_rng(0).standard_normal((1, 3, pixels, pixels)).astype(np.float32))
        before = weights(net)
        began = time.perf_counter(), time.process_time()
        PruneMindSpore(net, x).set_importance_evaluation_function("l1").prune(ratio, [-1])
        row["wall"], row["cpu"] = time.perf_counter() - began[0], time.process_time() - began[1]
        row[f"kept@{ratio}"] = weights(net) / before
        row["parameters"] = before
        out = net(x)
        assert out.shape == (1, 1000)
        assert np.isfinite(out.asnumpy()).all()
        del net, out
        gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    given = parser.parse_args()
    ms.set_device("CPU")
    print(f"mindspore {ms.__version__}, {os.cpu_count()} cores")
    for name in given.nets:
        row = measure(name, NETS[name])
        highest = round(peak.memory_mb("VmHWM"))
        print(
            f"{name:20s} {row['parameters'] / 1e6:6.1f} M  kept@0.8 {row['kept@0.8']:.3f}  "
            f"kept@0.5 {row['kept@0.5']:.3f}  {row['cpu']:.1f} CPU s, {row['wall']:.1f} s; peak so far {highest} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
