"""The optimal-brain-surgeon sweep: drop weights column by column and let the later columns make up for them.

Of W (out, n) with inputs' moments H (n, n) = U^-1 U^-T, U upper triangular, for each column j in turn:

    mask[:, j]   = the entries to drop: the smallest (W[:, j] / U[j, j])^2, chosen for a block of columns at once
    err[:, j]    = W[:, j] where dropped / U[j, j]                  (out,)
    W[:, j:]    -= err[:, j] U[j, j:]                               (out, n - j)  column j becomes zero where dropped

The change D = W_new - W then costs tr(D H D^T) = sum err^2. Source: Frantar & Alistarh 2023 (SparseGPT), algorithm 1,
after Hassibi & Stork 1993. `plain.sweep` is this text; here the same numbers come from matrix products: a column takes
up the errors of the few before it in its group by one product with a vector, a group those of the groups before it in
its block by one product, the rest of the matrix those of a whole block by one more. On 1024 columns that is four times
as fast (docs/sparse.md, "Measured"). All is held transposed, (n, out), so that a column lies in one piece.
"""

from __future__ import annotations

from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths.backend import (
    Array,
    add_product,
    bits,
    device_of,
    inner,
    less_vector,
    library,
    namespace,
)
from slimkit.core.sparse.maths.pattern import NM

# Columns that hear of each other's errors one by one; a matrix product carries them to the rest of the block.
GROUP = 16


def sweep(
    turned: Array,
    upper: Array,
    ratio: float,
    nm: NM | None,
    block: int,
    *,
    dead: Array | None = None,
    keep: Array | None = None,
) -> tuple[Array, float]:
    """Choose and drop weights in one pass over the columns, in place (Frantar & Alistarh 2023, algorithm 1).

    Blocks of `block` columns choose their mask together; inside, a column takes up the errors of the few before it by
    one product with a vector, small groups of columns those of the groups before by one product, and the rest of the
    matrix those of a whole block by one more.

    Args:
        turned: (n, out) the weight's transpose, so that a column lies in one piece; becomes the new weight's.
        upper: (n, n), what `inverse_factor` gives.
        ratio: share to drop; exact over the matrix, and to within one entry in each block.
        nm: the n:m pattern, which is chosen every m columns instead.
        block: columns that choose together.
        dead: (n,) columns whose input is always zero: they go first.
        keep: (n, out) a mask to apply instead of choosing one.

    Returns:
        The mask (n, out), where True stays; and the loss tr(D H D^T) of the change D under the damped H behind
        `upper`, which is the sum of the squared errors.
    """
    xp = namespace(turned)
    n, n_out = turned.shape
    mask = xp.empty((n, n_out), dtype=xp.bool, device=device_of(turned))
    scale = 1 / xp.linalg.diagonal(upper)[:, None]  # (n, 1)
    importance = scale**2 if dead is None else xp.astype(~dead, turned.dtype)[:, None] * scale**2
    loss = 0.0
    group = GROUP
    if nm is not None:
        group = nm.group * max(1, GROUP // nm.group)
        block = group * max(1, block // group)

    part = None
    for start in range(0, n, block):
        stop = min(start + block, n)
        if part is None or part.size != stop - start:
            part = _Block(turned, stop - start, group, nm)
        part.load(turned[start:stop], upper[start:stop, start:stop], scale[start:stop], importance[start:stop])
        if keep is not None:
            part.drop_all_but(keep[start:stop])
        elif nm is None:
            part.choose(patterns.zeros_between(ratio, start * n_out, stop * n_out))
        part.sweep(choose=keep is None)
        if stop < n:  # (n - stop, out) -= (n - stop, size) @ (size, out)
            add_product(turned[stop:], upper[start:stop, stop:].T, part.error, factor=-1)
        part.store(turned[start:stop], mask[start:stop])
        loss += inner(part.error, part.error)
    return mask, loss


Views = tuple[Array, Array, Array]


class _Block:
    """Columns in work, with every view of them that the sweep takes.

    Args:
        turned: an array of the dtype and device to work in, with as many columns as there are outputs.
        size: columns of the weight.
        group: columns of a group.
        nm: the n:m pattern, or None.

    Attributes:
        error: (size, out) for each column what it can no longer say.
    """

    def __init__(self, turned: Array, size: int, group: int, nm: NM | None) -> None:
        xp, self._lib = namespace(turned), library(turned)
        self.size, self._nm = size, nm

        def room(*shape: int) -> Array:
            return xp.empty(shape, dtype=turned.dtype, device=device_of(turned))

        n_out = turned.shape[1]
        self._w, self.error, self._drop = (room(size, n_out) for _ in range(3))
        self._upper, self._scale, self._importance = room(size, size), room(size, 1), room(size, 1)
        self._drop_bits, self._scale_bits = bits(self._drop), bits(self._scale)
        self._choice = patterns.TwoOfFour(self._w[:4]) if nm == (2, 4) else None
        # Making a view costs as much as using it: each is made once, for all blocks.
        self._groups = []
        for first in range(0, size, group):
            last = min(first + group, size)
            before = (self._w[first:last], self._upper[first:last, :first], self.error[:first]) if first else None
            step = group if nm is None else nm.group
            turns = [self._turn(first, j, min(j + step, last)) for j in range(first, last, step)]
            self._groups.append((before, turns))

    def _turn(self, first: int, start: int, stop: int) -> tuple[slice, Views | None, list[tuple[Array, ...]]]:
        """Columns start..stop, which choose together: what they take up of errors first..start, then of their own."""
        errors = slice(first, start)
        ahead = (self._w[start:stop], self._upper[start:stop, errors], self.error[errors]) if start > first else None
        own = [
            (self._w[j], self._drop[j], self.error[j], *(self._taken(start, j, j) if j > start else (None, None)))
            for j in range(start, stop)
        ]
        return slice(start, stop), ahead, own

    def _taken(self, first: int, last: int, j: int) -> tuple[Array, Array]:
        """The errors first..last, and by which factors column j takes them up."""
        return self.error[first:last].T, self._upper[j, first:last]

    def load(self, w: Array, upper: Array, scale: Array, importance: Array) -> None:
        """Take over the columns (size, out), their factor and scales."""
        self._w[...] = w
        self._upper[...] = upper.T
        self._scale[...] = scale
        self._importance[...] = importance

    def choose(self, n_zeros: int) -> None:
        """Mark the columns' least important entries, all at once."""
        scores = self._lib.multiply(self._w, self._w, out=self._drop)  # (size, out)
        scores *= self._importance  # (size, out) * (size, 1)
        self.drop_all_but(patterns.keep_all_but(patterns.comparable(scores), n_zeros))

    def drop_all_but(self, keep: Array) -> None:
        """Mark what a mask (size, out) leaves out."""
        self._lib.multiply(~keep, self._scale, out=self._drop)

    def sweep(self, choose: bool) -> None:
        """Drop what is marked, or what the n:m pattern marks on the way, column by column."""
        multiply = self._lib.multiply
        for before, turns in self._groups:
            if before is not None:  # (group, out) -= (group, first) @ (first, out)
                add_product(*before, factor=-1)
            for columns, ahead, own in turns:
                if ahead is not None:  # (step, out) -= (step, columns before) @ (columns before, out)
                    add_product(*ahead, factor=-1)
                if choose and self._nm is not None:
                    self._choose_nm(columns, self._nm)
                for w, drop, error, errors, factors in own:
                    if errors is not None:  # (out,) -= (out, columns before) @ (columns before,)
                        less_vector(w, errors, factors)
                    multiply(w, drop, out=error)  # (out,): drop is 1 / U[j, j] where the entry goes, else zero

    def _choose_nm(self, columns: slice, nm: NM) -> None:
        scores = self._lib.multiply(self._w[columns], self._w[columns], out=self.error[columns])
        scores *= self._importance[columns]
        if self._choice is None:
            self._lib.multiply(~patterns.keep_nm_columns(scores, nm), self._scale[columns], out=self._drop[columns])
            return
        # The scale where the key is less than the second, else zero: signs of integers instead of masks make the whole
        # 2:4 sweep of 1024 x 1024 a fifth faster (39 against 50 ms of one core; 63 with the general choice).
        drop = self._drop_bits[columns]
        self._lib.subtract(self._choice.keys(scores), self._choice.second, out=drop)
        drop >>= 8 * drop.dtype.itemsize - 1
        drop &= self._scale_bits[columns]

    def store(self, w: Array, mask: Array) -> None:
        """Give back the columns and their mask, both (size, out)."""
        mask[...] = self._drop == 0
        w[...] = namespace(w).where(mask, self._w, 0.0)
