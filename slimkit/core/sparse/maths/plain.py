"""The sweep and the choices of entries without any haste: what their fast forms are held to by the tests, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.sparse.maths.pattern import NM, zeros_between

Array = np.ndarray[Any, Any]


def sweep(w: Array, upper: Array, ratio: float, nm: NM | None, block: int) -> tuple[Array, Array, float]:
    """Frantar & Alistarh 2023, algorithm 1, one column after the other.

    Args:
        w: (out, n) the weight.
        upper: (n, n) upper triangular U with U^T U = H^-1.
        ratio: share to drop.
        nm: the n:m pattern, chosen every m columns instead.
        block: columns that choose together.

    Returns:
        The new weight (out, n), its mask (out, n), and tr(D H D^T) of the change D.
    """
    w, out, n = w.copy(), *w.shape
    keep, loss = np.ones((out, n), bool), 0.0
    block = block if nm is None else nm.group
    for start in range(0, n, block):
        stop = min(start + block, n)
        scores = (w[:, start:stop] / np.diagonal(upper)[start:stop]) ** 2  # (out, block): OBS's saliency of each entry
        if nm is None:
            n_zeros = zeros_between(ratio, start * out, stop * out)
            keep[:, start:stop] = keep_all_but(scores.T, n_zeros).T  # column by column, where scores are equal
        else:
            keep[:, start:stop] = keep_nm(scores, nm)
        for j in range(start, stop):
            error = np.where(keep[:, j], 0.0, w[:, j]) / upper[j, j]  # (out,): what column j can no longer say
            w[:, j:] -= error[:, None] * upper[j, j:]  # (out, n - j): later columns say it instead
            loss += float(error @ error)
        w[~keep] = 0.0
    return w, keep, loss


def keep_all_but(scores: Array, n_zeros: int) -> Array:
    """Keep all but the `n_zeros` smallest; of equal scores the first go."""
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores, axis=None, kind="stable")[:n_zeros]] = False
    return keep.reshape(scores.shape)


def keep_nm(scores: Array, nm: NM) -> Array:
    """Keep the `nm.keep` largest of every `nm.group` of a row; of equal scores the first go."""
    groups = scores.reshape(-1, nm.group)
    return np.stack([keep_all_but(group, nm.group - nm.keep) for group in groups]).reshape(scores.shape)
