"""One layer: its weight and the moments of its inputs in, its sparse weight, bias and account out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths.backend import Array, all_finite, inner, library, namespace, own_copy, precision
from slimkit.core.sparse.maths.factor import inverse_factor, quadratic
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.par import PAR, PAR_V2, Schedule, refine
from slimkit.core.sparse.maths.pattern import NM
from slimkit.core.sparse.maths.residue import alive, means_of, regress
from slimkit.core.sparse.maths.sweep import sweep

# Up to this damping the sweep's own loss, less the damping's part, keeps enough digits.
PRECISE = 0.05


@dataclass(frozen=True)
class Solved:
    """What a layer becomes.

    Args:
        weight: in the shape of the layer's own weight, float32.
        keep: boolean, same shape; True where the weight stays.
        bias_shift: what to add to the bias, or None.
        account: the layer's row of the report.
    """

    weight: Array
    keep: Array
    bias_shift: Array | None
    account: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One group of a layer: make `target` sparse so that its outputs under `gram` change least.

    Args:
        weight: (out, n) the trained weight.
        target: (out, n) what to come close to; the weight itself unless the dense model's outputs are the aim, and
            in memory of its own, to be used up, then.
        gram: (n, n) mean of x x^T, with ones on the diagonal of dead columns.
        spend: whether the gram's memory may be used up.
        dead: (n,) columns whose input is always zero, or None.
        ratio: share to drop.
        nm: the n:m pattern, or None.
        config: the rest.
        count: rows behind the gram.
    """

    weight: Array
    target: Array
    gram: Array
    spend: bool
    dead: Array | None
    ratio: float
    nm: NM | None
    config: SparseConfig
    count: int


def magnitude(p: Problem) -> tuple[Array, Array, dict[str, Any]]:
    """Drop the smallest absolute weights of the matrix."""
    xp = namespace(p.weight)
    scores = xp.abs(p.weight)
    n_zeros = round(p.ratio * p.weight.shape[0] * p.weight.shape[1])
    keep = patterns.keep_nm(scores, p.nm) if p.nm else patterns.keep_all_but(scores, n_zeros)
    return xp.where(keep, p.weight, 0.0), keep, {}


def wanda(p: Problem) -> tuple[Array, Array, dict[str, Any]]:
    """Drop the smallest |weight| times input norm, as many in each row (Sun et al. 2024, section 3)."""
    xp = namespace(p.weight)
    norm = xp.sqrt(xp.linalg.diagonal(p.gram))
    if p.dead is not None:
        norm = xp.where(p.dead, 0.0, norm)
    scores = xp.abs(p.weight) * norm
    if p.nm:
        keep = patterns.keep_nm(scores, p.nm)
    else:
        keep = patterns.keep_across_rows(scores, round(p.ratio * p.weight.shape[0] * p.weight.shape[1]))
    return xp.where(keep, p.weight, 0.0), keep, {}


def hessian(p: Problem) -> tuple[Array, Array, dict[str, Any]]:
    """SparseGPT's sweep (Frantar & Alistarh 2023, algorithm 1)."""
    turned = own_copy(p.target.T)
    facts: dict[str, Any] = {"power": quadratic(turned, p.gram)}
    upper, damping = inverse_factor(p.gram, p.config.damping)
    facts["damping"] = damping
    for ratio in steps_to(p.ratio, p.config):
        mask, loss = sweep(turned, upper, ratio, p.nm, p.config.block_size, dead=p.dead)
    del upper
    weight = own_copy(turned.T)
    if damping <= PRECISE and not p.config.progressive:
        # The damped loss less what the damping added: the error for free.
        change = library(weight).subtract(p.target, weight, out=turned.reshape(weight.shape))
        mean = float(namespace(weight).mean(namespace(weight).linalg.diagonal(p.gram)))
        facts["loss"] = loss - damping * mean * inner(change, change)
    return weight, own_copy(mask.T), facts


def par(p: Problem) -> tuple[Array, Array, dict[str, Any]]:
    """Support search by ADMM on shrunk moments, then a refit of what stays."""
    return _refined(p, PAR)


def par_v2(p: Problem) -> tuple[Array, Array, dict[str, Any]]:
    """A longer search than par, with swaps between dropped and kept weights."""
    return _refined(p, PAR_V2)


def _refined(p: Problem, schedule: Schedule) -> tuple[Array, Array, dict[str, Any]]:
    gram = p.gram if p.spend else own_copy(p.gram)
    target = own_copy(p.target) if p.target is p.weight else p.target
    return refine(target, gram, steps_to(p.ratio, p.config), p.nm, p.dead, p.count, schedule)


SOLVERS: dict[str, Callable[[Problem], tuple[Array, Array, dict[str, Any]]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "hessian": hessian,
    "par": par,
    "par_v2": par_v2,
}


def steps_to(ratio: float, config: SparseConfig) -> list[float]:
    """The ratios that a progressive run passes through; the last is the one asked for.

    Example:
        >>> steps_to(0.5, SparseConfig())
        [0.5]
    """
    if not config.progressive:
        return [ratio]
    n = config.progressive_steps
    # Cubic (Zhu & Gupta 2017): most is dropped while much is left to make up for it.
    return [ratio * (1 - (1 - k / n) ** 3) for k in range(1, n + 1)]


def solve(
    layer: SparseLayer,
    weight: Array,
    moments: Moments | None,
    ratio: float,
    config: SparseConfig,
    *,
    last: bool = False,
) -> Solved:
    """Make one layer sparse.

    Args:
        layer: the layer.
        weight: its weight, floating point.
        moments: sums over its inputs; None for a method that needs none.
        ratio: share of its weights to drop, of which a whole number is made; one weight stays in any case.
        config: method, pattern and the rest.
        last: whether no other layer needs the moments: they are used up then, which saves as much memory again.

    Returns:
        The new weight, its mask, a bias correction and the report row. A layer with too few rows, or whose inputs
        are all zero, falls back to magnitude and says so in the row's "fallback".

    Raises:
        ArgumentError: the weight or the inputs are not finite.
    """
    xp = namespace(weight)
    matrix = xp.astype(layer.to_matrix(weight), precision(weight, layer.n_in), copy=False)
    if not all_finite(matrix):
        raise ArgumentError(f"the weight of {layer.name!r} must be finite. Received: NaN or infinity")
    account: dict[str, Any] = {"kind": layer.kind, "shape": list(layer.shape), "method": config.method}
    method = config.method
    if moments is not None:
        moments.check_finite()
        account["rows"] = moments.count
        reason = _no_use(moments, config)
        if reason and method != "magnitude":
            method = account["method"] = "magnitude"
            account["fallback"] = reason
    ratio = min(round(ratio * layer.size), layer.size - 1) / layer.size if config.nm is None else ratio
    means = means_of(matrix, moments, config, method, last)
    weights, keeps = [], []
    error = power = 0.0
    for g in range(layer.groups):
        gram, dead = (None, None) if means.grams is None else alive(means.grams[g], means.own)
        start, size = g * layer.n_out * layer.n_in, layer.n_out * layer.n_in
        dense = target = matrix[g]
        if means.missing is not None:
            assert moments is not None
            target = means.missing[g]
            target[...] = regress(target, gram, moments.count)
            target += dense
        problem = Problem(
            weight=dense,
            target=target,
            gram=gram,
            spend=means.own or dead is not None,
            dead=dead,
            # Groups of few weights (depthwise) take turns in rounding, so that the layer's total is exact.
            ratio=patterns.zeros_between(ratio, start, start + size) / size if layer.groups > 1 else ratio,
            nm=config.nm,
            config=config,
            count=moments.count if moments else 0,
        )
        new, keep, facts = SOLVERS[method](problem)
        loss, own_power = facts.pop("loss", None), facts.pop("power", None)
        account.update(facts)
        weights.append(new)
        keeps.append(keep)
        if gram is not None:
            error += quadratic((target - new).T, gram) if loss is None else loss
            power += quadratic(target.T, gram) if own_power is None else own_power
    new, keep = _together(weights), _together(keeps)
    left = int(xp.count_nonzero(keep))
    account |= {"weights": layer.size, "zeros": layer.size - left, "ratio": 1 - left / layer.size}
    if power > 0:
        account["output_error"] = (max(error, 0.0) / power) ** 0.5
    shift = None
    if means.gain is not None:
        shift = (means.gain[0] - new @ means.gain[1]).reshape(-1)
    return Solved(layer.from_matrix(new), layer.from_matrix(keep), shift, account)


def _together(groups: list[Array]) -> Array:
    # One group, the common case, without a copy.
    return groups[0][None] if len(groups) == 1 else namespace(groups[0]).stack(groups)


def _no_use(moments: Moments, config: SparseConfig) -> str | None:
    if moments.count < max(1, config.min_tokens):
        return f"saw {moments.count} calibration rows, fewer than min_tokens={config.min_tokens}"
    xp = namespace(moments.gram)
    if not bool(xp.any(xp.linalg.diagonal(moments.gram))):
        return "its inputs are all zero"
    return None
