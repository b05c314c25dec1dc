"""How fast each kind of delta and each start of LoRA learns a kind of text that a language model knows less well.

    python -m tools.bench.delta_starts --model DIR --text FOLDER --out FILE --tune [--ways lora gradient ...]
    python -m tools.bench.delta_starts --out FILE table

DIR is a language model's folder, FOLDER what `tools/recipes/smollm_text.py FOLDER` wrote: `other.jsonl` holds its least
known kind (docstrings about science). Windows of `--length` tokens, at most 8 of a document; the documents that are
learnt from, that rates are chosen on (`--tune`) and that are judged on are three sets. Every way sees the same batches
in the same order, its loss on the held-out windows is taken every `--every` steps, AdamW, a constant rate after 5 steps
of warm-up. With `--tune` each way's rate is the best of three around its own after `--tune-steps` steps, and of one
more beyond the three where the best stands at their end. A start that is read from data reads 8 batches that it is not
trained on; what they cost is in `start_s`. Seconds are of the CPU. Each row (a rate tried, or a way from one seed)
stands in the file as soon as it is measured, and is not measured again: the run may be killed and called again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from tools.bench import peak
from tools.bench.delta_ways import FRONTS, WAYS, groups, tuned

import torch

_BATCHES = 8  # that a start is read from
_APART = 40  # documents that are judged on, and as many that rates are chosen on
FACTOR = 2.5  # between the rates that --tune tries
_SEED = 100  # of the rates tried
_SAME = ("job", "way", "rate", "seed", "steps", "length", "batch", "held_windows")  # what makes a row the same


def windows(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Windows to judge on, to choose rates on, and to learn from, (n, length) each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(Path(options.text) / "other.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    found = []
    for i in np.random.default_rng(0).permutation(len(texts)):
        ids = tokenizer(texts[i][: 100 * options.length])["input_ids"]
        found.append([ids[j : j + options.length] for j in range(0, len(ids) - options.length, options.length)][:8])
    found = [parts for parts in found if parts]
    sets = {"measure": found[:_APART], "rate": found[_APART : 2 * _APART]}
    told = {name: torch.tensor([parts[0] for parts in some][: options.held]) for name, some in sets.items()}
    return {**told, "learn": torch.tensor([part for parts in found[2 * _APART :] for part in parts])}


def drawn(rows: torch.Tensor, size: int, seed: int, count: int) -> list[torch.Tensor]:
    """So many batches, no window twice."""
    if count * size > len(rows):
        raise SystemExit(f"{count} batches of {size} need {count * size} windows; the text has {len(rows)}")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[order[i * size : (i + 1) * size]] for i in range(count)]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The mean over a window's tokens but the first, whatever stands in front of it."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def measured(job: str, way: str, rate: float, seed: int, steps: int, options: Any, data: Any) -> dict[str, Any]:
    """One model trained: its losses, and what it cost."""
    from transformers import AutoModelForCausalLM

    parent = os.getppid()
    held, rows = data[job], data["learn"]
    torch.manual_seed(seed)
    gc.collect()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.config.use_cache = False
    began = time.process_time()
    model = tuned(way, model, options.model, drawn(rows, options.batch, seed + 1000, _BATCHES), loss_of, seed)
    start_s = time.process_time() - began
    gc.collect()
    before = peak.begin_anew([*model.parameters(), *model.buffers()])
    optimizer = torch.optim.AdamW(groups(way, model, rate), weight_decay=0.0)
    full = [group["lr"] for group in optimizer.param_groups]

    def judged() -> float:
        model.eval()
        with torch.no_grad():  # in batches of training's size: the peak of memory is training's
            parts = [loss_of(model, ids).item() for ids in held.split(options.batch)]
        model.train()
        return float(np.mean(parts))

    curve, losses, spent = {0: judged()}, [], []
    for step, ids in enumerate(drawn(rows, options.batch, seed, steps), 1):
        if os.getppid() != parent:
            raise SystemExit("the run that asked has ended")
        begun = time.process_time()
        for group, top in zip(optimizer.param_groups, full):
            group["lr"] = top * min(1.0, step / 5)
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        spent.append(time.process_time() - begun)
        losses.append(loss.item())
        if step == steps or (job == "measure" and step % options.every == 0):
            curve[step] = judged()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "job": job,
        "way": way,
        "rate": rate,
        "seed": seed,
        "trained": trained,
        "share": round(trained / sum(p.numel() for p in model.parameters()), 5),
        "held": {str(k): round(v, 4) for k, v in curve.items()},
        "train": round(float(np.mean(losses)), 4),
        "step_s": round(float(np.median(spent)), 3),
        "start_s": round(start_s, 1),
        "cell_s": round(time.process_time(), 0),
        "resident_mb": round(before),
        "training_mb": round(peak.memory_mb("VmHWM") - before),
        "steps": steps, "length": options.length, "batch": options.batch, "held_windows": options.held,
    }  # fmt: skip


def apart(*arguments: Any) -> dict[str, Any]:
    """`measured` in a process of its own, so that the peak of its memory is its own; imports and data are shared."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send(measured(*arguments))
        except Exception:  # noqa: BLE001  (the parent prints it)
            there.send(traceback.format_exc())

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        found: Any = here.recv()
    except EOFError:
        process.join()
        found = f"the process ended without an answer, exit code {process.exitcode}"
    process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    answer: dict[str, Any] = found
    return answer


class Rows:
    """The rows of a file: what stands there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # a run was killed while it wrote
            text = text[: text.rfind("\n") + 1]
            path.write_text(text)
        self.rows = [json.loads(line) for line in text.splitlines()]

    def row(self, options: Any, data: Any, job: str, way: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """The row, from the file or measured now."""
        asked = (job, way, rate, seed, steps, options.length, options.batch, options.held)
        for row in self.rows:
            if tuple(row[key] for key in _SAME) == asked:
                return row
        made = apart(job, way, rate, seed, steps, options, data)
        self.rows.append(made)
        with self.path.open("a") as lines:
            lines.write(json.dumps(made) + "\n")
        print(json.dumps(made), flush=True)
        return made


def last(row: dict[str, Any]) -> float:
    """The loss at the end; one that is no number is the worst."""
    value = float(list(row["held"].values())[-1])
    return value if math.isfinite(value) else math.inf


def best_rate(way: str, options: Any, data: Any, rows: Rows) -> float:
    """The rate of the least loss on the windows for that, of three and of one beyond where the best is at an end."""
    usual = WAYS[way][2]
    tried = {
        n: last(rows.row(options, data, "rate", way, float(f"{usual * FACTOR**n:.2g}"), _SEED, options.tune_steps))
        for n in (0, -1, 1)
    }
    least = min(tried, key=lambda n: tried[n])
    if least:
        beyond = float(f"{usual * FACTOR ** (2 * least):.2g}")
        tried[2 * least] = last(rows.row(options, data, "rate", way, beyond, _SEED, options.tune_steps))
        least = min(tried, key=lambda n: tried[n])
    return float(f"{usual * FACTOR**least:.2g}")


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


def _groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each way's rows at the rate that was measured from most seeds, and of those at the best."""
    for way in WAYS:
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if row["job"] == "measure" and row["way"] == way:
                by_rate.setdefault(row["rate"], []).append(row)
        if by_rate:
            yield way, max(by_rate.values(), key=lambda some: (len(some), -float(np.mean([last(r) for r in some]))))


def error(values: list[float]) -> str:
    """A mean and its standard error over seeds.

    Example:
        >>> error([1.0, 2.0]), error([1.0])
        ('1.500 ± 0.500', '1.000')
    """
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def table(rows: list[dict[str, Any]]) -> None:
    """Print a row of each way beside LoRA and full fine-tuning, paired seed by seed."""
    found = dict(_groups(rows))
    ends = {way: {row["seed"]: last(row) for row in some} for way, some in found.items()}
    titles = (
        "way", "rate", "trained, %", "seeds", "held-out loss", "minus LoRA's", "minus full's",
        "steps to LoRA's last loss", "CPU s a step", "start, CPU s", "training MB",
    )  # fmt: skip
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for way, some in found.items():
        beside = []
        for other in ("lora", "full"):
            shared = [seed for seed in ends[way] if seed in ends.get(other, ())]
            apart = [ends[way][seed] - ends[other][seed] for seed in shared]
            beside.append(error(apart) if apart and way != other else "")
        until = [steps_until(row["held"], end) for row in some if (end := ends.get("lora", {}).get(row["seed"]))]
        step_s, start_s, memory = (
            np.median([row[key] for row in some]) for key in ("step_s", "start_s", "training_mb")
        )
        told = (
            f"{some[0]['rate']:g}",
            f"{100 * some[0]['share']:.2f}",
            str(len(some)),
            error(list(ends[way].values())),
        )
        cells = (way, *told, *beside, reached(until), f"{step_s:.2f}", f"{start_s:.0f}", f"{memory:.0f}")
        print("| " + " | ".join(cells) + " |")


def reached(until: list[float | None]) -> str:
    """The mean step of the seeds that came to a loss, and how many did.

    Example:
        >>> reached([100.0, 200.0]), reached([100.0, None]), reached([None])
        ('150', '100 (1 of 2 seeds)', 'none')
    """
    came = [step for step in until if step is not None]
    if not came:
        return "none" if until else ""
    return f"{np.mean(came):.0f}" + (f" ({len(came)} of {len(until)} seeds)" if len(came) < len(until) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[way for way in WAYS if way not in FRONTS])
    parser.add_argument("--fronts", action="store_true", help="the prefixes and prompts instead")
    parser.add_argument("--rates", nargs="*", type=float, help="instead of each way's own")
    parser.add_argument("--tune", action="store_true", help="look for each way's rate first")
    parser.add_argument("--tune-steps", type=int, default=75)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--held", type=int, default=16, help=f"held-out windows, at most {_APART}")
    options = parser.parse_args()
    rows = Rows(options.out)
    if options.job == "table":
        table(rows.rows)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data, failed = windows(options), []
    options.held = len(data["measure"])
    ways = FRONTS if options.fronts else options.ways
    for seed in range(options.seeds):
        for way in [way for way in ways if way not in failed]:
            try:
                rates = options.rates or [best_rate(way, options, data, rows) if options.tune else WAYS[way][2]]
                for rate in rates:
                    rows.row(options, data, "measure", way, rate, seed, options.steps)
            except RuntimeError as err:
                failed.append(way)
                print(f"{way}: {err}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
