"""What a layer should say: its trained weight, or what makes up for what the layers before it have lost.

With dense inputs x, sparse inputs s and a trained W (out, n), the weights whose outputs come closest to W x are

    argmin_T E |W x - T s|^2 = W E[x s^T] E[s s^T]^-1 = W + R E[s s^T]^-1,   R = W (E[x s^T] - E[s s^T])   (out, n)

R is what outputs are missing: zero where nothing was lost. Its regression has a ridge, since few rows tell little of
it: R (E[s s^T] + ridge diag)^-1. What the residual stream has lost already (the drift d) is one more thing to fit,
R += E[d s^T]. With a bias all moments are taken about the means, and the bias carries the rest. Source: least squares;
ridge, Hoerl & Kennard 1970; fitting to dense outputs as in Li et al. 2025 (GPTAQ's asymmetric calibration).
"""

from __future__ import annotations

from dataclasses import dataclass

from slimkit.core.sparse.maths.backend import Array, add_product, namespace, own_copy
from slimkit.core.sparse.maths.factor import STRIP, inverse_factor
from slimkit.core.sparse.maths.moments import Moments

# The regression that makes up for what earlier layers lost has a ridge of RIDGE_PER_ROW * channels / calibration rows,
# at most RIDGE, as a share of a channel's variance. Little of the loss is predictable, and tokens of one text resemble
# each other: with less, the calibration texts gain and others lose.
RIDGE_PER_ROW = 4.0
RIDGE = 0.3

# By bytes of a number: of its mean square a column's variance is more than this share, or it is rounding.
LEAST_VARIANCE = {4: 1e-5, 8: 1e-12}


@dataclass(frozen=True)
class Means:
    """What the moments say of a layer.

    Args:
        grams: (groups, n, n) mean second moments of the inputs; None without moments.
        own: whether their memory may be used up.
        missing: (groups, out, n) mean products of the outputs that are missing with the inputs; None when unknown.
        gain: what the bias takes up, (outputs of the trained weight, inputs); None when nothing.
    """

    grams: Array | None
    own: bool = False
    missing: Array | None = None
    gain: tuple[Array, Array] | None = None


def means_of(matrix: Array, moments: Moments | None, paired: bool, last: bool) -> Means:
    """Mean grams; and what outputs are missing and what the bias gains, when dense inputs are known.

    Args:
        matrix: (groups, out, n) the trained weight.
        moments: sums over the inputs, or None.
        paired: whether the layer is to be fitted to the dense model's outputs.
        last: whether the moments may be used up.
    """
    if moments is None or moments.gram is None:
        return Means(None)
    moments.average()
    grams, drift = moments.gram, moments.drift_cross
    if not paired or not moments.related:
        return Means(grams, last)
    gain, own = None, last
    centred = moments.layer.has_bias
    if centred:
        # (groups, out, n) @ (groups, n, 1) = (groups, out, 1), and (groups, n, 1)
        gain = (matrix @ moments.dense_total[..., None], moments.total[..., None])
        grams, own = grams if last else own_copy(grams), True
        _centre(grams, moments.total)
    missing = _missing(matrix, moments, grams, centred, last)
    if gain and drift is not None:
        gain = (gain[0] + moments.drift_total[..., None], gain[1])
    if last:
        moments.cross = moments.missing = moments.drift_cross = None
    return Means(grams, own, missing, gain)


def _missing(matrix: Array, moments: Moments, grams: Array, centred: bool, last: bool) -> Array:
    """Mean products (groups, out, n) of the outputs that are missing with the inputs, about the means if `centred`."""
    means, cross = moments.total[:, None, :], moments.cross  # (groups, 1, n), (groups, n, n)
    if moments.missing is not None:
        missing = moments.missing if last else own_copy(moments.missing)
        if centred:
            # (groups, out, 1) * (groups, 1, n)
            missing -= (matrix @ (moments.dense_total - moments.total)[..., None]) * means
    else:
        missing = own_copy(matrix)
        for start in range(0, matrix.shape[2], STRIP):
            some = slice(start, start + STRIP)
            # (groups, n, strip): zero with equal inputs, the target is W then, exactly
            apart = cross[..., some] - grams[..., some]
            if centred:
                apart -= moments.dense_total[:, :, None] * means[..., some]
            missing[..., some] = matrix @ apart  # (groups, out, n) @ (groups, n, strip)
    if moments.drift_cross is not None:
        missing += moments.drift_cross
        if centred:
            missing -= moments.drift_total[:, :, None] * means
    return missing


def _centre(grams: Array, means: Array) -> None:
    """Second moments become central ones.

    Of a column that hardly varies they are rounding, which no factorisation stands: its correlations with others may be
    any number. Such a column is a constant, which the bias says, and its moments are zero.
    """
    xp = namespace(grams)
    least = LEAST_VARIANCE[grams.dtype.itemsize]
    for gram, mean in zip(grams, means):
        line = gram.reshape(-1)[:: gram.shape[0] + 1]
        before = own_copy(line)
        add_product(gram, mean[:, None], mean[None, :], factor=-1)  # (n, n) -= (n, 1) @ (1, n)
        varies = line > least * before
        if not bool(xp.all(varies)):
            gram *= varies  # (n, n) * (n,)
            gram *= varies[:, None]


@dataclass(frozen=True)
class Dead:
    """Columns whose input is always zero.

    Args:
        columns: (n,) which.
        level: what stands on the gram's diagonal there.
    """

    columns: Array
    level: float

    def part(self, weight: Array) -> float:
        """What the gram says of their part of a weight (out, n), though no output has it."""
        xp = namespace(weight)
        return self.level * float(xp.sum(xp.where(self.columns, weight * weight, 0.0)))


def alive(gram: Array, own: bool) -> tuple[Array, Dead | None]:
    """A gram without zeros on its diagonal, in memory of its own unless it may be changed, and its dead columns.

    They get the mean of the others, whatever the inputs' scale, so that damping stays the share of it that it is.
    """
    xp = namespace(gram)
    line = xp.linalg.diagonal(gram)
    columns = line <= 0
    n_dead = int(xp.count_nonzero(columns))
    if not n_dead:
        return gram, None
    level = float(xp.sum(xp.where(columns, 0.0, line))) / (gram.shape[0] - n_dead) if n_dead < gram.shape[0] else 1.0
    gram = gram if own else own_copy(gram)
    gram.reshape(-1)[:: gram.shape[0] + 1] += xp.astype(columns, gram.dtype) * level
    return gram, Dead(columns, level)


def regress(missing: Array, gram: Array, count: int) -> Array:
    """Coefficients of a ridge regression of missing outputs on the inputs, from their mean products."""
    upper, _ = inverse_factor(gram, min(RIDGE, RIDGE_PER_ROW * gram.shape[0] / count), each=True)
    return (missing @ upper.T) @ upper  # (out, n) @ (n, n) twice: U^T U is the inverse
