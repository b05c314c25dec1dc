"""How much each channel, head or feature matters: a criterion's scores, gathered over everything coupled."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.prune.criteria import CRITERIA, Criterion, Evidence
from slimkit.core.prune.expressions import owners
from slimkit.core.prune.solve import View

Array = np.ndarray[Any, Any]


def scores(view: View, criterion: Criterion, evidence: Evidence, seed: int = 0) -> dict[str, Array]:
    """A score for each index of each variable; the least one goes first.

    Every weight that the index would take with it counts: rows of the layers that make a channel, columns of those that
    read it, and the norms between. A member's scores are means over its weights, so that a wide reader does not
    drown the maker.

    Args:
        view: the coupling.
        criterion: how weights are scored.
        evidence: what the criterion looks at.
        seed: of "random".

    Returns:
        variable -> float64 vector.

    Raises:
        ArgumentError: weights or calibration hold NaN or infinite values.
        UnsupportedError: bn_scale on a model in which no variable has a norm.
    """
    full = view.counts
    places: dict[str, list[tuple[str, int, str]]] = {}
    for variable in view.variables:
        for path, axis, role in variable.places:
            places.setdefault(path, []).append((variable.name, axis, role))
    # Sums over the weights show NaN and infinity by themselves; where nothing is summed, the weights are looked at.
    told = not criterion.needs and not criterion.whole_rows and bool(criterion.roles)
    for path in () if told else places:
        _demand_finite(path, view, places, evidence)
    if criterion is CRITERIA["random"]:
        rng = np.random.default_rng(seed)
        return {v.name: rng.random(v.size) for v in view.variables}
    gathered: dict[str, list[Array]] = {v.name: [] for v in view.variables}
    buffers = view.coupling.graph.buffers
    for path, uses in places.items():
        wanted = [(n, a) for n, a, role in uses if path not in buffers and criterion.counts(path, role)]
        axes = {a for _, a in wanted}
        vectors = criterion.vectors(path, axes, evidence) if wanted else None
        if told and (vectors is None or not _finite(vectors)):
            _demand_finite(path, view, places, evidence)
        if vectors is None:
            continue
        if not _finite(vectors):
            vectors = _in_float64(path, axes, criterion, evidence)
        shape = view.coupling.graph.shapes[path]
        weights = int(np.prod(shape))
        for name, axis in wanted:
            owner = owners(view.axes[path][axis], full, name)
            if owner is None:
                continue
            vector = vectors[axis]
            inside = owner >= 0
            total = np.bincount(owner[inside], weights=vector[inside], minlength=full[name])
            number = max(1, int(inside.sum()) // full[name])
            gathered[name].append(total / (1 if criterion.whole_rows else number * weights // shape[axis]))
    if criterion is CRITERIA["bn_scale"] and not any(gathered.values()):
        raise UnsupportedError("importance 'bn_scale' needs at least one normalised layer, and this model has none")
    # What nothing was scored for goes in its order.
    means = {v.name: np.mean(m, axis=0) if (m := gathered[v.name]) else np.ones(v.size) for v in view.variables}
    return {name: criterion.finish(score) for name, score in means.items()}


def _finite(vectors: dict[int, Array] | None) -> bool:
    return all(np.isfinite(v.sum()) for v in (vectors or {}).values())


def _demand_finite(path: str, view: View, places: dict[str, list[tuple[str, int, str]]], evidence: Evidence) -> None:
    """Refuse to choose among weights of which some are no numbers."""
    roles = {role for _, _, role in places[path]}
    if path in view.coupling.graph.buffers and not roles & {"norm", "layer_norm", "group_norm"}:
        return  # masks may well hold infinity
    values = evidence.weights(path)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ArgumentError(
            f"network must hold finite weights to be pruned: {bad} of {values.size} values of {path!r} are NaN or "
            "infinite"
        )


def _in_float64(path: str, axes: set[int], criterion: Criterion, evidence: Evidence) -> dict[int, Array]:
    """Scores that float32 could not hold; refuses those that are not finite for another reason."""
    wide = Evidence(
        lambda p: np.asarray(evidence.weights(p), dtype=np.float64),
        evidence.rows,
        {p: np.asarray(g, dtype=np.float64) for p, g in evidence.gradients.items() if p == path},
        evidence.activations,
    )
    vectors = criterion.vectors(path, axes, wide)
    if vectors is None or not _finite(vectors):
        what = f"the data's {criterion.needs}" if criterion.needs else f"the criterion {criterion.name!r}"
        raise ArgumentError(f"{what} gives scores of {path!r} that are NaN or infinite")
    return vectors


def best(score: Array, number: int) -> Array:
    """The `number` indices with the highest scores, ascending; of equal ones the first.

    Example:
        >>> best(np.array([1.0, 3.0, 3.0, 3.0]), 2).tolist()
        [1, 2]
    """
    return np.sort(np.argsort(-score, kind="stable")[:number])
