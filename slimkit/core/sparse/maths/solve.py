"""One layer: its weight and the moments of its inputs in, its sparse weight, bias and account out.

Of a weight W (out, n) for each group of a convolution, and G (n, n) the mean of x x^T over the inputs x that the layer
gets in the sparse model so far, wanted is V (out, n) with a given number of zeros and small

    E |T x - V x|^2 = tr((T - V) G (T - V)^T)      T = W + R G^-1, or W
    shift = E[T x] - V E[x]                        (out,) goes to the bias

R (out, n) are the mean products of what the layers before have lost of this layer's dense output with its inputs, so
that T says that too as far as the inputs can (`residue`, with its ridge). The configuration's method finds V; kept and
dropped weights may change places after it (`swaps`), and those that stay go to a coarse grid (`grid`). Source: Frantar
& Alistarh 2023, section 3, layer by layer; the files of the methods give theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths.backend import Array, all_finite, namespace, own_copy, precision
from slimkit.core.sparse.maths.factor import quadratic
from slimkit.core.sparse.maths.grid import FloatGrid, Grid, IntegerGrid, on_grid, steps_of
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.residue import alive, means_of, regress
from slimkit.core.sparse.maths.solvers import SparseProblem
from slimkit.core.sparse.maths.swaps import swap
from slimkit.core.sparse.methods import METHODS

# What a layer whose inputs say nothing is solved by: it needs none.
FALLBACK = "magnitude"

# Less than this share of what columns without input would make is rounding, and no output.
NOTHING = 1e-6

# Facts of the groups of a convolution that add up, and shares of an error with the fact that says of how large a one.
COUNTS = ("swaps", "outliers", "rounded_to_zero")
SHARES = {"swaps_gain": "swaps_error", "rounding_gain": "rounding_error"}


@dataclass(frozen=True)
class Solved:
    """What a layer becomes.

    Args:
        weight: in the shape of the layer's own weight, float32.
        keep: boolean, same shape; True where the weight stays. None where another process solved it and masks are not
            kept.
        bias_shift: what to add to the bias, or None.
        account: the layer's row of the report.
    """

    weight: Array
    keep: Array
    bias_shift: Array | None
    account: dict[str, Any]


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
    # (groups, out, n)
    matrix = xp.astype(layer.to_matrix(weight), precision(weight, layer.n_in), copy=False)
    if not all_finite(matrix):
        raise ArgumentError(f"the weight of {layer.name!r} must be finite. Received: NaN or infinity")
    account: dict[str, Any] = {"kind": layer.kind, "shape": list(layer.shape), "method": config.method}
    method = METHODS[config.method]
    if moments is not None:
        moments.check_finite()
        account["rows"] = moments.count
        reason = _no_use(moments, config)
        if reason and method.needs_data:
            method, account["method"] = METHODS[FALLBACK], FALLBACK
            account["fallback"] = reason
    ratio = min(round(ratio * layer.size), layer.size - 1) / layer.size if config.nm is None else ratio
    means = means_of(matrix, moments, config.paired and method.refits, last)
    # Too few rows to choose by are too few to exchange and to make up for roundings by.
    polished = (config.swaps > 0 or config.rounds) and "fallback" not in account
    weights, keeps, said = [], [], []
    error = power = unheard = 0.0
    n_kept = n_free = 0
    for g in range(layer.groups):
        gram, lost = (None, None) if means.grams is None else alive(means.grams[g], means.own)  # (n, n)
        dead = None if lost is None else lost.columns  # (n,)
        start, size = g * layer.n_out * layer.n_in, layer.n_out * layer.n_in
        dense = target = matrix[g]  # (out, n)
        if means.missing is not None:
            assert moments is not None
            target = means.missing[g]  # (out, n): mean products of missing outputs with inputs
            target[...] = regress(target, gram, moments.count)  # (out, n): their regression on the inputs
            target += dense
        # Groups of few weights (depthwise) take turns in rounding, so that the layer's total is exact.
        own = patterns.zeros_between(ratio, start, start + size) / size if layer.groups > 1 else ratio
        new, keep, facts = method.solve(
            SparseProblem(
                weight=dense,
                # Methods use up what they are given; swaps and the error after them and after rounding need it.
                target=own_copy(target) if polished and target is not dense else target,
                gram=gram,
                spend=(means.own or dead is not None) and not polished,
                dead=dead,
                ratios=steps_to(own, config),
                nm=config.nm,
                count=moments.count if moments else 0,
                damping=config.damping,
                block_size=config.block_size,
                options=config.settings if method is METHODS[config.method] else {},
            )
        )
        if not all_finite(new):
            raise ArgumentError(f"method {config.method!r} gave {layer.name!r} weights that are NaN or infinite.")
        loss, own_power = facts.pop("loss", None), facts.pop("power", None)
        damped = None if gram is None or not polished else _damped(gram, dead, config.damping)
        if config.swaps and damped is not None:
            new, keep, more = swap(target, new, keep, damped, config.nm, config.swaps, method.refits)
            facts, loss = facts | more, None
        if (grid := _grid(new, config)) is not None:
            # Groups of few weights take turns in having outliers, too.
            mine = int(xp.count_nonzero(keep))
            free = int(config.outliers * (n_kept + mine)) - n_free
            new, keep, more = on_grid(new, keep, damped, grid, free)
            n_kept, n_free = n_kept + mine, n_free + more["outliers"]
            facts, loss = facts | more, None
        said.append(facts)
        weights.append(new)
        keeps.append(keep)
        if gram is not None:
            error += quadratic((target - new).T, gram) if loss is None else loss
            power += quadratic(target.T, gram) if own_power is None else own_power
        if lost is not None:  # columns without input make no error and no output; the target is the weight there
            error -= lost.part(dense - new)
            unheard += lost.part(dense)
    account |= merged(said)
    new, keep = _together(weights), _together(keeps)  # (groups, out, n)
    left = int(xp.count_nonzero(keep))
    account |= {"weights": layer.size, "zeros": layer.size - left, "ratio": 1 - left / layer.size}
    if power - unheard > NOTHING * unheard:
        account["output_error"] = (max(error, 0.0) / (power - unheard)) ** 0.5
    shift = None
    if means.gain is not None:
        # (groups, out, 1) - (groups, out, n) @ (groups, n, 1): what the bias takes up
        shift = (means.gain[0] - new @ means.gain[1]).reshape(-1)
    return Solved(layer.from_matrix(new), layer.from_matrix(keep), shift, account)


def merged(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What the groups of a layer say, as the layer's: counts add up, shares of an error weigh as it does.

    Of anything else the largest is said where there are numbers, since that is what a reader is warned by; what is no
    number is the last group's.

    Example:
        >>> rows = ((2, 0.5, 3.0), (0, 0.0, 1.0))
        >>> merged([dict(zip(("swaps", "swaps_gain", "swaps_error"), row)) for row in rows])
        {'swaps': 2, 'swaps_gain': 0.375}
    """
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for facts in groups for key in facts):
        values = [facts[key] for facts in groups if key in facts]
        if key in SHARES.values():
            continue
        if key in COUNTS:
            found[key] = sum(values)
        elif key in SHARES:
            errors = [facts[SHARES[key]] for facts in groups]
            whole = sum(errors)
            found[key] = round(sum(v * e for v, e in zip(values, errors)) / whole, 6) if whole > 0 else 0.0
        else:
            found[key] = max(values) if all(isinstance(v, (int, float)) for v in values) else values[-1]
    return found


def _grid(weight: Array, config: SparseConfig) -> Grid | None:
    if config.weight_bits is not None:
        return IntegerGrid(steps_of(weight, config.weight_bits), config.weight_bits)
    return None if config.mantissa_bits is None else FloatGrid(config.mantissa_bits)


def _damped(gram: Array, dead: Array | None, damping: float) -> Array:
    """A copy of the gram with the sweep's damping, and nothing to gain in columns whose input is always zero."""
    xp = namespace(gram)
    copy = own_copy(gram)
    diagonal = xp.linalg.diagonal(gram)
    added = xp.ones_like(diagonal) * (damping * xp.mean(diagonal))
    if dead is not None:
        added = xp.where(dead, -diagonal, added)
    n = gram.shape[0]
    copy.reshape(-1)[:: n + 1] += added  # (n * n,): every (n + 1)-th lies on the diagonal
    return copy


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
