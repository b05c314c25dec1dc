"""What a layer should say: its trained weight, or what makes good what the layers before it have lost."""

from __future__ import annotations

from dataclasses import dataclass

from slimkit.core.sparse.maths.backend import Array, add_product, namespace, own_copy
from slimkit.core.sparse.maths.factor import STRIP, inverse_factor
from slimkit.core.sparse.maths.moments import Moments

# The regression that makes good what earlier layers lost has a ridge of RIDGE_PER_ROW * channels / calibration rows, at
# most RIDGE, as a share of a channel's variance. Little of the loss is predictable, and tokens of one text resemble
# each other: with less, the calibration texts gain and others lose.
RIDGE_PER_ROW = 4.0
RIDGE = 0.3


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

    With dense inputs x and sparse inputs s, the best dense-output weights are W E[x s^T] E[s s^T]^-1, which is W and
    a regression of the outputs that are missing, W (E[x s^T] - E[s s^T]); what the layers before have already lost on
    the residual stream (the drift) is one more output to fit. With a bias, all moments are taken about the means and
    the bias carries the rest.
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
    means, cross = moments.total[:, None, :], moments.cross
    if moments.missing is not None:
        missing = moments.missing if last else own_copy(moments.missing)
        if centred:
            missing -= (matrix @ (moments.dense_total - moments.total)[..., None]) * means
    else:
        missing = own_copy(matrix)
        for start in range(0, matrix.shape[2], STRIP):
            some = slice(start, start + STRIP)
            apart = cross[..., some] - grams[..., some]  # zero with equal inputs: the target is W then, exactly
            if centred:
                apart -= moments.dense_total[:, :, None] * means[..., some]
            missing[..., some] = matrix @ apart
    if moments.drift_cross is not None:
        missing += moments.drift_cross
        if centred:
            missing -= moments.drift_total[:, :, None] * means
    return missing


def _centre(grams: Array, means: Array) -> None:
    """Second moments become central ones; rounding may have left a column that never varies slightly below zero."""
    xp = namespace(grams)
    for gram, mean in zip(grams, means):
        add_product(gram, mean[:, None], mean[None, :], factor=-1)
        line = gram.reshape(-1)[:: gram.shape[0] + 1]
        line[...] = xp.clip(line, 0.0, None)


def alive(gram: Array, own: bool) -> tuple[Array, Array | None]:
    """A gram with ones on the diagonal of dead columns, in memory of its own unless it may be changed, and which."""
    xp = namespace(gram)
    dead = xp.linalg.diagonal(gram) <= 0
    if not bool(xp.any(dead)):
        return gram, None
    gram = gram if own else own_copy(gram)
    gram.reshape(-1)[:: gram.shape[0] + 1] += xp.astype(dead, gram.dtype)
    return gram, dead


def regress(missing: Array, gram: Array, count: int) -> Array:
    """Coefficients of a ridge regression of missing outputs on the inputs, from their mean products."""
    upper, _ = inverse_factor(gram, min(RIDGE, RIDGE_PER_ROW * gram.shape[0] / count), each=True)
    return (missing @ upper.T) @ upper
