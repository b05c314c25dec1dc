"""Sparsity measured: output error and time of every method against a plain SparseGPT loop, in one run.

    OMP_WAIT_POLICY=PASSIVE python tools/bench/sparse.py --widths 1024 2048

What is left of the pretrained MiniLM's sentence embeddings is measured by tools/bench/sparse_text.py.

The problem: one N x N layer, 4096 calibration and 4096 held-out rows X = (Z A + 0.5 noise) * scale with Z of rank N/4,
log-normal channel scales (sigma 0.9) and 0.5 % of the channels 20 times larger. Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.layer import Layer
from slimkit.core.sparse.moments import Moments
from slimkit.core.sparse.solve import solve

import torch

METHODS = ("magnitude", "wanda", "hessian", "par", "par_v2")


def problem(n: int, rows: int = 4096, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, calibration rows and held-out rows."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n // 4, n, generator=g) / (n // 4) ** 0.5
    scale = torch.exp(0.9 * torch.randn(n, generator=g))
    scale[torch.randperm(n, generator=g)[: n // 200]] *= 20

    def draw() -> torch.Tensor:
        return (torch.randn(rows, n // 4, generator=g) @ mix + 0.5 * torch.randn(rows, n, generator=g)) * scale

    return torch.randn(n, n, generator=g) / n**0.5, draw(), draw()


def plain(weight: torch.Tensor, gram: torch.Tensor, ratio: float, nm: Any, block: int = 128) -> torch.Tensor:
    """The published algorithm, column after column, as a reference for error and time."""
    w, n = weight.clone(), weight.shape[1]
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(n)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, n, block):
        stop = min(start + block, n)
        part, own = w[:, start:stop].clone(), factor[start:stop, start:stop]
        errors, out = torch.zeros_like(part), torch.zeros_like(part)
        score = (part / own.diagonal()) ** 2
        drop = score <= score.flatten().kthvalue(int(score.numel() * ratio)).values
        for j in range(stop - start):
            if nm is not None and j % nm.group == 0:
                score = (part[:, j : j + nm.group] / own.diagonal()[j : j + nm.group]) ** 2
                drop[:, j : j + nm.group] = False
                drop[:, j : j + nm.group].scatter_(1, score.topk(nm.group - nm.keep, largest=False).indices, True)
            kept = torch.where(drop[:, j], 0.0, part[:, j])
            error = (part[:, j] - kept) / own[j, j]
            out[:, j] = kept
            part[:, j:] -= error[:, None] * own[j, j:]
            errors[:, j] = error
        w[:, start:stop] = out
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w


def timed(call: Any) -> tuple[Any, float]:
    """The result, and the CPU seconds it took."""
    start = time.process_time()
    return call(), time.process_time() - start


def one_layer(widths: list[int]) -> None:
    """Held-out relative error and CPU seconds, as a table."""
    print("| N, pattern | plain SparseGPT |", " | ".join(METHODS), "| error / plain: hessian, par, par_v2 | bound s |")
    print("|---" * (len(METHODS) + 4) + "|")
    for n, (ratio, pattern) in itertools.product(widths, [(0.5, None), (0.7, None), (0.5, "2:4")]):
        weight, rows, held = problem(n)
        layer = Layer("layer", "linear", (n, n))
        moments = Moments(layer)
        moments.add(rows)
        held_gram = held.T @ held / len(held)

        def error(new: torch.Tensor) -> float:
            change = weight - new  # noqa: B023
            top, bottom = ((d @ held_gram * d).sum() for d in (change, weight))  # noqa: B023
            return float(top / bottom) ** 0.5

        nm = SparseConfig(pattern=pattern).nm
        gram = moments.gram[0] / moments.count
        reference, seconds = timed(lambda: plain(weight, gram, ratio, nm))  # noqa: B023
        base = error(reference)
        cells = [f"{base:.4f} ({seconds:.2f} s)"]
        ratios = []
        for method in METHODS:
            config = SparseConfig(method=method, sparse_ratio=ratio, pattern=pattern)
            solved, spent = timed(lambda: solve(layer, weight, moments, ratio, config))  # noqa: B023
            cells.append(f"{error(solved.weight):.4f} ({spent:.2f} s)")
            ratios.append(error(solved.weight) / base)
        gram += torch.eye(n)
        factor, a = timed(lambda: torch.linalg.cholesky(gram))  # noqa: B023
        inverse, b = timed(lambda: torch.linalg.solve_triangular(factor, torch.eye(n), upper=False))  # noqa: B023
        _, c = timed(lambda: weight @ inverse)  # noqa: B023  # the trailing products come to half of one of these
        shown = ", ".join(f"{r:.3f}" for r in ratios[2:])
        print(f"| {n}, {pattern or ratio} |", " | ".join(cells), f"| {shown} | {a + b + c / 2:.2f} |", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[1024])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    one_layer(given.widths)


if __name__ == "__main__":
    main()
