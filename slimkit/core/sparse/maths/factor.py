"""The inverse of a Hessian as a triangular factor, by halves: matrix products do the work, in one matrix of memory."""

from __future__ import annotations

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.maths.backend import (
    Array,
    add_product,
    cholesky,
    inner,
    inverse_lower,
    namespace,
    own_copy,
    product_into,
)

# Halves of this many columns and fewer go to the library's Cholesky and triangular solve.
LEAF = 128
# Rows of a product with a Hessian that are in memory at once.
STRIP = 256


def inverse_factor(gram: Array, damping: float, *, each: bool = False) -> tuple[Array, float]:
    """Upper triangular U with U^T U = (gram + damping)^-1, from one factorisation.

    Args:
        gram: (n, n) symmetric, no zero on its diagonal.
        damping: what is added to the diagonal, as a share of its mean.
        each: as a share of every entry of it instead: what the mean's share is to correlations, without making them.

    Returns:
        U in the gram's dtype, and the damping that it took: the one asked for, in float64 if float32 fails, then ten
        times as much up to 1000 times.

    Raises:
        ArgumentError: even that is not positive definite.
    """
    xp = namespace(gram)
    line = xp.linalg.diagonal(gram)
    unit = line if each else float(xp.mean(line))
    attempts = [(gram.dtype, damping)] + [(xp.float64, max(damping, 1e-6) * 10**k) for k in range(4)]
    for dtype, share in attempts:
        try:
            upper = own_copy(gram, dtype)
        except (TypeError, RuntimeError):
            continue  # the device has no float64
        upper.reshape(-1)[:: upper.shape[0] + 1] += share * unit
        if _invert(upper):
            upper = xp.astype(upper, gram.dtype, copy=False)
            if bool(xp.isfinite(xp.sum(upper))):  # one pass: infinity or NaN anywhere spoils the sum
                return upper, share
    raise ArgumentError(
        f"the Hessian of {gram.shape[0]} inputs is not positive definite even with {attempts[-1][1]:g} of its mean "
        "added. Give more calibration data, or use method='wanda'."
    )


def inverse_from(upper: Array) -> Array:
    """The inverse U^T U that an upper triangular factor stands for, in its memory, without the products with zeros."""
    n = upper.shape[0]
    for start in range((n - 1) // STRIP * STRIP, -1, -STRIP):  # no rows above need those below
        stop = min(start + STRIP, n)
        upper[start:stop, start:] = upper[:stop, start:stop].T @ upper[:stop, start:]
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


def quadratic(turned: Array, gram: Array) -> float:
    """The mean squared output that weights make: tr(D^T gram D), from one half of the symmetric gram.

    Args:
        turned: (n, out) the weights' transpose, D.
        gram: (n, n) symmetric.
    """
    total = 0.0
    for start in range(0, gram.shape[0], STRIP):
        stop = start + STRIP
        strip = turned[start:stop]
        total += inner(gram[start:stop, start:stop] @ strip, strip)
        if start:
            total += 2 * inner(gram[start:stop, :start] @ turned[:start], strip)
    return total


def _half(n: int) -> int:
    """Where to cut: whole leaves on the left, so that few sizes occur and all are even."""
    return -(-n // (2 * LEAF)) * LEAF


def _invert(h: Array) -> bool:
    """Put U, upper triangular with U^T U = h^-1, in the place of h; False when h is not positive definite.

    With h = [[a, b], [b^T, d]] and d^-1 = U3^T U3, the Schur complement is s = a - r r^T with r = b U3^T; with
    s^-1 = U1^T U1 then U = [[U1, -U1 r U3], [0, U3]]. Only the upper half of h is read; r lies in the lower one.
    """
    n = h.shape[0]
    if n <= LEAF:
        return _invert_leaf(h)
    half = _half(n)
    a, b, d, r = h[:half, :half], h[:half, half:], h[half:, half:], h[half:, :half].T
    if not _invert(d):
        return False
    _times_upper_transposed(b, d, r)
    _less_square(a, r)
    if not _invert(a):
        return False
    _times_upper(r, d, b)
    _upper_times(a, b, r)
    b[...] = -r
    r[...] = 0
    return True


def _invert_leaf(h: Array) -> bool:
    """Turned round, h is P h P = L L^T, so that P L^-1 P is upper triangular and a factor of the inverse."""
    xp = namespace(h)
    upper = xp.triu(h)
    factor = cholesky(xp.flip(upper + xp.triu(h, k=1).T, axis=(0, 1)))
    if factor is None:
        return False
    h[...] = xp.flip(inverse_lower(factor), axis=(0, 1))
    return True


def _times_upper_transposed(x: Array, upper: Array, out: Array) -> None:
    """out = x upper^T, without the products with the zeros."""
    n = upper.shape[0]
    if n <= LEAF:
        product_into(out, x, upper.T)
        return
    half = _half(n)
    _times_upper_transposed(x[:, :half], upper[:half, :half], out[:, :half])
    add_product(out[:, :half], x[:, half:], upper[:half, half:].T)
    _times_upper_transposed(x[:, half:], upper[half:, half:], out[:, half:])


def _times_upper(x: Array, upper: Array, out: Array) -> None:
    """out = x upper, without the products with the zeros."""
    n = upper.shape[0]
    if n <= LEAF:
        product_into(out, x, upper)
        return
    half = _half(n)
    _times_upper(x[:, :half], upper[:half, :half], out[:, :half])
    _times_upper(x[:, half:], upper[half:, half:], out[:, half:])
    add_product(out[:, half:], x[:, :half], upper[:half, half:])


def _upper_times(upper: Array, x: Array, out: Array) -> None:
    """out = upper x, without the products with the zeros."""
    n = upper.shape[0]
    if n <= LEAF:
        product_into(out, upper, x)
        return
    half = _half(n)
    _upper_times(upper[:half, :half], x[:half], out[:half])
    add_product(out[:half], upper[:half, half:], x[half:])
    _upper_times(upper[half:, half:], x[half:], out[half:])


def _less_square(a: Array, r: Array) -> None:
    """a -= r r^T, the upper half of it."""
    n = a.shape[0]
    if n <= LEAF:
        add_product(a, r, r.T, factor=-1)
        return
    half = _half(n)
    _less_square(a[:half, :half], r[:half])
    add_product(a[:half, half:], r[:half], r[half:].T, factor=-1)
    _less_square(a[half:, half:], r[half:])
