"""Least-squares repair of a cut layer from second moments: kept weights learn to say what dropped ones said."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np

from slimkit.core.log import progress
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.signals import demand_finite

Array = np.ndarray[Any, Any]

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 8  # one row in so many is held out to choose among them
NARROW = 256
SAME = 1e-2  # a disturbance that arrives changed by less than this share was only added to something
MAX_INPUTS = 6000  # second moments of more inputs than this do not fit beside a model


class RepairStage(Protocol):
    """A part of a model, before and after the cut, through which calibration data can be sent again and again.

    Attributes:
        layers: those of the layers to refit that are in it, in the order they run.
    """

    layers: list[str]

    @abstractmethod
    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        """For each call of a layer on each batch: its inputs after the cut (n, n_in), its outputs before (n, all)."""


class Repair(Protocol):
    """What compensation asks of a framework: one model before the cut, and the same one after it."""

    @abstractmethod
    def unsuited(self, path: str) -> str | None:
        """Why a layer is left alone, or None."""

    @abstractmethod
    def made_axis(self, path: str) -> int:
        """Which axis of a layer's weight lists its outputs."""

    @abstractmethod
    def values(self, path: str) -> tuple[Array, Array | None]:
        """Weight (n_out, n_in) and bias (n_out,) of a layer after the cut, float64."""

    @abstractmethod
    def stages(self, layers: Sequence[str], behind: Collection[str]) -> Iterator[RepairStage]:
        """The parts of the model, first to last; each is done with before the next is asked for.

        A part that is a block of a chain holds only the layers behind the cut: what its other layers are given is
        nearly what they were given before.
        """

    @abstractmethod
    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        """Put weight and bias into the cut model's layer, in place."""


def repair(models: Repair, layers: Sequence[str], plan: PrunePlan, damping: float | None) -> dict[str, Any]:
    """Refit the layers of a cut model to the outputs of their originals, in place, one after another as they run.

    A layer is fitted on what the layers before it now hand over. Norms keep their statistics: refitted layers make
    what their originals made, so that the statistics go on being those of the inputs.

    Args:
        models: the model before and after the cut.
        layers: paths in the order they run.
        plan: the cut.
        damping: see `refit`; None chooses each layer's on rows that the others were fitted without.

    Returns:
        {"refitted": layer -> rows of calibration data it saw, "left": layers that were left alone -> why}.

    Raises:
        ArgumentError: calibration gives a layer infinity or NaN.
    """
    report: dict[str, Any] = {"refitted": {}, "left": {}}
    suited = []
    for path in layers:
        why = models.unsuited(path)
        if why is None and models.values(path)[0].shape[1] > MAX_INPUTS:
            why = f"more than {MAX_INPUTS} inputs"
        if why is None:
            suited.append(path)
        else:
            report["left"][path] = why
    filled, zeros = plan.filled(), plan.zeros()
    behind = {path for path in suited if _is_behind(models, path, plan, filled)}
    bar = iter(progress(suited, "layers"))
    for stage in models.stages(suited, behind):
        for path in stage.layers:
            while next(bar, path) != path:
                pass  # a layer that its stage leaves as it is
            weight, bias = models.values(path)
            name, axis = f"{path}.weight", models.made_axis(path)
            kept = filled.get(name, [None, None])[axis]
            gone = zeros.get(name)
            part = None
            if gone is not None:
                part = _Filled(weight, gone[axis], gone[1 - axis], plan.sizes()[name][1 - axis])
                weight, bias = part.of(weight, bias)
            some, held_out = (RefitMoments(weight.shape[1], weight.shape[0], bias is not None) for _ in range(2))
            # Closed also after an error: while it is open, parts of the model do not run.
            with closing(stage.calls(path)) as calls:
                for given, wanted in calls:
                    given = given if part is None else part.inputs(given)
                    wanted = wanted if kept is None else wanted[:, kept]
                    # The last rows of each batch are held out where the damping is to be chosen.
                    held = len(given) // HELD_OUT if damping is None else 0
                    some.add(given[: len(given) - held], wanted[: len(given) - held])
                    held_out.add(given[len(given) - held :], wanted[len(given) - held :])
            for moments in (some, held_out):
                demand_finite(path, moments.inputs, moments.outputs)
            fitted = _fitted(some, held_out, weight, bias, damping)
            models.write(path, *(fitted if part is None else part.back(*fitted)))
            report["refitted"][path] = some.number + held_out.number
    next(bar, None)
    return report


def parted(
    layers: Sequence[str], blocks: Sequence[str], behind: Collection[str]
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The layers to refit: those before the first block, those in each block, and those that run behind each block and
    are in none.

    Args:
        layers: paths in the order they run.
        blocks: the blocks' paths.
        behind: the layers behind the cut; of those in a block, and between two, no others are refitted.

    Example:
        >>> parted(["stem", "h.0.up", "h.1.up", "head"], ["h.0", "h.1"], ["h.1.up"])
        (['stem'], [[], ['h.1.up']], [[], ['head']])
    """
    before: list[str] = []
    inside: list[list[str]] = [[] for _ in blocks]
    after: list[list[str]] = [[] for _ in blocks]
    last = -1
    for path in layers:
        place = next((k for k, block in enumerate(blocks) if path.startswith(f"{block}.")), None)
        if place is None:
            (before if last < 0 else after[last]).append(path)
        else:
            inside[place].append(path)
            last = max(last, place)
    for own in (*inside, *after[: max(last, 0)]):
        own[:] = [path for path in own if path in behind]
    return before, inside, after


class _Filled:
    """The part of a layer that is no padding: zeros that a padded plan leaves are not refitted.

    Args:
        weight: (n_out, n_in) after the cut.
        rows: places of outputs that hold zeros, or None.
        columns: the same of input indices.
        n_index: input indices, each of n_in / n_index columns.
    """

    def __init__(self, weight: Array, rows: Array | None, columns: Array | None, n_index: int) -> None:
        self._shape = weight.shape
        self._rows = np.ones(weight.shape[0], dtype=bool)
        self._columns = np.ones(n_index, dtype=bool)
        if rows is not None:
            self._rows[rows] = False
        if columns is not None:
            self._columns[columns] = False
        self._columns = np.repeat(self._columns, weight.shape[1] // n_index)

    def of(self, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
        """Weight and bias without their zeros."""
        return weight[self._rows][:, self._columns], None if bias is None else bias[self._rows]

    def inputs(self, rows: Array) -> Array:
        """Rows of inputs (n, n_in) without what meets zeros."""
        return rows if self._columns.all() else rows[:, self._columns]

    def back(self, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
        """Weight and bias among their zeros again."""
        wide = np.zeros(self._shape)
        wide[np.ix_(self._rows, self._columns)] = weight
        long = None if bias is None else np.zeros(self._shape[0])
        if long is not None:
            long[self._rows] = bias
        return wide, long


def _is_behind(models: Repair, path: str, plan: PrunePlan, filled: Mapping[str, Any]) -> bool:
    """Whether a layer lost some of its inputs."""
    kept = filled.get(f"{path}.weight")
    index = None if kept is None else kept[1 - models.made_axis(path)]
    return index is not None and len(index) < plan.shapes[f"{path}.weight"][1 - models.made_axis(path)]


def _fitted(
    some: RefitMoments, held: RefitMoments, weight: Array, bias: Array | None, damping: float | None
) -> tuple[Array, Array | None]:
    """The refit, and where no damping is given, the one that says best what the rows held out said.

    Where no refit says it better than the cut weights do, these stay.
    """
    if damping is not None or not held.number:
        return refit(some, weight, bias, 0.01 if damping is None else damping)
    chosen = min(
        (None, *DAMPINGS), key=lambda d: held.miss(*((weight, bias) if d is None else refit(some, weight, bias, d)))
    )
    return (weight, bias) if chosen is None else refit(some + held, weight, bias, chosen)


class RefitMoments:
    """Sums of products of a layer's inputs after the cut with themselves and with the outputs wanted.

    Args:
        n_in: number of inputs after the cut, without the constant one.
        n_out: number of outputs.
        bias: whether a constant input stands for the bias.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        self.bias = bias
        self.inputs = np.zeros((n_in + bias, n_in + bias))
        self.outputs = np.zeros((n_out, n_in + bias))
        self.number = 0

    def add(self, x: Array, y: Array) -> None:
        """Add rows of inputs (n, n_in) and of wanted outputs (n, n_out)."""
        # Sums of one batch in float32 where float64 would take twice the time; it shows in no figure.
        kind = np.float64 if x.shape[1] <= NARROW else np.float32
        x = np.asarray(x, dtype=kind)
        if self.bias:
            x = np.concatenate([x, np.ones((len(x), 1), dtype=kind)], axis=1)
        self.inputs += x.T @ x
        self.outputs += np.asarray(y, dtype=kind).T @ x
        self.number += len(x)

    def __add__(self, other: RefitMoments) -> RefitMoments:
        total = RefitMoments(len(self.inputs) - self.bias, len(self.outputs), self.bias)
        total.inputs, total.outputs = self.inputs + other.inputs, self.outputs + other.outputs
        total.number = self.number + other.number
        return total

    def miss(self, weight: Array, bias: Array | None) -> float:
        """Sum of the squares by which a layer misses the wanted outputs, less what none could help."""
        if self.bias:
            assert bias is not None
            weight = np.concatenate([weight, bias[:, None]], axis=1)
        return float(np.sum((weight @ self.inputs - 2 * self.outputs) * weight))


def refit(moments: RefitMoments, weight: Array, bias: Array | None, damping: float) -> tuple[Array, Array | None]:
    """The weights nearest to the cut ones whose outputs are nearest to the wanted ones (ridge regression).

    Minimises |Y - W X|^2 + damping * mean diagonal * |W - weight|^2, the objective of FLAP's bias and SlimGPT's weight
    compensation (An et al. 2024, sec. 3.3; Ling et al. 2024, sec. 3.2) with the cut network's own inputs as X.

    Args:
        moments: sums over the calibration data.
        weight: (n_out, n_in) after the cut.
        bias: (n_out,) or None.
        damping: strength of the pull towards the cut weights, relative to the inputs' mean square.

    Returns:
        (weight, bias).

    Example:
        >>> m = RefitMoments(1, 1, bias=False); m.add(np.array([[1.0], [2.0]]), np.array([[3.0], [6.0]]))
        >>> refit(m, np.array([[0.0]]), None, 1e-9)[0].round(6).tolist()
        [[3.0]]
    """
    start = np.asarray(weight, dtype=np.float64)
    if moments.bias:
        start = np.concatenate([start, np.asarray(bias, dtype=np.float64)[:, None]], axis=1)
    gram = moments.inputs.copy()
    ridge = damping * max(float(np.trace(gram)) / len(gram), 1e-300)
    gram[np.diag_indices_from(gram)] += ridge
    wrong = moments.outputs - start @ moments.inputs  # (n_out, n_in) what the cut weights leave unexplained
    found = start + np.linalg.solve(gram, wrong.T).T
    if moments.bias:
        return found[:, :-1], found[:, -1]
    return found, None
