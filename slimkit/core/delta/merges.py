"""The mathematics of making one low-rank delta of several: sums, TIES and DARE, exact or on the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Factors = tuple[Array, Array]  # a (rank, in), b (out, rank)


class Merge(NamedTuple):
    """One way to make one of several.

    Args:
        on: "ranks" (beside each other), "factors" (a with a, b with b) or "product" (the sums b @ a, cut to a rank).
        keep: which entries stay: "" (all), "largest" or "random".
        elect: whether only entries of the sign that wins count (TIES).
    """

    on: str
    keep: str = ""
    elect: bool = False


METHODS: dict[str, Merge] = {
    "cat": Merge("ranks"),
    "linear": Merge("factors"),
    "svd": Merge("product"),
    "magnitude_prune": Merge("factors", "largest"),
    "magnitude_prune_svd": Merge("product", "largest"),
    "ties": Merge("factors", "largest", True),
    "ties_svd": Merge("product", "largest", True),
    "dare_linear": Merge("factors", "random"),
    "dare_linear_svd": Merge("product", "random"),
    "dare_ties": Merge("factors", "random", True),
    "dare_ties_svd": Merge("product", "random", True),
}
MAJORITIES = ("total", "frequency")


def largest(tensor: Array, density: float) -> Array:
    """The share `density` of the entries that is largest in magnitude, the others zero; of equal ones the first.

    Source:
        Yadav et al. 2023, "TIES-Merging", section 3.1 (trim).

    Example:
        >>> largest(np.array([1.0, -3.0, 2.0, 0.5]), 0.5).tolist()
        [0.0, -3.0, 2.0, 0.0]
    """
    order = np.argsort(-np.abs(tensor).reshape(-1), kind="stable")[: int(density * tensor.size)]
    kept = np.zeros(tensor.size, bool)
    kept[order] = True
    return np.where(kept.reshape(tensor.shape), tensor, tensor.dtype.type(0))


def drawn(tensor: Array, density: float, rng: np.random.Generator) -> Array:
    """Each entry with probability `density`, over the density, so that the expected value stays; others zero.

    Source:
        Yu et al. 2024, "Language Models are Super Mario" (DARE), section 3.
    """
    kept = rng.random(tensor.shape, dtype=np.float32) < density
    return np.where(kept, tensor / tensor.dtype.type(density), tensor.dtype.type(0))


def elected(tensors: Array, majority: str) -> Array:
    """Which entries have the sign that wins at their place: by the sum of values, or by the number of signs.

    Args:
        tensors: (deltas, ...).
        majority: "total" or "frequency".

    Source:
        Yadav et al. 2023, section 3.2 (elect sign).

    Example:
        >>> elected(np.array([[3.0], [-1.0], [-1.0]]), "total")[:, 0].tolist()
        [True, False, False]
        >>> elected(np.array([[3.0], [-1.0], [-1.0]]), "frequency")[:, 0].tolist()
        [False, True, True]
    """
    signs = np.sign(tensors)
    votes = (tensors if majority == "total" else signs).sum(0)
    winner: Array = signs == np.where(votes >= 0, 1, -1)
    return winner


def merged(
    tensors: Sequence[Array],
    weights: Sequence[float],
    merge: Merge,
    density: float = 1.0,
    majority: str = "total",
    rng: np.random.Generator | None = None,
) -> Array:
    """One array of several of a shape: each thinned, then the weighted sum, or the weighted mean of those elected.

    Args:
        tensors: the arrays.
        weights: one each.
        merge: which entries stay, and whether signs are elected.
        density: the share of entries that stays.
        majority: see `elected`.
        rng: where "random" draws.

    Source:
        Yadav et al. 2023, section 3.3 (disjoint merge), with weights; Yu et al. 2024, section 3.

    Example:
        >>> merged([np.ones(2), -np.ones(2)], [1.0, 0.5], Merge("factors")).tolist()
        [0.5, 0.5]
    """
    if density < 1 and merge.keep == "largest":
        tensors = [largest(t, density) for t in tensors]
    elif density < 1 and merge.keep == "random":
        assert rng is not None
        tensors = [drawn(t, density, rng) for t in tensors]
    held = np.stack(tensors)
    factor = np.asarray(weights, held.dtype).reshape(-1, *[1] * (held.ndim - 1))
    if not merge.elect:
        total: Array = (held * factor).sum(0)
        return total
    voice = elected(held, majority)
    mean: Array = (held * factor * voice).sum(0) / np.maximum(voice.sum(0), 1).astype(held.dtype)
    return mean


def beside(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors whose product is the weighted sum of the products, exactly; their rank is the sum of the ranks.

    Example:
        >>> a, b = beside([(np.ones((1, 2)), np.ones((2, 1))), (np.ones((1, 2)), np.ones((2, 1)))], [1.0, 0.5])
        >>> (b @ a).tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """
    scaled = [a * a.dtype.type(weight) for (a, _), weight in zip(factors, weights, strict=True)]
    return np.concatenate(scaled, 0), np.concatenate([b for _, b in factors], 1)


def cut(change: Array, rank: int) -> Factors:
    """The best factors of a rank of a matrix (out, in), b holding the singular values.

    Example:
        >>> a, b = cut(np.diag([3.0, 1.0]), 1)
        >>> np.abs(b @ a).round(6).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    return vt[:rank], u[:, :rank] * s[:rank]


def cut_product(factors: Factors, rank: int) -> Factors:
    """`cut` of b @ a without building it: two QR factors and the decomposition of a small core."""
    a, b = factors
    left, upper = np.linalg.qr(b)  # (out, r), (r, r)
    right, lower = np.linalg.qr(a.T)  # (in, r), (r, r)
    low, high = cut(upper @ lower.T, rank)  # (rank, r), (r, rank)
    return low @ right.T, left @ high


def combined(
    factors: Sequence[Factors],
    weights: Sequence[float],
    method: str,
    *,
    rank: int | None = None,
    density: float = 1.0,
    majority: str = "total",
    rng: np.random.Generator | None = None,
) -> Factors:
    """One pair of factors of several.

    Args:
        factors: a (rank, in) and b (out, rank) of each delta.
        weights: of each, its scale in it.
        method: a key of METHODS.
        rank: of the result where the product is cut; None means the largest there is.
        density, majority, rng: see `merged`.

    Returns:
        a and b, to be used with a scale of 1.

    Example:
        >>> one = (np.ones((1, 2)), np.ones((2, 1)))
        >>> a, b = combined([one, one], [1.0, 2.0], "svd")
        >>> (b @ a).round(6).tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    merge = METHODS[method]
    if merge.on == "ranks":
        return beside(factors, weights)
    if merge.on == "product":
        wanted = max(a.shape[0] for a, _ in factors) if rank is None else rank
        if not merge.keep:
            wide = beside(factors, weights)
            if wide[0].shape[0] <= min(wide[0].shape[1], wide[1].shape[0]) and wanted <= wide[0].shape[0]:
                return cut_product(wide, wanted)
            return cut(wide[1] @ wide[0], wanted)
        return cut(merged([b @ a for a, b in factors], weights, merge, density, majority, rng), wanted)
    # A weight w goes in halves to both factors; its sign to one of them.
    roots = [float(np.sqrt(abs(w))) for w in weights]
    low = merged(
        [a for a, _ in factors], [r if w >= 0 else -r for r, w in zip(roots, weights)], merge, density, majority, rng
    )
    high = merged([b for _, b in factors], roots, merge, density, majority, rng)
    return low, high
