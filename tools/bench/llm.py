"""What each way to make a language model smaller costs it: perplexity on held-out text, by one protocol and one seed.

    python -m tools.bench.llm sparse --model DIR --text FOLDER --out llm.jsonl
    python -m tools.bench.llm prune --keep 0.9 0.8 0.7 0.5 ...
    python -m tools.bench.llm calibration ...
    python -m tools.bench.llm distill --student SMALL ...   SMALL: a folder that transformers opens, or 'par 2:4'...
    python -m tools.bench.llm table ...                     what the file holds

DIR is a language model's folder, FOLDER what `tools/recipes/smollm_text.py FOLDER` wrote. Judged as `slimkit compare`
does: the first window of each of 32 held-out documents, never joined, means per token; calibrated on 32 windows of
`slimkit.calibration`, seed 0. Each cell stands in the file as soon as it is measured, and is not measured again: a run
that was killed goes on.

Peers are written from their papers: the published SparseGPT loop (Frantar & Alistarh 2023), ADMM (Boza 2024), and those
of `llm_prune.py`. They see the same windows, and the sparse ones the same walk through the layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from slimkit import (
    Compressor,
    KnowledgeDistillConfig,
    SparseConfig,
    TeacherCache,
    Trainer,
    calibration,
    emulate_w8a8s,
    freeze_zeros,
    get_distill_model,
    own_text,
    save_w8a8s,
)
from slimkit.core.ascend.entropy import byte_entropy
from slimkit.core.compare.intervals import draws
from slimkit.core.compare.windows import Protocol, cut
from slimkit.core.sparse.maths.grid import FloatGrid, on_grid
from slimkit.core.sparse.methods import METHODS
from tools.bench import llm_prune, sparse, sparse_text

import torch
from torch import nn

SPARSE = (
    *(f"{method} {ratio}" for ratio in ("0.5", "2:4", "0.7") for method in ("magnitude", "wanda", "sparsegpt")),
    *(f"{method} {ratio}" for ratio in ("0.5", "2:4", "0.7") for method in ("hessian", "admm", "par", "par_v2")),
    *(f"{method} {ratio}" for ratio in ("0.6", "4:8") for method in ("sparsegpt", "hessian", "par")),
    *("par 0.5 residual", "par 0.7 residual", "hessian 0.7 free", "par 0.7 free", "par 0.5 free"),
    *("par 0.5 dlp", "par 0.7 dlp", "block 0.5 free", "block 0.7", "block 0.7 free"),
    *("hessian 0.5 swaps", "wanda 0.5 swaps", "par 0.5 swaps", "block 0.5", "block 2:4"),
    *("par 0.3", "par 0.3 bits", "par 0.3 rounded"),  # 2 bits of mantissa, while solving or afterwards
    *("par 0.4", "par 0.4 int8", "par 0.4 w8a8s", "par 0.4 w8a8s percentile"),  # whole numbers; inputs too, by ranges
)
CALIBRATION = (
    *("all 4x512", "all 16x512", "all 64x128", "all 16x128", "all 64x512"),
    *("manual 16x512", "library 16x512", "description 16x512", "self 16x512"),
)


class Bench:
    """The dense model, its texts, and the cells that are measured already.

    Args:
        asked: the command line.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        import transformers

        self.asked, self.out = asked, Path(asked.out)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
        dense = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
        self.dense = dense.eval().requires_grad_(False)
        self.held = {part: self._held(part) for part in ("held_out", "other")}
        self.cells = cells(self.out)

    def _held(self, part: str) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for window in cut(self.texts(part), Protocol(self.asked.length), self.tokenizer):
            found.setdefault(window.document, torch.from_numpy(window.ids))
        return list(found.values())[: self.asked.windows]

    def texts(self, part: str, kind: str | None = None) -> list[str]:
        rows = map(json.loads, (Path(self.asked.text) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
        return [row["text"] for row in rows if kind in (None, row["kind"])]

    def calibration(self, texts: Any = None, number: int | None = None, length: int | None = None) -> Any:
        """Batches of one window: few logits in memory at a time."""
        number, length = number or self.asked.calibration, length or self.asked.length
        given = self.texts("calibration") if texts is None else texts
        return calibration(given, self.tokenizer, number, length, batch_size=1, masks=False)

    def judged(self, model: nn.Module, part: str = "held_out") -> list[tuple[float, int]]:
        """Of each held-out document the sum of -ln p, and how many tokens it is over."""
        found = []
        with torch.no_grad():
            for ids in self.held[part]:
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
                found.append((float(loss), len(ids) - 1))
        return found

    def measure(
        self, name: str, make: Callable[[nn.Module], Any], parts: Iterable[str] = ("held_out",), spent: float = 0.0
    ) -> None:
        """Make one model smaller and judge it, unless that stands in the file.

        Args:
            name: of the cell.
            make: changes the copy of the dense model that it is given, or returns a model to be judged instead, the
                share of the parameters that is left, or figures by name: "bits", bytes' entropy a weight.
            parts: of the text.
            spent: CPU seconds before this.
        """
        if name in self.cells:
            return
        model, begun = copy.deepcopy(self.dense), time.process_time()
        made = make(model)
        model = made if isinstance(made, nn.Module) else model
        seconds = spent + time.process_time() - begun
        row = {"name": name, "cpu_s": round(seconds, 1), **{part: self.judged(model, part) for part in parts}}
        row |= made if isinstance(made, dict) else {"kept": made} if isinstance(made, float) else {}
        self.cells[name] = row
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row, self.cells), flush=True)


def cells(file: Path) -> dict[str, dict[str, Any]]:
    """What a file holds, by name; a line that a kill cut short is measured again."""
    found = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[row["name"]] = row
    return found


def perplexity(documents: list[tuple[float, int]]) -> float:
    return math.exp(sum(loss for loss, _ in documents) / sum(tokens for _, tokens in documents))


def line(row: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """One cell for people; with the dense model's, what its perplexity has lost, and that over documents drawn anew."""
    parts = [f"{row['name']:28} {row['cpu_s']:7.0f} CPU s"]
    parts += [f"{key} {row[key]:.3f}" for key in ("kept", "bits") if key in row]
    for part in ("held_out", "other"):
        if part not in row:
            continue
        here, text = perplexity(row[part]), f"{part} {perplexity(row[part]):8.2f}"
        if (dense := found.get("dense")) and row is not dense and part in dense:
            small, base = (torch.tensor(r[part], dtype=torch.float64) for r in (row, dense))
            counts = torch.from_numpy(draws(len(small), 0))
            one, other = (counts @ small, counts @ base)
            excess = (one[:, 0] / one[:, 1]).exp() - (other[:, 0] / other[:, 1]).exp()
            low, high = excess.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            text += f", excess {here - perplexity(dense[part]):.2f} ({low:.2f} to {high:.2f})"
        parts.append(text)
    return " | ".join(parts)


def sparsified(text: str, batches: Any) -> Callable[[nn.Module], dict[str, float]]:
    """What makes a model sparse as a cell says: a method or peer, a ratio or n:m pattern, and switches."""
    method, ratio, *switches = text.split()
    peer = {"sparsegpt": sparse.plain, "admm": sparse_text.admm}.get(method)
    config = SparseConfig(
        method="hessian" if peer else method,
        sparse_ratio=0.5 if ":" in ratio else float(ratio),
        pattern=ratio if ":" in ratio else None,
        residual="residual" in switches,
        uniform="dlp" if "dlp" in switches else "free" not in switches,
        swaps=1_000 if "swaps" in switches else 0,
        mantissa_bits=2 if "bits" in switches else None,
        outliers=0.02 if "bits" in switches else 0.0,
        weight_bits=8 if {"int8", "w8a8s"} & set(switches) else None,
    )

    def make(model: nn.Module) -> dict[str, float]:
        with ExitStack() as stack:
            if peer:
                row = replace(METHODS["hessian"], solver=sparse_text.as_solver(peer))
                stack.enter_context(mock.patch.dict(METHODS, {"hessian": row}))
            report = Compressor(model, config).compress(batches)
        layers = [model.get_submodule(name) for name in report["layers"]]
        for layer in layers if "rounded" in switches else ():
            weight = layer.weight.data
            keep = weight != 0
            layer.weight.data = on_grid(weight, keep, None, FloatGrid(2), int(0.02 * int(keep.sum())))[0]
        halves = np.concatenate([layer.weight.detach().half().numpy().reshape(-1) for layer in layers])
        if "w8a8s" in switches:
            ranges = "percentile" if "percentile" in switches else "minmax"
            with tempfile.TemporaryDirectory() as folder:
                entropy = save_w8a8s(folder, model, batches, ranges=ranges).entropy_bits
                emulate_w8a8s(model, folder)
            return {"bits": entropy}
        return {"bits": byte_entropy(halves)}

    return make


def run_sparse(bench: Bench) -> None:
    batches = bench.calibration()
    for name in bench.asked.only or SPARSE:
        bench.measure(name, sparsified(name, batches))


def run_calibration(bench: Bench) -> None:
    """What number, length and kind of windows are worth, on text like the calibration's and of a kind not in it."""
    for name in bench.asked.only or CALIBRATION:
        source, size = name.split()
        number, length = map(int, size.split("x"))
        if source == "self":
            kept = bench.out.with_suffix(f".{size}.self.jsonl")
            texts = own_text(bench.dense, number, length, file=kept)
        else:
            texts = bench.texts("calibration", None if source == "all" else source)
        batches = bench.calibration(texts, number, length)
        for what in bench.asked.cells:
            make = sparsified(what, batches)
            bench.measure(f"{what} on {name}", make, ("held_out", "other"))


def run_prune(bench: Bench) -> None:
    batches = bench.calibration()
    ids = torch.cat(list(batches))
    only = bench.asked.only or ["slimkit", "free", "rotated", *llm_prune.PEERS]
    seen = llm_prune.Seen(bench.dense, ids) if set(only) & llm_prune.PEERS.keys() else None
    shape = llm_prune.Shape(bench.dense)
    for keep in bench.asked.keep:
        for name in only:
            if name in llm_prune.PEERS:
                make = lambda model, n=name, k=keep: llm_prune.PEERS[n](model, seen, shape, k, ids)
            else:
                form = "any" if name == "free" else None
                rotated = name == "rotated"
                make = lambda model, f=form, k=keep, r=rotated: llm_prune.ours(model, ids, k, f, r)
            bench.measure(f"{name} keeps {keep}", make)


def run_distill(bench: Bench) -> None:
    """A smaller model taught by the dense one's logits on the training text, kept on disk; judged on the way.

    A folder's model learns as it is, a cell of `sparse` with its zeros kept.
    """
    import transformers

    name = Path(bench.asked.student).name
    if Path(bench.asked.student).is_dir():
        student = transformers.AutoModelForCausalLM.from_pretrained(bench.asked.student, dtype=torch.float32)
    else:
        student = copy.deepcopy(bench.dense)
        sparsified(bench.asked.student, bench.calibration())(student)
        freeze_zeros(student.requires_grad_(True))
    number = max(bench.asked.tokens) // bench.asked.length
    batches = list(bench.calibration(bench.texts("training"), number))
    outputs = {"t_output_idx": "logits", "s_output_idx": "logits"}
    term = {"func_name": "KDKLDiv", "func_weight": 1, "temperature": 1}
    config = KnowledgeDistillConfig().add_output_soft_label({**outputs, "loss_func": [term]})
    begun = time.process_time()
    teacher = TeacherCache.build(bench.dense, batches, config, bench.out.with_suffix(".teacher"), sampled=64)
    spent, done = time.process_time() - begun, 0
    dual = get_distill_model(teacher, student, config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=bench.asked.learning_rate, weight_decay=0.0)
    bench.measure(f"{name} + 0 tokens", lambda _: student)
    for tokens in sorted(bench.asked.tokens):
        until, begun = tokens // bench.asked.length, time.process_time()
        warmup = None if done else lambda _optimizer, _updates: lambda step: min((step + 1) / 8, 1.0)
        Trainer(dual, optimizer=optimizer).train(batches[done:until], 1, create_scheduler_fn=warmup)
        spent, done = spent + time.process_time() - begun, until
        bench.measure(f"{name} + {tokens} tokens", lambda _: student.eval(), spent=spent)


def show(found: dict[str, dict[str, Any]]) -> None:
    """All cells, those of each pattern by what they lost."""
    for row in sorted(found.values(), key=lambda row: (row["name"].split()[1:], perplexity(row["held_out"]))):
        print(line(row, found))


JOBS = {
    "sparse": run_sparse,
    "calibration": run_calibration,
    "prune": run_prune,
    "distill": run_distill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=[*JOBS, "table"])
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--text", default="runs/smollm-text")
    parser.add_argument("--out", default="llm.jsonl")
    parser.add_argument("--windows", type=int, default=32, help="of judging")
    parser.add_argument("--calibration", type=int, default=32, help="windows of calibration")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="+", help="cells of the job, such as 'par 2:4'; all of them by default")
    parser.add_argument("--cells", nargs="+", default=["hessian 0.5", "hessian 2:4"], help="what calibration judges by")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5], help="shares for prune")
    parser.add_argument("--student", help="of distill: a folder, or a cell of sparse such as 'par 2:4'")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536, 262_144], help="to distil on")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    asked = parser.parse_args()
    if asked.job == "table":
        show(cells(Path(asked.out)))
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("slimkit").setLevel(logging.WARNING)
    bench = Bench(asked)
    bench.measure("dense", lambda model: model, ("held_out", "other"))
    JOBS[asked.job](bench)


if __name__ == "__main__":
    main()
