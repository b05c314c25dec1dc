"""A sparse block's kept weights, trained until its outputs come back to those of the dense block.

With f the block on what the sparse model gives it, y (samples, tokens, width) what the dense block gives on what the
dense model gives it, and t over tokens that are no padding:

    minimise  sum_t |f(x)_t - y_t|^2 / (|y_t|^2 + FLOOR mean |y|^2)   over kept weights, biases and norm scales

by Adam (Kingma & Ba 2015, algorithm 1), an update a batch. The error is relative token by token, because the norm
before the next block makes it so; a few tokens with huge activations would be all of it otherwise. The rate rises over
the first WARM of the updates and falls to nothing along a half cosine (Loshchilov & Hutter 2017, section 3). While it
trains, y is z + inherited (y - z), z what the dense block makes of x: little of what the blocks before have lost can
be foretold from x, and with all of it in y the training rows gain and others lose. What judges is y itself. One of
HOLD_OUT samples is kept apart to judge by: a pass that makes it worse is taken back, and the next goes on from the
best values at a FALL of the rate. With few calibration rows a block learns their noise within a pass or two: only what
helps other rows stays.

Of several processes that share one data set each has every n-th batch. An update still takes one batch: the process
that has it makes the gradient and gives it to all, and all make the same update, so that the values are those of one
process to the last bit; what judges is spread. Processes with data of their own update together, on a batch of each.
Sources: reconstruction of blocks after pruning, Guo et al. 2024 (EBFT); this loss is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any

from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import Array, device_of, library, namespace
from slimkit.core.sparse.processes import in_order
from slimkit.core.sparse.trained import TrainedBlock

Part = tuple[Array, float]  # what the errors of a batch's tokens count, and how many tokens that are

# One of so many samples judges and does not train; with fewer than LEAST all do both.
HOLD_OUT = 8
LEAST = 4

# A token's power counts as this share of the mean power at least: an output of zero has no relative error.
FLOOR = 0.01

# Adam's own figures.
MOMENTUM, SMOOTH, TINY = 0.9, 0.99, 1e-10

# Over this share of the updates the rate rises: Adam's first steps rest on few gradients.
WARM = 0.1

# What a pass that did not help makes of the rate.
FALL = 0.25

# An update is a share of a parameter's own root mean square, taken for at least this much: a bias may begin at zero.
LEAST_SCALE = 0.01


def reconstruct(host: SparseFramework, block: TrainedBlock, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train a block in place.

    Args:
        host: the model, for what its processes add up.
        block: the block.
        options: "passes" over the batches, at most; "rate", the largest update as a share of a parameter's root mean
            square; "patience", passes in a row without a gain that end it.

    Returns:
        Facts for the report: "block_error" and "block_error_before", the relative error on the samples that judge, and
        "passes", after how many it was best.
    """
    sizes = list(block.sizes())
    judges, learners = _split(host, block, sizes)
    values, free = block.start(), block.free()
    turns = _turns(host, len(sizes), learners)
    n_batches = len(turns)
    optimizer = _Adam(values, free, float(options["rate"]))
    best = before = _judged(host, block, values, judges, len(sizes))
    kept, found, failed = {name: _copy(value) for name, value in values.items()}, 0, 0
    passes = int(options["passes"])
    for done in range(1, passes + 1):
        for index, (batch, n, owner) in enumerate(turns):
            slopes = _slopes(host, block, values, None if batch is None else (batch, learners[batch][0]), n, owner)
            optimizer.update(slopes, share_of_rate((done - 1) * n_batches + index, passes * n_batches))
        error = _judged(host, block, values, judges, len(sizes))
        failed = 0 if error < best else failed + 1
        if error < best:
            best, found = error, done
        elif failed >= int(options["patience"]):
            break
        for name, value in values.items():
            if failed:
                value[...] = kept[name]
            else:
                kept[name][...] = value
        if failed:
            optimizer.fall()
    block.keep(kept)
    return {"block_error": best**0.5, "block_error_before": before**0.5, "passes": found}


def share_of_rate(update: int, updates: int) -> float:
    """How much of the rate an update takes: rising over the first WARM of them, then falling along a half cosine.

    Args:
        update: its number, from 0.
        updates: how many there are.

    Example:
        >>> [round(share_of_rate(i, 40), 2) for i in (0, 1, 3, 20, 39)]
        [0.25, 0.5, 0.99, 0.5, 0.0]
    """
    return min(1.0, (update + 1) / max(1.0, WARM * updates)) * (1 + cos(pi * update / updates)) / 2


def _split(host: SparseFramework, block: TrainedBlock, own: Sequence[int]) -> tuple[dict[int, Part], dict[int, Part]]:
    """This process's batches by number, as far as they judge and as far as they train."""
    n, rank = (host.processes(), host.rank()) if host.deals else (1, 0)
    sizes = in_order(host, own) if host.deals else list(own)  # of all batches that the samples are counted over
    total = sum(sizes)
    apart = {s for s in range(total) if s % HOLD_OUT == HOLD_OUT - 1} or ({total - 1} if total >= LEAST else set())
    judges: dict[int, Part] = {}
    learners: dict[int, Part] = {}
    for index, size in enumerate(own):
        first = sum(sizes[: index * n + rank])
        weights, counts = token_weights(*block.target(index))
        xp = namespace(weights)
        here = [float(first + i in apart) for i in range(size)]
        mark = xp.asarray(here, dtype=weights.dtype, device=device_of(weights))
        mark = mark.reshape(-1, *[1] * (weights.ndim - 1))  # (samples, 1, ..)
        for part, mine in ((judges, mark if apart else mark + 1), (learners, 1 - mark)):
            tokens = float(xp.sum(counts * mine))
            if tokens:
                part[index] = weights * mine, tokens
    return judges, learners


def _turns(
    host: SparseFramework, n_batches: int, learners: Mapping[int, Part]
) -> list[tuple[int | None, float, int | None]]:
    """For each update of a pass: the batch that this process has for it, if any; over how many tokens the update is;
    which process has its batch, where one alone has."""
    if host.deals:
        n, rank = host.processes(), host.rank()
        tokens = in_order(host, [learners[i][1] if i in learners else 0.0 for i in range(n_batches)])
        return [(i // n if i % n == rank else None, float(t), i % n) for i, t in enumerate(tokens) if t]
    every = host.gather([n for _, n in learners.values()])
    longest = max(map(len, every))
    own: list[int | None] = [*learners, *[None] * (longest - len(learners))]
    return [(index, float(sum(found[i] for found in every if i < len(found))), None) for i, index in enumerate(own)]


def token_weights(target: Array, valid: Array | None) -> tuple[Array, Array]:
    """What each token's squared error counts, and which tokens count, both to be spread over the target.

    Args:
        target: (samples, tokens, width), or samples first and what is one output behind.
        valid: (samples, tokens) True for tokens that are no padding, or None.

    Example:
        >>> import numpy as np
        >>> weights, counts = token_weights(np.array([[[3.0, 4.0], [6.0, 8.0]]]), np.array([[True, False]]))
        >>> weights.shape, round(float(weights[0, 0, 0]), 4), counts.ravel().tolist()
        ((1, 2, 1), 0.0396, [1.0, 0.0])
    """
    xp = namespace(target)
    axes = (-1,) if target.ndim == 3 else tuple(range(1, target.ndim))
    power = xp.sum(target * target, axis=axes, keepdims=True)
    counts = xp.ones_like(power)
    if valid is not None and valid.shape == power.shape[:-1] and target.ndim == 3:
        counts = counts * xp.astype(valid, power.dtype)[..., None]
    mean = xp.sum(power * counts) / xp.clip(xp.sum(counts), 1.0, None)
    return counts / (power + FLOOR * mean + TINY), counts


def _judged(
    host: SparseFramework, block: TrainedBlock, values: Mapping[str, Array], judges: Mapping[int, Part], n_batches: int
) -> float:
    """The mean loss of a token, over all processes."""
    own = [[0.0, 0.0] for _ in range(n_batches)]
    for index, (weights, n) in judges.items():
        own[index] = [block.loss(values, index, weights), n]
    every = in_order(host, own)  # batch by batch, so that no process's share of them decides
    return float(sum(loss for loss, _ in every) / max(1, sum(n for _, n in every)))


def _slopes(
    host: SparseFramework,
    block: TrainedBlock,
    values: Mapping[str, Array],
    batch: tuple[int, Array] | None,
    n: float,
    owner: int | None,
) -> dict[str, Array]:
    """The gradient of a token's mean loss over n tokens: those of the owner's batch, or of all that have one."""
    if batch is None:
        slopes = {name: namespace(v).zeros_like(v) for name, v in values.items()}
    else:
        slopes = block.slope(values, *batch)[1]
    totals = [slopes[name] for name in values]
    if host.processes() > 1:
        totals = host.reduce(totals) if owner is None else [host.spread(total, owner) for total in totals]
    for total in totals:
        total /= n
    return dict(zip(values, totals))


class _Adam:
    """Adam over arrays, in place; entries that may not change stay."""

    def __init__(self, values: dict[str, Array], free: Mapping[str, Array], rate: float) -> None:
        self._values, self._free, self._rate, self._done = values, free, rate, 0
        self._scale: dict[str, float] = {}
        self._mean: dict[str, Array] = {}
        self._square: dict[str, Array] = {}
        for name, value in values.items():
            xp = namespace(value)
            n = max(1.0, float(xp.sum(free[name])))
            self._scale[name] = max(LEAST_SCALE, float(xp.sum(value * value * free[name]) / n) ** 0.5)
            self._mean[name], self._square[name] = xp.zeros_like(value), xp.zeros_like(value)

    def fall(self) -> None:
        """Go on with smaller steps, and nothing of what led astray."""
        self._rate, self._done = self._rate * FALL, 0
        for sums in (self._mean, self._square):
            for value in sums.values():
                value[...] = 0

    def update(self, slopes: Mapping[str, Array], share: float) -> None:
        """One update with a share of the rate, in the gradients' own memory."""
        self._done += 1
        rate = self._rate * share / (1 - MOMENTUM**self._done)
        for name, value in self._values.items():
            slope, mean, square, lib = slopes[name], self._mean[name], self._square[name], library(value)
            slope *= self._free[name]
            mean *= MOMENTUM / (1 - MOMENTUM)
            mean += slope
            mean *= 1 - MOMENTUM  # MOMENTUM mean + (1 - MOMENTUM) slope
            slope *= slope
            square *= SMOOTH / (1 - SMOOTH)
            square += slope
            square *= 1 - SMOOTH
            lib.sqrt(square, out=slope)
            slope *= (1 - SMOOTH**self._done) ** -0.5
            slope += TINY
            lib.divide(mean, slope, out=slope)
            slope *= rate * self._scale[name]
            value -= slope


def _copy(value: Array) -> Array:
    return namespace(value).asarray(value, copy=True)
