"""The criteria by which channels, heads and features are scored: one row each in `CRITERIA`; users can write more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimkit.core.errors import ArgumentError
from slimkit.core.lazy import LateModule
from slimkit.core.log import logger
from slimkit.core.showing import Shown

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
else:
    np = LateModule("numpy")  # the help of `slimkit prune` lists the criteria, and needs no numbers

# What a criterion may ask of calibration data.
NEEDS = ("", "gradient", "square", "activation", "signal")


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Args:
        weights: path -> a parameter's values, not to be written to.
        rows: (path, axis) -> the parameter's slices along an axis, as tensors of the framework, free to be written to.
        gradients: path -> mean gradient, or mean squared gradient, as the criterion needs; empty if it needs neither.
        activations: layer -> mean absolute output of each channel; empty unless the criterion needs it.
    """

    weights: Callable[[str], Array]
    rows: Callable[[str, int], Iterable[Any]]
    gradients: Mapping[str, Array]
    activations: Mapping[str, Array]


class Criterion(Shown):
    """One way to score what may be pruned; the lowest scores go first.

    To write one, give the score of each single weight; scores are gathered over every weight that an index would take
    with it, as means over each parameter's share.

    Attributes:
        name: for the plan and its report.
        needs: what `calibration=` must yield: "" nothing, "gradient" the mean gradient, "square" its mean square,
            "activation" the mean absolute outputs of layers, "signal" what layers are given and how much the loss
            depends on what they say.
        roles: which uses of a parameter's axis count: "out" (makes the channel), "in" (reads it), "norm", "layer_norm".
        comparable: whether scores of different layers compare as they are; otherwise a global allocation divides each
            layer's by their mean.

    Example:
        >>> class Power(Criterion):
        ...     name = "power"
        ...     def elements(self, weight, gradient):
        ...         return np.abs(weight) ** 3
        >>> Power().elements(np.array([2.0]), None).tolist()
        [8.0]
    """

    name = "criterion"
    needs = ""
    roles: tuple[str, ...] = ("out", "in")
    comparable = False
    whole_rows = False  # scores are of whole slices rather than sums over their weights

    def _rows(self) -> Iterable[tuple[str, Any]]:
        yield from (("name", self.name), ("needs", self.needs or "nothing"), ("roles", ", ".join(self.roles)))

    def elements(self, weight: Array, gradient: Array | None) -> Array:
        """The score of each weight.

        Args:
            weight: any shape; a piece of a parameter, not to be written to.
            gradient: of the same shape, as `needs` says; None if it needs none.

        Returns:
            Scores of the same shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define elements(weight, gradient)")

    def finish(self, scores: Array) -> Array:
        """One variable's scores after gathering, (size,) -> (size,)."""
        return scores

    def counts(self, path: str, role: str) -> bool:
        """Whether a use of a parameter counts."""
        return role in self.roles

    def vectors(self, path: str, axes: set[int], evidence: Evidence) -> dict[int, Array] | None:
        """Scores summed over all axes but one, for each of several axes; None where nothing is known of it."""
        gradient = None
        if self.needs:
            if path not in evidence.gradients:
                return None
            gradient = evidence.gradients[path]
        return axis_sums(evidence.weights(path), axes, self.elements, gradient)


class L1(Criterion):
    """Mean |w|."""

    name = "l1"

    def elements(self, weight: Array, gradient: Array | None) -> Array:
        return np.abs(weight)


class L2(Criterion):
    """Mean w^2."""

    name = "l2"

    def elements(self, weight: Array, gradient: Array | None) -> Array:
        return weight * weight


class Lamp(L2):
    """w^2 over the sum of those at least as large (Lee et al. 2021, LAMP, sec. 3), so that layers compare."""

    name = "lamp"
    comparable = True

    def finish(self, scores: Array) -> Array:
        return lamp(scores)


class BatchNormScale(L1):
    """|gamma| of the norms behind a layer (Liu et al. 2017, Network Slimming, sec. 3)."""

    name = "bn_scale"
    roles = ("norm", "layer_norm")

    def counts(self, path: str, role: str) -> bool:
        return role in self.roles and path.rpartition(".")[2] in ("weight", "gamma")


class Taylor(Criterion):
    """|w g|, the first-order change of the loss (Molchanov et al. 2019, sec. 3.1)."""

    name, needs, roles = "taylor", "gradient", ("out", "in", "norm", "layer_norm")

    def elements(self, weight: Array, gradient: Array | None) -> Array:
        assert gradient is not None
        return np.abs(weight * gradient)


class Hessian(Criterion):
    """w^2 E[g^2], the second-order change by the Fisher diagonal (LeCun et al. 1990, Optimal Brain Damage, sec. 2)."""

    name, needs, roles = "hessian", "square", ("out", "in", "norm", "layer_norm")

    def elements(self, weight: Array, gradient: Array | None) -> Array:
        assert gradient is not None
        return weight * weight * gradient


class Activation(Criterion):
    """Mean |output| of each channel of the layers that make it."""

    name, needs, roles = "activation", "activation", ("out",)

    def vectors(self, path: str, axes: set[int], evidence: Evidence) -> dict[int, Array] | None:
        found = evidence.activations.get(path.rpartition(".")[0])
        return None if found is None else dict.fromkeys(axes, found)


class OutputLoss(Criterion):
    """The loss that the model takes as the layers that read an index lose it (`elimination`).

    Scores are that loss, in the order in which the indices go; so one order serves all budgets, and what one layer
    loses compares with what another does.
    """

    name, needs, roles, comparable = "output", "signal", ("in",), True


class Auto(L1):
    """`output` for a language model with calibration data; |w| for anything else."""

    name = "auto"


class Random(Criterion):
    """Chance, for comparisons; `seed=` chooses it."""

    name, roles = "random", ()


class OfRows(Criterion):
    """A user's function of one output channel's weights.

    Args:
        function: maps a slice without the output axis, a tensor of the framework, to a number. One that only takes
            NumPy arrays is given those.
    """

    roles = ("out",)
    whole_rows = True

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "function")
        self._as_numpy = False

    def vectors(self, path: str, axes: set[int], evidence: Evidence) -> dict[int, Array] | None:
        return {axis: self._scores(path, axis, evidence) for axis in axes}

    def _scores(self, path: str, axis: int, evidence: Evidence) -> Array:
        arrays = np.moveaxis(evidence.weights(path), axis, 0)
        out = np.empty(len(arrays))
        for place, row in enumerate(evidence.rows(path, axis)):
            out[place] = self._score(path, row, arrays[place])
        return out

    def _score(self, path: str, row: Any, array: Array) -> float:
        try:
            value = self.function(array.copy() if self._as_numpy else row)
        except Exception as error:
            if self._as_numpy or not self._takes_numpy(array):
                layer = path.rpartition(".")[0] or path
                raise ArgumentError(
                    f"the importance function {self.name!r} failed on a channel of {layer!r} (weights of shape "
                    f"{list(array.shape)}): {type(error).__name__}: {error}"
                ) from error
            self._as_numpy = True
            value = self.function(array.copy())
        number = _number(value)
        if number is None or not np.isfinite(number):
            raise ArgumentError(
                f"the importance function {self.name!r} must return a finite number for each channel. Received for "
                f"one of {path.rpartition('.')[0] or path!r}: {value!r}"
            )
        return number

    def _takes_numpy(self, array: Array) -> bool:
        try:
            self.function(array.copy())
        except Exception:  # noqa: BLE001  (the first error says more)
            return False
        logger.info("the importance function %r takes NumPy arrays only; it is given those", self.name)
        return True


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


# One row a criterion: a subclass of Criterion above, and its name here.
CRITERIA: dict[str, Criterion] = {
    "auto": Auto(),
    "output": OutputLoss(),
    "l1": L1(),
    "l2": L2(),
    "bn_scale": BatchNormScale(),
    "taylor": Taylor(),
    "hessian": Hessian(),
    "activation": Activation(),
    "lamp": Lamp(),
    "random": Random(),
}

_CHUNK = 1 << 18


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
        >>> axis_sums(np.ones((2, 3)), {0, 1}, L1().elements, None)[0].tolist()
        [3.0, 3.0]
    """
    out = {axis: np.zeros(weight.shape[axis]) for axis in axes}
    if not weight.size:
        return out
    # Pieces that fit the cache: no temporary of the weight's size, and every axis is served by one read.
    rows = max(1, _CHUNK // max(1, weight[0].size if weight.ndim else 1))
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and reported afterwards
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


def lamp(score: Array) -> Array:
    """Each score over the sum of those at least as large.

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
