"""Checkpoints timed against bounds in one run: saving a delta, converting a gigabyte, cutting a model out of a file.

Run: python tools/bench/checkpoint.py [--gigabytes 1] [--folder /tmp] [--only delta|convert|cut]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peak


def median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def saving_a_delta(folder: Path) -> dict[str, float]:
    """1 % of a model of 100 M parameters, against safetensors' own save_file of the same tensors."""
    from safetensors.torch import save_file

    from slimkit.checkpoint import TrainableParamsCheckPoint, save_checkpoint

    import torch

    model = torch.nn.ModuleList(torch.nn.Linear(1000, 1000, bias=False) for _ in range(100)).requires_grad_(False)
    model[50].requires_grad_(True)
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    saver = TrainableParamsCheckPoint(folder / "delta")
    plain, synced, ours, callback, spent, plainly_spent = [], [], [], [], [], []
    for number in range(40):  # one after the other, so that a busy moment hits all
        began = time.process_time()
        plain.append(median_ms(lambda: save_file(tensors, folder / "plain.safetensors"), 1))
        plainly_spent.append(time.process_time() - began)

        def save_and_sync() -> None:
            save_file(tensors, folder / "plain.safetensors")
            with open(folder / "plain.safetensors", "rb") as handle:
                os.fsync(handle.fileno())

        synced.append(median_ms(save_and_sync, 1))
        ours.append(median_ms(lambda: save_checkpoint(tensors, folder / "ours.safetensors"), 1))
        began = time.process_time()
        callback.append(median_ms(lambda n=number: saver.step_end(model, step=n + 1), 1))
        spent.append(time.process_time() - began)
    found = {
        "save_file_ms": statistics.median(plain),
        "save_file_fsync_ms": statistics.median(synced),
        "save_checkpoint_ms": statistics.median(ours),
        "trainable_callback_ms": statistics.median(callback),
        "save_file_cpu_ms": statistics.median(plainly_spent) * 1e3,
        "trainable_callback_cpu_ms": statistics.median(spent) * 1e3,
    }
    found["ratio_to_save_file"] = statistics.median(c / p for c, p in zip(callback, plain, strict=True))
    found["ratio_to_save_file_fsync"] = statistics.median(c / p for c, p in zip(callback, synced, strict=True))
    return found


CONVERT = """
import json, sys, time
from slimkit import convert_checkpoint
import slimkit.convert

def memory(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

with open("/proc/self/clear_refs", "w") as handle:
    handle.write("5")  # from here on the highest point counts
before, began = memory("VmRSS"), time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], manifest=sys.argv[3] == "1")
print(json.dumps({"seconds": time.perf_counter() - began, "grown_mb": memory("VmHWM") - before}))
"""


def converting(folder: Path, gigabytes: float) -> dict[str, float]:
    """A sharded safetensors checkpoint into one .ckpt, against copying the same bytes to the same disk."""
    from slimkit.core import files

    shards, per_shard = 4, 8
    side = int((gigabytes * (1 << 30) / 4 / shards / per_shard) ** 0.5)
    source = folder / "source"
    table = {}
    rng = np.random.default_rng(0)
    for shard in range(shards):
        tensors = {
            f"layers.{shard}.{i}.weight": rng.standard_normal((side, side), dtype=np.float32) for i in range(per_shard)
        }
        files.write_tensors(source / f"model-{shard}.safetensors", tensors)
        table |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    files.write_json(source / "model.safetensors.index.json", {"weight_map": table})
    total_mb = sum(p.stat().st_size for p in source.iterdir()) / (1 << 20)
    largest_mb = max(p.stat().st_size for p in source.iterdir()) / (1 << 20)

    def copy(*, forced: bool) -> None:
        # What the disk can do: the same bytes into one new file, forced out, put in place of the last one. Not forced,
        # it is what memory can do: a gigabyte stays there.
        with open(folder / "copy.part", "wb") as handle:
            for path in sorted(source.glob("*.safetensors")):
                with open(path, "rb") as reading:
                    shutil.copyfileobj(reading, handle, 1 << 22)
            handle.flush()
            if forced:
                os.fsync(handle.fileno())
        os.replace(folder / "copy.part", folder / "copy")

    copies, unforced, runs, bare = [], [], [], []
    grown = 0.0
    for _ in range(3):
        copies.append(median_ms(lambda: copy(forced=True), 1) / 1e3)
        unforced.append(median_ms(lambda: copy(forced=False), 1) / 1e3)
        os.sync()  # or the next conversion would pay for what this left in memory
        for with_manifest, into in (("1", runs), ("0", bare)):
            done = subprocess.run(
                [sys.executable, "-c", CONVERT, str(source), str(folder / "out.ckpt"), with_manifest],
                capture_output=True,
                text=True,
                check=True,
            )
            result = json.loads(done.stdout.splitlines()[-1])
            into.append(result["seconds"])
            grown = max(grown, result["grown_mb"])
    return {
        "mb": total_mb,
        "largest_shard_mb": largest_mb,
        "copy_mb_per_s": total_mb / statistics.median(copies),
        "convert_mb_per_s": total_mb / statistics.median(runs),
        "convert_without_manifest_mb_per_s": total_mb / statistics.median(bare),
        "copy_unforced_mb_per_s": total_mb / statistics.median(unforced),
        "share_of_copy_rate": statistics.median(c / r for c, r in zip(copies, runs, strict=True)),
        "share_of_copy_rate_without_manifest": statistics.median(c / r for c, r in zip(copies, bare, strict=True)),
        "share_of_unforced_copy_rate": statistics.median(c / r for c, r in zip(unforced, runs, strict=True)),
        "grown_mb": grown,
        "grown_by_largest_shard": grown / largest_mb,
    }


def cutting(folder: Path) -> dict[str, float]:
    """A BERT-base file (415 MB) cut to 6 layers of half the FFN width; the peer needed .44 s and 616 MB more."""
    from slimkit.core.weights.blocks import PruneConfig
    from slimkit.weights import prune_model_weight

    import torch
    from transformers import BertConfig, BertModel

    path = folder / "bert.pt"
    torch.save(BertModel(BertConfig()).state_dict(), path)
    small = BertModel(BertConfig(num_hidden_layers=6, intermediate_size=1536))
    found = {}
    for selection in ("first", "importance"):
        config = PruneConfig().set_steps(["prune_blocks", "prune_bert_intra_block"]).set_selection(selection)
        config.add_blocks_params(r"encoder.layer.(\d+).", {i: 2 * i for i in range(6)})
        before = peak.begin_anew()
        found[f"{selection}_s"] = median_ms(lambda c=config: prune_model_weight(small, c, path), 3) / 1e3
        found[f"{selection}_grown_mb"] = peak.memory_mb("VmHWM") - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--only", choices=("delta", "convert", "cut"), default=None)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        for key, title, work in (
            ("delta", "saving a delta of 1 % of 100 M parameters", lambda: saving_a_delta(folder)),
            ("convert", f"converting {asked.gigabytes:g} GB", lambda: converting(folder, asked.gigabytes)),
            ("cut", "cutting BERT-base", lambda: cutting(folder)),
        ):
            if asked.only not in (None, key):
                continue
            print(title)
            for key, value in work().items():
                print(f"  {key:36s} {value:10.2f}")


if __name__ == "__main__":
    main()
