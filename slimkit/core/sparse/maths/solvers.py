"""How each method makes one group of a layer sparse: from a problem to a weight and its mask.

All of them solve, more or less closely, one problem:

    minimise tr((T - S) G (T - S)^T)  over S with exactly `n_zeros` zeros (or n of every m)

where T (out, n) is what the layer should be, S (out, n) what it becomes, and G (n, n) the mean of x x^T over its
inputs x: the trace is the mean squared change of the outputs. Magnitude takes G for the identity, wanda for its
diagonal (both then only choose), hessian sweeps over the columns (`sweep`), par alternates (`par`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths.backend import Array, inner, library, namespace, own_copy
from slimkit.core.sparse.maths.factor import inverse_factor, quadratic
from slimkit.core.sparse.maths.par import PAR, PAR_V2, Schedule, refine
from slimkit.core.sparse.maths.pattern import NM
from slimkit.core.sparse.maths.sweep import sweep

# Up to this damping the sweep's own loss, less the damping's part, keeps enough digits.
PRECISE = 0.05

# What a solver gives: the weight (out, n), its mask (out, n), True where it stays, and facts for the layer's row of
# the report. Of these "loss" and "power" are tr(D G D^T) of the change D and of the target, where it knows them.
Solution = tuple[Array, Array, dict[str, Any]]


@dataclass(frozen=True)
class SparseProblem:
    """One group of a layer: make `target` sparse so that its outputs under `gram` change least.

    Args:
        weight: (out, n) the trained weight.
        target: (out, n) what to come close to; the weight itself unless the dense model's outputs are the aim, and
            in memory of its own, to be used up, then.
        gram: (n, n) mean of x x^T, with no zero on its diagonal (`dead`); None for a method that needs no data.
        spend: whether the gram's memory may be used up.
        dead: (n,) columns whose input is always zero, or None.
        ratios: shares to drop, one after the other; the last is the one asked for, a whole number of weights.
        nm: the n:m pattern, or None.
        count: rows behind the gram.
        damping: what is added to the gram's diagonal, as a share of its mean.
        block_size: columns that choose their mask together.
        options: the method's own options, as its row in the table of methods names them.

    Example:
        >>> import numpy as np
        >>> problem = SparseProblem(weight := np.array([[1.0, -3.0, 2.0, 0.5]]), weight)
        >>> magnitude(problem)[0]
        array([[ 0., -3.,  2.,  0.]])
    """

    weight: Array
    target: Array
    gram: Array = None
    spend: bool = False
    dead: Array | None = None
    ratios: list[float] = field(default_factory=lambda: [0.5])
    nm: NM | None = None
    count: int = 0
    damping: float = 0.01
    block_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_zeros(self) -> int:
        """How many entries become zero, where no pattern says so."""
        return round(self.ratios[-1] * self.weight.shape[0] * self.weight.shape[1])


def magnitude(p: SparseProblem) -> Solution:
    """Drop the smallest absolute weights of the matrix."""
    xp = namespace(p.weight)
    scores = xp.abs(p.weight)  # (out, n)
    keep = patterns.keep_nm(scores, p.nm) if p.nm else patterns.keep_all_but(scores, p.n_zeros)
    return xp.where(keep, p.weight, 0.0), keep, {}


def wanda(p: SparseProblem) -> Solution:
    """Drop the smallest |weight| times input norm, as many in each row (Sun et al. 2024, section 3)."""
    xp = namespace(p.weight)
    norm = xp.sqrt(xp.linalg.diagonal(p.gram))  # (n,)
    if p.dead is not None:
        norm = xp.where(p.dead, 0.0, norm)
    scores = xp.abs(p.weight) * norm  # (out, n)
    keep = patterns.keep_nm(scores, p.nm) if p.nm else patterns.keep_across_rows(patterns.comparable(scores), p.n_zeros)
    return xp.where(keep, p.weight, 0.0), keep, {}


def hessian(p: SparseProblem) -> Solution:
    """SparseGPT's sweep (Frantar & Alistarh 2023, algorithm 1)."""
    turned = own_copy(p.target.T)  # (n, out)
    facts: dict[str, Any] = {"power": quadratic(turned, p.gram)}
    upper, damping = inverse_factor(p.gram, p.damping)  # (n, n)
    facts["damping"] = damping
    for ratio in p.ratios:
        mask, loss = sweep(turned, upper, ratio, p.nm, p.block_size, dead=p.dead)  # (n, out)
    del upper
    weight = own_copy(turned.T)  # (out, n)
    if damping <= PRECISE and len(p.ratios) == 1:
        # The damped loss less what the damping added: the error for free.
        change = library(weight).subtract(p.target, weight, out=turned.reshape(weight.shape))  # (out, n)
        mean = float(namespace(weight).mean(namespace(weight).linalg.diagonal(p.gram)))
        facts["loss"] = loss - damping * mean * inner(change, change)
    return weight, own_copy(mask.T), facts


def par(p: SparseProblem) -> Solution:
    """Support search by ADMM on shrunk moments, then a refit of what stays."""
    return _refined(p, PAR)


def par_v2(p: SparseProblem) -> Solution:
    """A longer search than par, with swaps between dropped and kept weights."""
    return _refined(p, PAR_V2)


def start(p: SparseProblem) -> Solution:
    """What "block" trains: par, or par_v2 where the options say so."""
    return par_v2(p) if p.options.get("start") == "par_v2" else par(p)


def _refined(p: SparseProblem, schedule: Schedule) -> Solution:
    gram = p.gram if p.spend else own_copy(p.gram)
    target = own_copy(p.target) if p.target is p.weight else p.target
    return refine(target, gram, p.ratios, p.nm, p.dead, p.count, schedule)
