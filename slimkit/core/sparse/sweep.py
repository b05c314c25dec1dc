"""The optimal-brain-surgeon sweep: drop weights column by column and let the later columns make up for them."""

from __future__ import annotations

from typing import Any

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse import pattern as patterns
from slimkit.core.sparse.backend import (
    Array,
    cholesky,
    device_of,
    inverse_lower,
    less_outer,
    less_product,
    namespace,
)
from slimkit.core.sparse.pattern import NM

# Columns updated one by one before a matrix product carries their errors to the rest of the block.
INNER = 32


def inverse_factor(gram: Array, damping: float) -> tuple[Array, float]:
    """Upper triangular U with U^T U = (gram + damping)^-1, from one factorisation.

    Turned round, gram is P gram P = L L^T, so its inverse is (P L^-1 P)^T (P L^-1 P), and P L^-1 P is upper triangular:
    one Cholesky and one triangular inverse where the published steps factor twice and invert in between.

    Args:
        gram: (n, n) symmetric, no zero on its diagonal.
        damping: what is added to the diagonal, as a share of its mean.

    Returns:
        U in the gram's dtype, and the damping that it took: the one asked for, in float64 if float32 fails, then ten
        times as much up to 1000 times.

    Raises:
        ArgumentError: even that is not positive definite.
    """
    xp = namespace(gram)
    mean = float(xp.mean(xp.linalg.diagonal(gram)))
    attempts = [(gram.dtype, damping)] + [(xp.float64, max(damping, 1e-6) * 10**k) for k in range(4)]
    for dtype, share in attempts:
        try:
            turned = _own(xp, xp.flip(gram, axis=(0, 1)), dtype)
        except (TypeError, RuntimeError):
            continue  # the device has no float64
        turned.reshape(-1)[:: turned.shape[0] + 1] += share * mean
        # Each name is taken over by the next: no more than two matrices of this size are alive here at once.
        turned = cholesky(turned)
        if turned is not None:
            turned = inverse_lower(turned)
            upper = xp.astype(xp.flip(turned, axis=(0, 1)), gram.dtype, copy=False)
            if bool(xp.isfinite(xp.sum(upper))):  # one pass: infinity or NaN anywhere spoils the sum
                return upper, share
    raise ArgumentError(
        f"the Hessian of {gram.shape[0]} inputs is not positive definite even with {attempts[-1][1]:g} of its mean "
        "added. Give more calibration data, or use method='wanda'."
    )


def sweep(
    weight: Array,
    upper: Array,
    ratio: float,
    nm: NM | None,
    block: int,
    *,
    dead: Array | None = None,
    keep: Array | None = None,
) -> tuple[Array, Array, float]:
    """Choose and drop weights in one pass over the columns (Frantar & Alistarh 2023, algorithm 1).

    Blocks of `block` columns choose their mask together; inside, columns go in small groups whose errors reach the
    rest of the block by one product, and whole blocks reach the rest of the matrix by one more.

    Args:
        weight: (out, n).
        upper: (n, n), what `inverse_factor` gives.
        ratio: share to drop; exact over the matrix, and to within one entry in each block.
        nm: the n:m pattern, which is chosen every m columns instead.
        block: columns that choose together.
        dead: (n,) columns whose input is always zero: they go first.
        keep: (out, n) a mask to apply instead of choosing one.

    Returns:
        The new weight and its mask, both (out, n), where True stays; and the loss tr(D H D^T) of the change D under
        the damped H behind `upper`, which is the sum of the squared errors.
    """
    xp = namespace(weight)
    n_out, n = weight.shape
    w = _own(xp, weight.T)  # (n, out): a column is contiguous
    mask = xp.ones((n, n_out), dtype=xp.bool, device=device_of(weight)) if keep is None else _own(xp, keep.T)
    scale = xp.linalg.diagonal(upper)[:, None]  # (n, 1)
    importance = 1 / scale**2 if dead is None else xp.astype(~dead, weight.dtype)[:, None] / scale**2
    multiply = getattr(xp, "mul", xp.multiply)  # torch's own, without the standard's checks in every column
    loss = 0.0
    inner = INNER
    if nm is not None:
        inner = nm.group * max(1, INNER // nm.group)
        block = inner * max(1, block // inner)

    for start in range(0, n, block):
        stop = min(start + block, n)
        error = xp.empty((stop - start, n_out), dtype=weight.dtype, device=device_of(weight))
        if keep is None and nm is None:
            n_zeros = patterns.zeros_between(ratio, start * n_out, stop * n_out)
            mask[start:stop] = patterns.keep_all_but(w[start:stop] ** 2 * importance[start:stop], n_zeros)
        drop = xp.astype(~mask[start:stop], weight.dtype) / scale[start:stop]
        for first in range(start, stop, inner):
            last = min(first + inner, stop)
            for j in range(first, last):
                if nm is not None and keep is None and j % nm.group == 0:
                    group = slice(j, j + nm.group)
                    mask[group] = patterns.keep_nm_columns(w[group] ** 2 * importance[group], nm)
                    drop[j - start : j - start + nm.group] = xp.astype(~mask[group], weight.dtype) / scale[group]
                left = error[j - start]  # what column j can no longer say
                multiply(w[j], drop[j - start], out=left)
                if j + 1 < last:
                    less_outer(w[j + 1 : last], upper[j, j + 1 : last], left)
            if last < stop:
                less_product(w[last:stop], upper[first:last, last:stop].T, error[first - start : last - start])
        if stop < n:
            less_product(w[stop:], upper[start:stop, stop:].T, error)
        loss += float(xp.vecdot(error.reshape(-1), error.reshape(-1)))
    return xp.where(mask, w, 0.0).T, mask.T, loss


def _own(xp: Any, array: Array, dtype: Any = None) -> Array:
    """A contiguous copy: the caller's array stays as it was, and a column is read without strides."""
    copy = xp.empty(array.shape, dtype=array.dtype if dtype is None else dtype, device=device_of(array))
    copy[...] = array
    return copy
