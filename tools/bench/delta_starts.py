"""How fast each kind of delta and each start of LoRA learns a kind of text that a language model knows less well.

    python -m tools.bench.delta_starts --model DIR --text FOLDER --out FILE [--ways lora gradient ...] [--rates 2e-3]
    python -m tools.bench.delta_starts --out FILE table

DIR is a language model's folder, FOLDER what `tools/recipes/smollm_text.py FOLDER` wrote: `other.jsonl` holds its least
known kind (docstrings about science). Windows of `--length` tokens, at most 8 of a document, of documents that never
stand on both sides; every way sees the same batches in the same order, its loss on the held-out windows is taken every
`--every` steps, AdamW, a constant rate after 5 steps of warm-up. A start that is read from data reads 8 batches that it
is not trained on; what they cost is in `start_s`. Seconds are of the CPU. Each row stands in the file as soon as it is
measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

import slimkit
from tools.bench import peak

import torch

LORA = {"rank": 8, "alpha": 16}
# way -> kind, options, learning rate
WAYS: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora": ("lora", LORA, 2e-3),
    "gradient": ("lora", {**LORA, "init": "gradient"}, 2e-3),
    "activations": ("lora", {**LORA, "init": "activations"}, 2e-3),
    "pissa": ("lora", {**LORA, "init": "pissa"}, 1e-3),
    "miss": ("miss", {"rank": 16}, 3e-4),
    "shira": ("shira", {"rank": 8}, 5e-3),
    "shira magnitude": ("shira", {"rank": 8, "support": "magnitude"}, 5e-3),
    "lora+": ("lora", LORA, 5e-4),
    "int8 base": ("lora", {**LORA, "base_dtype": "int8"}, 2e-3),
    "bfloat16 base": ("lora", {**LORA, "base_dtype": "bfloat16"}, 2e-3),
    "full": ("", {}, 1e-4),
}
_BATCHES = 8  # that a start is read from


def windows(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out windows and those to learn from, (n, length)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(Path(options.text) / "other.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    found = []
    for i in np.random.default_rng(0).permutation(len(texts)):
        ids = tokenizer(texts[i][: 100 * options.length])["input_ids"]
        found.append([ids[j : j + options.length] for j in range(0, len(ids) - options.length, options.length)][:8])
    held = [part for parts in found[:40] for part in parts[:1]][: options.held]
    return torch.tensor(held), torch.tensor([part for parts in found[40:] for part in parts])


def drawn(rows: torch.Tensor, size: int, seed: int) -> list[torch.Tensor]:
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[order[i : i + size]] for i in range(0, len(order) - size + 1, size)]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return found


def trainable(model: Any, way: str, rate: float) -> Any:
    if way == "lora+":
        return torch.optim.AdamW(slimkit.lora_plus_groups(model, rate, 16.0), weight_decay=0.0)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)


def measured(way: str, rate: float, seed: int, options: argparse.Namespace, data: Any) -> dict[str, Any]:
    """One model trained: its losses, and what it cost."""
    from transformers import AutoModelForCausalLM

    held, rows = data
    torch.manual_seed(seed)
    gc.collect()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.config.use_cache = False
    kind, settings, _ = WAYS[way]
    began = time.process_time()
    if settings.get("init") in ("gradient", "activations"):
        settings = {**settings, "calibration": drawn(rows, options.batch, seed + 1000)[:_BATCHES]}
        if settings["init"] == "gradient":
            settings["loss"] = loss_of
        else:
            settings["calibration"] = [{"input_ids": ids} for ids in settings["calibration"]]
    if kind:
        slimkit.apply_delta(model, kind, **settings)
    start_s = time.process_time() - began
    gc.collect()
    before = peak.begin_anew()
    optimizer = trainable(model, way, rate)
    full = [group["lr"] for group in optimizer.param_groups]

    def judged() -> float:
        model.eval()
        with torch.no_grad():
            parts = [loss_of(model, held[i : i + 4]).item() for i in range(0, len(held), 4)]
        model.train()
        return float(np.mean(parts))

    curve, losses, spent = {0: judged()}, [], 0.0
    for step, ids in enumerate(drawn(rows, options.batch, seed)[: options.steps], 1):
        begun = time.process_time()
        for group, top in zip(optimizer.param_groups, full):
            group["lr"] = top * min(1.0, step / 5)
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        spent += time.process_time() - begun
        losses.append(loss.item())
        if step % options.every == 0 or step == options.steps:
            curve[step] = judged()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "way": way,
        "rate": rate,
        "seed": seed,
        "trained": trained,
        "share": round(trained / sum(p.numel() for p in model.parameters()), 4),
        "held": {str(k): round(v, 4) for k, v in curve.items()},
        "train": round(float(np.mean(losses)), 4),
        "step_s": round(spent / len(losses), 3),
        "start_s": round(start_s, 1),
        "resident_mb": round(before),
        "training_mb": round(peak.memory_mb("VmHWM") - before),
        "steps": options.steps, "length": options.length, "batch": options.batch,
    }  # fmt: skip


def apart(*arguments: Any) -> dict[str, Any]:
    """`measured` in a process of its own, so that the peak of its memory is its own; imports and data are shared."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(measured(*arguments)))
    process.start()
    there.close()
    found: dict[str, Any] = here.recv()
    process.join()
    return found


def steps_until(curve: dict[str, float], loss: float) -> float | None:
    """The step at which a curve first lies at a loss or below, between two points on a straight line.

    Example:
        >>> steps_until({"0": 3.0, "10": 2.0}, 2.5)
        5.0
    """
    points = [(int(k), v) for k, v in curve.items()]
    for (a, before), (b, after) in pairwise(points):
        if after <= loss < before:
            return round(a + (b - a) * (before - loss) / (before - after), 1)
    return None


def table(rows: list[dict[str, Any]]) -> None:
    """Print each way's best rate beside LoRA's best."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key, last = (row["way"], row["seed"]), list(row["held"].values())[-1]
        if key not in best or last < list(best[key]["held"].values())[-1]:
            best[key] = row
    for (way, seed), row in best.items():
        reference = best.get(("lora", seed))
        end = None if reference is None else list(reference["held"].values())[-1]
        told = {k: row[k] for k in ("rate", "held", "train", "step_s", "start_s", "training_mb", "trained")}
        told["steps to LoRA's last loss"] = None if end is None else steps_until(row["held"], end)
        print(json.dumps({"way": way, "seed": seed, **told}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, help="instead of each way's own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--held", type=int, default=32, help="held-out windows")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.job == "table":
        table(rows)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    known = {(r["way"], r["rate"], r["seed"], r["steps"], r["length"], r["batch"]) for r in rows}
    data = windows(options)
    for seed in range(options.seeds):
        for way in options.ways:
            for rate in options.rates or [WAYS[way][2]]:
                if (way, rate, seed, options.steps, options.length, options.batch) in known:
                    continue
                row = apart(way, rate, seed, options, data)
                with options.out.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
