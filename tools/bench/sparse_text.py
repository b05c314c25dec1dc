"""Sparsity of the pretrained MiniLM: how close sentence embeddings stay to the dense model's, beside published methods.

    python tools/bench/sparse_text.py                         three seeds, 50, 60, 70 % and 2:4
    python tools/bench/sparse_text.py --methods alps par_v2 --ratios 0.5 --seeds 5

Each seed shuffles the standard library's documentation by module, so that no module gives both calibration and test
texts, and draws 80 texts (16 of up to 64 tokens a batch) to calibrate with and 256 to judge by. All methods of a seed
see the same texts. A figure is the mean over seeds of the mean cosine between a text's embedding from the sparse and
from the dense model, followed by the smallest difference to the best peer over the seeds.

Peers calibrate each layer on the inputs that the sparse layers before it produce, as their scripts do. They are written
here from their papers: SparseGPT (Frantar & Alistarh 2023), ADMM (Boza 2024, algorithm 1: 20 steps, the ratio reached
after 15), ALPS (Meng et al. 2024, algorithm 1, section 3.2, at most 300 steps and ten of conjugate gradients).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from slimkit import Compressor, SparseConfig
from slimkit.core.sparse.maths.par import refit
from slimkit.core.sparse.methods import METHODS

import torch
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from docstring_text import docstrings, model_folder

OURS = (
    *("hessian", "par", "par_v2", "block", "block-v2", "par-plain", "par_v2-plain", "par-free", "block-free"),
    *("wanda", "wanda-swaps", "hessian-swaps", "par-swaps"),
)
Peer = Callable[[torch.Tensor, torch.Tensor, float, Any], torch.Tensor]


def smallest(scores: torch.Tensor, ratio: float, nm: Any) -> torch.Tensor:
    """Which weights stay: all but the smallest share, or the n largest of each group."""
    if nm is not None:
        groups = scores.reshape(len(scores), -1, nm.group)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        return keep.scatter_(2, groups.topk(nm.keep, dim=2).indices, True).reshape(scores.shape)
    return scores > scores.flatten().kthvalue(max(1, int(ratio * scores.numel()))).values


def admm(weight: torch.Tensor, gram: torch.Tensor, ratio: float, nm: Any) -> torch.Tensor:
    """ADMM with a gradual mask on unit-variance inputs (Boza 2024)."""
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
    scale = gram.diagonal().sqrt()
    goal, gram = weight * scale, gram / scale[:, None] / scale
    solver = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.eye(len(gram))))
    z, u = goal, torch.zeros_like(goal)
    for step in range(20):
        v = (goal @ gram + z - u) @ solver
        if step < 15:
            now = ratio * (1 - (1 - (step + 1) / 15) ** 3)
            keep = smallest((v + u).abs(), now, nm)
        z = (v + u) * keep
        u = u + v - z
    return z / scale


def alps(weight: torch.Tensor, gram: torch.Tensor, ratio: float, nm: Any) -> torch.Tensor:
    """Operator splitting with a penalty led by the support's changes, then conjugate gradients (Meng et al. 2024)."""
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    scale = gram.diagonal().sqrt()
    goal, gram = weight * scale, gram / scale[:, None] / scale
    values, vectors = torch.linalg.eigh(gram)
    fixed, penalty, kept = goal @ gram, 0.1, round(weight.numel() * (1 - ratio))
    d, v, before = goal, torch.zeros_like(goal), torch.ones_like(goal, dtype=torch.bool)
    for step in range(300):
        w = (fixed - v + penalty * d) @ (vectors / (values + penalty)) @ vectors.T
        keep = smallest((w + v / penalty).abs(), ratio, nm)
        d = (w + v / penalty) * keep
        v = v + penalty * (w - d)
        if step % 3 == 2:
            changed = int((keep != before).sum())
            if not changed:
                break
            penalty *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            before = keep
    refit(goal, d, keep, gram, 10)
    return d / scale


PEERS: dict[str, Peer] = {"admm": admm, "alps": alps}


def as_solver(peer: Peer) -> Callable[[Any], Any]:
    """A peer in the place of one of our solvers, so that everything around it is the same."""

    def run(p: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        new = peer(p.weight, p.gram, p.ratios[-1], p.nm)
        return new, new != 0, {}

    return run


class Texts:
    """One seed's texts, tokenised.

    Args:
        seed: which modules are for testing and which texts are drawn.
        batches: how many batches of 16 to calibrate with.
        held_out: texts to judge by.
    """

    def __init__(self, seed: int, batches: int, held_out: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_folder())
        rng = random.Random(seed)
        found = docstrings()
        modules = sorted({module for module, _, _ in found})
        away = set(rng.sample(modules, len(modules) // 2))
        near, far = ([f"{s} {b}" for m, s, b in found if (m in away) is side] for side in (False, True))
        drawn = rng.sample(sorted(set(near)), 16 * batches)
        self.calibration = [self._encode(drawn[i : i + 16]) for i in range(0, len(drawn), 16)]
        self._test = self._encode(rng.sample(sorted(set(far) - set(near)), held_out))
        self._dense = self._embed(fresh())

    def _encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64))

    def _embed(self, model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            states = model(**self._test).last_hidden_state
        weight = self._test["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)

    def cosine(self, model: torch.nn.Module) -> float:
        """Mean cosine of a model's embeddings to the dense model's."""
        return float((self._embed(model) * self._dense).sum(1).mean())


def fresh() -> torch.nn.Module:
    """The pretrained model."""
    return BertModel.from_pretrained(model_folder(), add_pooling_layer=False).eval()


def measure(method: str, text: str, texts: Texts) -> tuple[float, float]:
    """Cosine and CPU seconds of one method at one ratio or n:m pattern."""
    pattern = text if ":" in text else None
    # "plain": without the residual stream's correction; "free": with measured ratios; "v2": begun by par_v2; "swaps":
    # with up to a thousand exchanges a row
    base, _, how = method.partition("-")
    config = SparseConfig(
        method="hessian" if method in PEERS else base,
        sparse_ratio=0.5 if pattern else float(text),
        pattern=pattern,
        residual=base in ("par", "par_v2") and how != "plain",
        uniform=how != "free" or pattern is not None,
        swaps=1_000 if how == "swaps" else 0,
        options={"start": "par_v2"} if how == "v2" else None,
    )
    rows = {"hessian": replace(METHODS["hessian"], solver=as_solver(PEERS[method]))} if method in PEERS else {}
    model, start = fresh(), time.process_time()
    with mock.patch.dict(METHODS, rows):
        Compressor(model, config).compress(texts.calibration)
    return texts.cosine(model), time.process_time() - start


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*PEERS, *OURS)
    parser.add_argument("--methods", nargs="*", default=["hessian", "admm", "alps", "par", "par_v2"], choices=names)
    parser.add_argument("--ratios", nargs="*", default=["0.5", "0.6", "0.7", "2:4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=5, help="calibration batches of 16 texts")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()  # the pooler that is not used
    logging.disable_progress_bar()
    seeds = [Texts(s, given.batches, given.held_out) for s in range(given.first_seed, given.first_seed + given.seeds)]
    print(f"| method | {' | '.join(given.ratios)} | CPU s |\n|---{'|---' * len(given.ratios)}|---|")
    best: dict[str, list[float]] = {}
    for method in given.methods:
        cells, seconds = [], 0.0
        for text in given.ratios:
            found = [measure(method, text, texts) for texts in seeds]
            cosines = [c for c, _ in found]
            seconds += sum(s for _, s in found) / len(found) / len(given.ratios)
            cell = f"{sum(cosines) / len(cosines):.4f}"
            if method in PEERS or method == "hessian":
                best[text] = [max(pair) for pair in zip(cosines, best.get(text, cosines), strict=True)]
            else:
                gains = [c - b for c, b in zip(cosines, best.get(text, []), strict=False)]
                cell += f" ({min(gains):+.4f})" if gains else ""
            cells.append(cell)
        print(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
