"""Sparsity measured: output error and time of every method against a plain SparseGPT loop, in one run.

    OMP_WAIT_POLICY=PASSIVE python tools/bench/sparse.py --widths 1024 2048
    python tools/bench/sparse.py --speed --widths 1024  times in turn: plain loop, hessian, par and the lower bound
    python tools/bench/sparse.py --memory               memory of sparsify_checkpoint on a Llama of eight blocks
    python tools/bench/sparse.py --allocation           equal, OWL's, DLP's and measured ratios on MiniLM, on other text

What is left of the pretrained MiniLM's sentence embeddings is measured by tools/bench/sparse_text.py.

The problem: one N x N layer, 4096 calibration and 4096 held-out rows X = (Z A + 0.5 noise) * scale with Z of rank N/4,
log-normal channel scales (sigma 0.9) and 0.5 % of the channels 20 times larger. Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.solve import solve

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
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).to(w.dtype)
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
    print("| N, pattern | plain SparseGPT |", " | ".join(METHODS), "| error / plain: hessian, par, par_v2 |")
    print("|---" * (len(METHODS) + 3) + "|")
    for n, (ratio, pattern) in itertools.product(widths, [(0.5, None), (0.7, None), (0.5, "2:4")]):
        weight, rows, held = problem(n)
        layer = SparseLayer("layer", "linear", (n, n))
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
        shown = ", ".join(f"{r:.3f}" for r in ratios[2:])
        print(f"| {n}, {pattern or ratio} |", " | ".join(cells), f"| {shown} |", flush=True)


def speed(widths: list[int], repeats: int) -> None:
    """Medians of calls in turn, so that a busy machine is as busy for each; the bound is what the algorithm needs.

    That is one Cholesky and one triangular inverse for the factor of the inverse Hessian, and products of rows x n x n
    / 2 for the updates: one product of half the rows. The published steps are two Cholesky, an inverse from the first,
    and the same product. The library's own calls, each timed in the same turns.
    """
    print(
        "| N, pattern | seconds: wall, CPU | plain / hessian |"
        + " hessian / bound | hessian / published steps | par / hessian |\n|---|---|---|---|---|---|"
    )
    for n, pattern in itertools.product(widths, (None, "2:4")):
        weight, rows, _ = problem(n)
        layer = SparseLayer("layer", "linear", (n, n))
        moments = Moments(layer)
        moments.add(rows)
        gram = moments.gram[0] / moments.count
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(n)
        factor, eye, half = torch.linalg.cholesky(damped), torch.eye(n), weight[: n // 2].contiguous()
        configs = {m: SparseConfig(method=m, pattern=pattern) for m in ("hessian", "par")}
        calls = {
            "plain": lambda: plain(weight, gram, 0.5, configs["par"].nm),  # noqa: B023
            **{m: lambda c=c: solve(layer, weight, moments, 0.5, c) for m, c in configs.items()},  # noqa: B023
            "Cholesky": lambda: torch.linalg.cholesky(damped),  # noqa: B023
            "inverse": lambda: torch.linalg.solve_triangular(factor, eye, upper=False),  # noqa: B023
            "whole inverse": lambda: torch.cholesky_inverse(factor),  # noqa: B023
            "half product": lambda: half @ gram,  # noqa: B023
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for turn in range(repeats + 1):
            for name, call in calls.items():
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                if turn:  # the first is for warming up
                    taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        medians = {name: [statistics.median(t) for t in zip(*values)] for name, values in taken.items()}
        told = ", ".join(f"{name} {wall:.3f} {cpu:.3f}" for name, (wall, cpu) in medians.items())

        def ratio(*names: str) -> str:
            return " ".join(
                f"{medians[names[0]][i] / sum(medians[m][i] for m in names[1:]):.2f}"  # noqa: B023
                for i in range(2)
            )

        cells = [
            ratio("plain", "hessian"),
            ratio("hessian", "Cholesky", "inverse", "half product"),
            ratio("hessian", "Cholesky", "whole inverse", "Cholesky", "half product"),
            ratio("par", "hessian"),
        ]
        print(f"| {n}, {pattern or 0.5} | {told} |", " | ".join(cells), "|", flush=True)


def memory(method: str) -> None:
    """Peak resident memory of sparsify_checkpoint above what the process held before, on a Llama of eight blocks."""
    from slimkit.sparse import sparsify_checkpoint

    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = 1024, 2816
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 8, "num_attention_heads": 16}
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 1000, (2, 256), generator=g)} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that the model never was in this one's memory.
        code = (
            "import sys, torch, transformers as t; torch.manual_seed(0); "
            f"t.LlamaForCausalLM(t.LlamaConfig(vocab_size=1000, **{shape!r})).save_pretrained(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", code, f"{folder}/model"], check=True)
        LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_attention_heads=1))
        solve_once(method)
        base, peak, over = resident(), [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                peak[0] = max(peak[0], resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        sparsify_checkpoint(f"{folder}/model", f"{folder}/out", SparseConfig(method=method), data)
        over.set()
        watcher.join()
    block, hessian = 4e-6 * (4 * hidden**2 + 3 * hidden * inner), 4e-6 * inner**2
    above, bound = peak[0] - base, 2.5 * (block + hessian)
    print(f"{method}: base {base:.0f} MB, peak {peak[0]:.0f} MB, {above:.0f} MB above; block {block:.0f} MB, largest")
    print(
        f"Hessian {hessian:.0f} MB: {above / (block + hessian):.2f} times their sum (bound {bound:.0f} MB, 2.5 times)"
    )


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def solve_once(method: str) -> None:
    """Load what a solver loads when it first runs."""
    layer = SparseLayer("layer", "linear", (300, 300))
    moments = Moments(layer)
    moments.add(torch.randn(600, 300))
    solve(layer, torch.randn(300, 300), moments, 0.5, SparseConfig(method=method))


def by_outliers(model: torch.nn.Module, batches: Any, ratio: float, reach: float = 0.08, above: float = 5) -> Any:
    """Ratios by block as OWL chooses them (Yin et al. 2024, section 3.2): blocks with many outliers keep more.

    An outlier is a weight times its input's norm that is more than `above` times the block's mean.
    """
    return by_scores(model, batches, ratio, reach, lambda s: float((s > above * s.mean()).float().mean()))


def by_medians(model: torch.nn.Module, batches: Any, ratio: float, reach: float = 0.15) -> Any:
    """Ratios by block as DLP chooses them (Chen et al. 2025): blocks whose median score is large keep less."""
    return by_scores(model, batches, ratio, reach, lambda s: -float(s.median()))


def by_scores(
    model: torch.nn.Module, batches: Any, ratio: float, reach: float, worth: Callable[[torch.Tensor], float]
) -> Any:
    """Ratios by block: the worth of its weights times input norms, spread over `reach` on both sides of the ratio."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    squares = dict.fromkeys(layers, 0.0)

    def seen(name: str) -> Any:
        def hook(_module: Any, args: Any) -> None:
            squares[name] = squares[name] + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        return hook

    hooks = [m.register_forward_pre_hook(seen(n)) for n, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in hooks:
        handle.remove()
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, layer in layers.items():
        scores = (layer.weight.detach().abs() * squares[name].sqrt()).reshape(-1)
        blocks.setdefault(name.split("layer.")[1].split(".")[0], []).append(scores)
    together = {block: torch.cat(parts) for block, parts in blocks.items()}
    found = {block: worth(s) for block, s in together.items()}
    low, high = min(found.values()), max(found.values())
    moved = {block: (share - low) / (high - low) * 2 * reach for block, share in found.items()}
    middle = statistics.mean(moved.values())
    return {n: ratio - moved[n.split("layer.")[1].split(".")[0]] + middle for n in layers}


CHEAP = {"owl": by_outliers, "dlp": by_medians}


def allocation(methods: list[str], ratios: list[float]) -> None:
    """Cosine of MiniLM's embeddings with equal ratios, OWL's, DLP's and measured ones; which of these was kept."""
    from sparse_text import Texts, fresh

    from slimkit.sparse import Compressor

    texts = Texts(seed=0, batches=5, held_out=256)
    print("| method, ratio | equal | OWL | DLP | uniform=False | kept |\n|---|---|---|---|---|---|")
    for method, ratio in itertools.product(methods, ratios):
        cells = []
        for how in ("equal", "owl", "dlp", "measured"):
            model = fresh()
            config = SparseConfig(method=method, sparse_ratio=ratio, uniform=how == "equal")
            with contextlib.ExitStack() as stack:
                if how in CHEAP:
                    chosen = CHEAP[how](model, texts.calibration, ratio)
                    given = lambda *_, chosen=chosen, how=how: (chosen, {"kept": how})
                    stack.enter_context(mock.patch("slimkit.core.sparse.compress.measured", given))
                report = Compressor(model, config).compress(texts.calibration)
            cells.append(f"{texts.cosine(model):.4f}")
        print(f"| {method}, {ratio} |", " | ".join(cells), f"| {report['allocation']['kept']} |", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[1024])
    for mode in ("--speed", "--memory", "--allocation"):
        parser.add_argument(mode, action="store_true")
    parser.add_argument("--methods", nargs="*", default=["hessian", "par"], help="for --memory, --allocation")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.7], help="for --allocation")
    parser.add_argument("--repeats", type=int, default=7, help="for --speed")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.speed:
        speed(given.widths, given.repeats)
    elif given.memory:
        for method in given.methods:
            memory(method)
    elif given.allocation:
        allocation(given.methods, given.ratios)
    else:
        one_layer(given.widths)


if __name__ == "__main__":
    main()
