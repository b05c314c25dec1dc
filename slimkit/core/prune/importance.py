"""How much each channel, head or feature matters: scores of single weights, gathered over everything coupled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slimkit.core.errors import UnsupportedError
from slimkit.core.prune.solve import View, owners

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]
Function = Callable[[Array], float]

# name -> what it needs from calibration data: "" nothing, "gradient", "square" (mean squared gradient), "activation".
NAMES = {
    "l1": "",
    "l2": "",
    "bn_scale": "",
    "lamp": "",
    "random": "",
    "taylor": "gradient",
    "hessian": "square",
    "activation": "activation",
}
_CHUNK = 1 << 18


def _abs(w: Array, g: Array | None) -> Array:
    return np.abs(w)


def _square(w: Array, g: Array | None) -> Array:
    return w * w


def _taylor(w: Array, g: Array | None) -> Array:
    assert g is not None
    return np.abs(w * g)


def _obd(w: Array, g: Array | None) -> Array:
    assert g is not None
    return w * w * g


_ELEMENT = {"l1": _abs, "l2": _square, "lamp": _square, "taylor": _taylor, "hessian": _obd, "activation": _abs}


def axis_sums(weight: Array, axes: set[int], element: Callable[..., Array], gradient: Array | None) -> dict[int, Array]:
    """Sum the scores of single weights over all axes but one, for several axes in one pass over the weight.

    Args:
        weight: any shape.
        axes: the axes to keep, one result each.
        element: (weights, gradients) -> score of each.
        gradient: of the weight's shape, or None.

    Returns:
        axis -> float64 vector of that axis's length.

    Example:
        >>> axis_sums(np.ones((2, 3)), {0, 1}, _abs, None)[0].tolist()
        [3.0, 3.0]
    """
    out = {axis: np.zeros(weight.shape[axis]) for axis in axes}
    if not weight.size:
        return out
    # Pieces that fit the cache: no temporary of the weight's size, and every axis is served by one read.
    rows = max(1, _CHUNK // max(1, weight[0].size if weight.ndim else 1))
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows]
        score = element(piece, None if gradient is None else gradient[start : start + rows])
        flat = score.reshape(score.shape[0], score.shape[1] if score.ndim > 1 else 1, -1)
        plane = flat.sum(axis=2) if flat.shape[2] > 1 else flat[:, :, 0]
        for axis in axes:
            if axis == 0:
                out[0][start : start + rows] = plane.sum(axis=1)
            elif axis == 1:
                out[1] += plane.sum(axis=0)
            else:
                out[axis] += score.sum(axis=tuple(k for k in range(score.ndim) if k != axis))
    return out


def scores(
    view: View,
    read: Read,
    method: str | Function,
    *,
    gradients: Mapping[str, Array] | None = None,
    activations: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """A score for each index of each variable; the least one goes first.

    Every weight that the index would take with it counts: rows of the layers that make a channel, columns of those that
    read it, and the norms between. A member's scores are means over its weights, so that a wide reader does not
    drown the maker.

    Args:
        view: the coupling.
        read: path -> weights as NumPy.
        method: a name from NAMES, or a function of one output channel's weights.
        gradients: for taylor the mean gradient, for hessian the mean squared gradient, by path.
        activations: for activation, layer path -> mean absolute output of each channel.
        seed: of "random".

    Returns:
        variable -> float64 vector.

    Raises:
        UnsupportedError: bn_scale on a model in which no variable has a norm.
    """
    full = view.counts
    if method == "random":
        rng = np.random.default_rng(seed)
        return {v.name: rng.random(v.size) for v in view.variables}
    gathered: dict[str, list[Array]] = {v.name: [] for v in view.variables}
    by_path: dict[str, list[tuple[str, int, str]]] = {}
    for variable in view.variables:
        for path, axis, role in variable.places:
            by_path.setdefault(path, []).append((variable.name, axis, role))
    for path, places in by_path.items():
        wanted = [(n, a) for n, a, role in places if _counts(role, method, path, view)]
        if not wanted:
            continue
        axes = {a for _, a in wanted}
        vectors = _vectors(path, axes, read, method, gradients, activations)
        if vectors is None:
            continue
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
            gathered[name].append(total / (1 if callable(method) else number * weights // shape[axis]))
    out = {}
    for variable in view.variables:
        members = gathered[variable.name]
        if not members:
            if method == "bn_scale":
                members = []
            out[variable.name] = np.ones(variable.size)
            continue
        out[variable.name] = np.mean(members, axis=0)
    if method == "bn_scale" and not any(gathered.values()):
        raise UnsupportedError("importance 'bn_scale' needs at least one normalised layer, and this model has none")
    if method == "lamp":
        out = {name: lamp(s) for name, s in out.items()}
    return out


def _counts(role: str, method: str | Function, path: str, view: View) -> bool:
    if path in view.coupling.graph.buffers:
        return False
    if method == "bn_scale":
        return role in ("norm", "layer_norm") and path.rpartition(".")[2] in ("weight", "gamma")
    if callable(method) or method == "activation":
        return role == "out"
    return role in ("out", "in", "norm", "layer_norm") if method in ("taylor", "hessian") else role in ("out", "in")


def _vectors(
    path: str,
    axes: set[int],
    read: Read,
    method: str | Function,
    gradients: Mapping[str, Array] | None,
    activations: Mapping[str, Array] | None,
) -> dict[int, Array] | None:
    if method == "activation":
        found = (activations or {}).get(path.rpartition(".")[0])
        return None if found is None else dict.fromkeys(axes, found)
    weight = read(path)
    if callable(method):
        return {a: np.array([float(method(row)) for row in np.moveaxis(weight, a, 0)]) for a in axes}
    if method == "bn_scale":
        return {axis: np.abs(weight).astype(np.float64) for axis in axes}
    if gradients is not None and path not in gradients:
        return None
    return axis_sums(weight, axes, _ELEMENT[method], None if gradients is None else gradients[path])


def lamp(score: Array) -> Array:
    """Each score over the sum of those at least as large (Lee et al. 2021, LAMP, sec. 3), so that layers compare.

    Example:
        >>> lamp(np.array([1.0, 3.0])).tolist()
        [0.25, 1.0]
    """
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    above = np.cumsum(ranked[::-1])[::-1]
    out = np.empty_like(ranked)
    out[order] = ranked / np.maximum(above, np.finfo(np.float64).tiny)
    return out


def best(score: Array, number: int) -> Array:
    """The `number` indices with the highest scores, ascending; of equal ones the first.

    Example:
        >>> best(np.array([1.0, 3.0, 3.0, 3.0]), 2).tolist()
        [1, 2]
    """
    return np.sort(np.argsort(-score, kind="stable")[:number])
