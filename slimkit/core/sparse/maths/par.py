"""par: alternating support search (ADMM) and refit, on the sweep's objective with well-estimated moments.

With columns scaled to unit variance, T (out, n) the target and C (n, n) their correlations, shrunk (`shrink`):

    minimise tr((T - V) C (T - V)^T)  subject to  V = Z, Z sparse

Two copies and what holds them together, U, take turns; p is the penalty (Boyd et al. 2011, sections 3.4.3 and 9):

    V = T + p (Z - U - T) (C + p)^-1        (out, n)  fits the outputs
    M = U + relax V + (1 - relax) Z         (out, n)
    Z = M where kept, U = M elsewhere       keep: the largest |M|, fewer in each round until the ratio is reached

Last, what stays is refitted on its support by conjugate gradients, row by row (Hestenes & Stiefel 1952). Sources:
ADMM for pruning, Boza 2024; the rising ratio, Zhu & Gupta 2017. The name is another tool's; this definition is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths.backend import (
    Array,
    add_product,
    device_of,
    erase,
    library,
    namespace,
    own_copy,
    product_into,
    row_products,
)
from slimkit.core.sparse.maths.correlations import Correlations, Mixed, Spectral
from slimkit.core.sparse.maths.pattern import NM


@dataclass(frozen=True)
class Schedule:
    """How long and how finely to search.

    Args:
        rounds: steps of the support search; the ratio is reached after half of them.
        relax: how far a step goes, 1..2; 1 goes to where the two copies' distance is least.
        first, last: the penalty that ties the two copies of the weights; it grows from one to the other.
        hold: rounds for which a penalty is kept: each new one costs a product of two matrices.
        refits: conjugate gradient steps on the final support.
        swaps: rounds of exchanging kept and dropped weights after it.
        spectral: shrink every eigenvalue by itself, not all by one share.
    """

    rounds: int
    relax: float
    first: float
    last: float
    hold: int
    refits: int
    swaps: int
    spectral: bool


PAR = Schedule(rounds=5, relax=1.5, first=0.6, last=0.6, hold=5, refits=3, swaps=0, spectral=False)
PAR_V2 = Schedule(rounds=30, relax=1.0, first=0.1, last=1.0, hold=3, refits=12, swaps=2, spectral=True)

# Never divide by less: rows that are fitted already have a gradient of zero.
TINY = 1e-30


def refine(
    target: Array,
    gram: Array,
    ratios: list[float],
    nm: NM | None,
    dead: Array | None,
    count: int,
    schedule: Schedule,
) -> tuple[Array, Array, dict[str, Any]]:
    """Find a sparse matrix whose outputs come close to the target's.

    Columns are scaled to unit variance, and the correlations shrunk towards what more rows would show: with about as
    many rows as columns the sample's small directions are mostly noise, and a refit would fit it. Then two copies of
    the weights are pulled together, one fitting the outputs, one sparse (Boyd et al. 2011, section 9; Boza 2024),
    while the ratio rises; last, what stays is refitted by conjugate gradients on its support.

    Args:
        target: (out, n) float32; its memory is used up.
        gram: (n, n) mean of x x^T, no zero on its diagonal; its memory is used up.
        ratios: shares to drop, one after the other; the last is the one asked for.
        nm: the n:m pattern, or None.
        dead: (n,) columns whose input is always zero: they go first.
        count: rows behind the gram.
        schedule: how long to search.

    Returns:
        The new weight, its mask, and facts for the report: the shrinkage, and under the gram as it was the mean squared
        outputs of the target ("power") and of the change ("loss").
    """
    xp = namespace(target)
    scale = xp.sqrt(xp.linalg.diagonal(gram))  # (n,)
    gram /= scale[:, None]  # (n, n) / (n, 1)
    gram /= scale  # (n, n): correlations
    known: Correlations = (Spectral if schedule.spectral else Mixed)(gram, count)
    del gram
    target *= scale  # (out, n) * (n,)
    goal = target
    facts = {"shrinkage": round(known.share, 6), "power": known.sample_loss(goal)}
    allowed = None if dead is None else ~dead[None, :] & xp.ones(target.shape, dtype=xp.bool, device=device_of(target))
    for ratio in ratios:
        sparse, keep = _search(goal, known, ratio, nm, allowed, schedule)
        allowed = keep
    correlation = known.matrix()  # (n, n)
    losses = refit(goal, sparse, keep, correlation, schedule.refits)
    if schedule.swaps:
        losses = _swap(goal, sparse, keep, losses, correlation, nm, dead, schedule)
    goal -= sparse
    facts["loss"] = known.sample_loss(goal, float(xp.sum(losses)))
    sparse /= scale  # (out, n) / (n,): columns as they were
    erase(sparse, keep)
    return sparse, keep, facts


def _search(
    goal: Array, known: Correlations, ratio: float, nm: NM | None, allowed: Array | None, s: Schedule
) -> tuple[Array, Array]:
    """Support search: V fits the outputs, Z is sparse, U remembers where they disagree.

    Z and U never share an entry, so one matrix, M = Z + U, holds both: on the mask it is Z, off it U. The step
    V = (goal C + p (Z - U)) (C + p)^-1 is goal + p (Z - U - goal) (C + p)^-1, which is the goal itself at first.
    """
    xp, lib = namespace(goal), library(goal)
    m, keep, solver = own_copy(goal), allowed, None
    steps = -(-s.rounds // s.hold)
    growth = (s.last / s.first) ** (1 / max(1, steps - 1))
    penalty = s.first
    kept, apart = xp.empty_like(goal), xp.empty_like(goal)  # (out, n), as m: room for Z and for Z - U - T
    for k in range(s.rounds):
        if k:
            kept[...] = keep
            kept *= m  # (out, n): Z
            if k % s.hold == 0:
                penalty, solver = penalty * growth, None
                m -= kept
                m /= growth  # U belongs to the penalty
                m += kept
            if solver is None:
                solver = known.inverse(penalty)  # (n, n): (C + p)^-1
            lib.multiply(kept, 2, out=apart)
            apart -= m
            apart -= goal  # (out, n): Z - U - T, since U = M - Z
            # M = U + relax V + (1 - relax) Z = M - relax (Z - T) + relax p (Z - U - T) (C + p)^-1
            kept -= goal
            kept *= s.relax
            m -= kept
            add_product(m, apart, solver, factor=s.relax * penalty)  # (out, n) += (out, n) @ (n, n)
        rising = ratio * (1 - max(0.0, 1 - 2 * (k + 1) / s.rounds) ** 3)  # cubic, as Zhu & Gupta 2017
        scores = patterns.comparable(lib.abs(m, out=apart))
        if allowed is not None:
            scores = xp.where(allowed, scores, -1.0)
        keep = (
            patterns.keep_nm(scores, nm)
            if nm
            else patterns.keep_all_but(scores, round(rising * goal.shape[0] * goal.shape[1]))
        )
    return m, keep


def refit(goal: Array, fitted: Array, keep: Array, correlation: Array, steps: int) -> Array:
    """Fit each row on its own support by conjugate gradients; the unit diagonal is preconditioner enough.

    Args:
        goal: (out, n) what to come close to.
        fitted: (out, n) where to begin; becomes the fit, zero off the support.
        keep: (out, n) the support.
        correlation: (n, n) positive definite.
        steps: matrix products to spend, and one more to begin with.

    Returns:
        (out, 1) tr(D C D^T) of what is missing from the goal, D, row by row.
    """
    xp, lib = namespace(goal), library(goal)
    mask = xp.astype(keep, goal.dtype)
    fitted *= mask
    direction = goal - fitted  # (out, n)
    residual, image = direction @ correlation, xp.empty_like(direction)  # (out, n) @ (n, n)
    losses = row_products(direction, residual)  # (out, 1)
    residual *= mask
    direction[...] = residual
    power = row_products(residual, residual)  # (out, 1)
    for _ in range(steps):
        product_into(image, direction, correlation)  # (out, n) = (out, n) @ (n, n)
        image *= mask  # (out, n): the image on the support
        # (out, 1): how far each row goes
        length = power / xp.clip(row_products(direction, image), TINY, None)
        losses -= length * power
        image *= length
        residual -= image
        fitted += lib.multiply(direction, length, out=image)
        new = row_products(residual, residual)  # (out, 1)
        direction *= new / xp.clip(power, TINY, None)
        direction += residual
        power = new
    return losses


def _swap(
    goal: Array,
    sparse: Array,
    keep: Array,
    losses: Array,
    correlation: Array,
    nm: NM | None,
    dead: Array | None,
    s: Schedule,
) -> Array:
    """Exchange, in place, kept weights that are small for others whose gradient is large; returns the new losses.

    A row that gains nothing steps shorter.
    """
    xp = namespace(goal)
    n_zeros = xp.count_nonzero(~keep, axis=1)[:, None]  # (out, 1)
    length = xp.ones_like(goal[:, :1])
    for _ in range(s.swaps):
        fitted = (goal - sparse) @ correlation  # (out, n) @ (n, n): minus half the gradient
        fitted *= length  # (out, n) * (out, 1)
        fitted += sparse
        scores = patterns.comparable(xp.abs(fitted))
        if dead is not None:
            scores = xp.where(dead, -1.0, scores)
        tried = patterns.keep_nm(scores, nm) if nm else patterns.keep_by_row(scores, n_zeros)
        del scores
        fitted[...] = sparse
        new = refit(goal, fitted, tried, correlation, s.refits // 2)
        better = (new < losses)[:, 0]
        for old, found in ((sparse, fitted), (keep, tried), (losses, new)):
            old[better] = found[better]
        length[~better] /= 2
    return refit(goal, sparse, keep, correlation, s.refits // 2)
