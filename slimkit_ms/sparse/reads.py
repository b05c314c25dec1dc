"""Seeing what is multiplied with a weight that no cell is called for: experts in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.sparse.experts import routed
from slimkit_ms.sparse.slots import WeightSlot

import mindspore as ms

Array = np.ndarray[Any, Any]
Seen = Callable[[str, Array, "Array | None"], None]

# Operators that multiply their first two arguments as matrices.
PRODUCTS = ("MatMul", "MatMulExt", "BatchMatMul", "BatchMatMulExt", "Dense", "Mm")

# Operators that gather rows: their first two arguments are the rows and which of them.
GATHERS = ("Gather", "GatherNd", "IndexSelect")

# Entries of each axis that are compared before whole matrices are.
SAMPLE = 16


class Reads(ms.MsDispatchMode):
    """Calls ``seen(name, rows, tokens)`` at each product with a watched weight, whatever Python code asks for it.

    An operator is handed copies of what was sliced, turned or cast, so that neither identity nor address shows where a
    factor comes from; its values do.

    Args:
        model: the cell.
        slots: layer -> slot of the weights to watch, each an expert of a parameter.
        seen: gets the layer, its rows (rows, n_in), and which tokens they are, if that is known.
        valid: which tokens of the batch are no padding; None when all count.
        transposed: called with a layer when its weight is read as (in, out) though its kind says (out, in), or the
            other way round; such reads are not passed on.
    """

    def __init__(
        self,
        model: Any,
        slots: Mapping[str, WeightSlot],
        seen: Seen,
        valid: Array | None = None,
        transposed: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._seen, self._transposed = seen, transposed
        self._valid = None if valid is None or bool(valid.all()) else valid
        self._picked: Array | None = None  # the tokens gathered last
        self._experts: dict[tuple[int, ...], list[_Expert]] = {}  # by shape
        for name, slot in slots.items():
            assert isinstance(slot.index, int)  # experts alone are read
            parameter = slot.parameter(model)
            self._experts.setdefault(tuple(parameter.shape[1:]), []).append(_Expert(name, slot, parameter, slot.index))
        self._known: dict[tuple[tuple[int, ...], Any], dict[bytes, list[_Expert]]] = {}

    def __ms_dispatch__(self, func: Any, args: Any, kwargs: Any = None) -> Any:
        """Look at an operator, then run it."""
        given = args[2] if len(args) == 3 and isinstance(args[1], str) else args  # older operators wrap theirs
        if func.name in PRODUCTS:
            self._product(func.name, given)
        elif func.name in GATHERS:
            picked = _rows_gathered(func.name, given)
            self._picked = self._picked if picked is None else picked
        return func(*args)

    def _product(self, name: str, given: Any) -> None:
        left, right = given[:2]
        turn = (False, True) if name == "Dense" else given[2:4] if name in ("MatMul", "BatchMatMul") else (False, False)
        if not self._look(left, turn[0], right, turn[1]):
            self._look(right, not turn[1], left, not turn[0])  # a weight may stand on either side

    def _look(self, x: ms.Tensor, turn_x: bool, weight: ms.Tensor, turn_weight: bool) -> bool:
        """Whether `weight` holds watched ones; what is multiplied with them is passed on."""
        rows: Array | None = None
        for kind in ("conv1d", "linear"):
            # As it lies in the parameter: (in, out) of a "conv1d", (out, in) of a "linear".
            flip = turn_weight == (kind == "conv1d")
            for where, expert in self._inside(weight, flip):
                if kind != expert.slot.kind:
                    self._transposed(expert.name)
                    continue
                if rows is None:
                    rows = _values(x).copy()
                    rows = np.swapaxes(rows, -1, -2) if turn_x and rows.ndim > 1 else rows
                self._seen(expert.name, *routed(_rows_of(rows, where, weight.shape), self._picked, self._valid))
        return rows is not None

    def _inside(self, operand: ms.Tensor, flip: bool) -> Iterator[tuple[tuple[int, ...], _Expert]]:
        """The experts that a factor (..., n, m) holds, and where; flip: the parameter holds its transposed."""
        shape = tuple(operand.shape[-2:])
        shape = shape[::-1] if flip else shape
        if shape not in self._experts or not operand.is_floating_point():
            return
        steps = [max(1, n // SAMPLE) for n in shape]
        known = self._samples(shape, operand.dtype, steps)
        high, wide = reversed(steps) if flip else steps
        some = _values(operand[..., ::high, ::wide])
        for where in np.ndindex(*operand.shape[:-2]):
            sample = some[where].T if flip else some[where]
            alike = known.get(sample.tobytes(), [])
            if len(alike) > 1 or not sample.any():  # experts that are equal through and through share their rows
                whole = _values(operand)[where]
                whole = whole.T if flip else whole
                alike = [e for e in alike if np.array_equal(_values(_cast(e.weight(), operand.dtype)), whole)]
            for expert in alike:
                yield where, expert

    def _samples(self, shape: tuple[int, ...], dtype: Any, steps: list[int]) -> dict[bytes, list[_Expert]]:
        """The experts of a shape by some of their entries, rounded as the operator rounds its factors."""
        if (shape, dtype) not in self._known:
            found: dict[bytes, list[_Expert]] = {}
            stacks = {id(expert.parameter): expert.parameter for expert in self._experts[shape]}
            some = {key: _values(_cast(p[:, :: steps[0], :: steps[1]], dtype)) for key, p in stacks.items()}
            for expert in self._experts[shape]:
                found.setdefault(some[id(expert.parameter)][expert.index].tobytes(), []).append(expert)
            self._known[shape, dtype] = found
        return self._known[shape, dtype]


@dataclass(frozen=True)
class _Expert:
    name: str
    slot: WeightSlot
    parameter: ms.Parameter
    index: int

    def weight(self) -> ms.Tensor:
        """Its weight, (in, out) or (out, in)."""
        return self.parameter[self.index]


def _cast(tensor: ms.Tensor, dtype: Any) -> ms.Tensor:
    # Casting to the same dtype is a launch like any other.
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def _values(tensor: ms.Tensor) -> Array:
    """A tensor's values in float32, maybe in its own memory."""
    values: Array = _cast(tensor, ms.float32).asnumpy()
    return values


def _rows_of(x: Array, where: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The rows that one of the matrices of a product is multiplied with.

    Args:
        x: (..., rows, in), broadcast against the matrices.
        where: which matrix.
        shape: of all matrices, (..., in, out).
    """
    x = x[None] if x.ndim == 1 else x
    batch = np.broadcast_shapes(x.shape[:-2], shape[:-2])
    x = np.broadcast_to(x, batch + x.shape[-2:])
    mine = [slice(None) if n == 1 else slice(i, i + 1) for i, n in zip(where, shape)]
    return x[(..., *mine, slice(None), slice(None))].reshape(-1, x.shape[-1])


def _rows_gathered(name: str, given: Any) -> Array | None:
    """Which rows of a matrix an operator gathers, each at most once; None for anything else."""
    if name not in GATHERS or len(given[0].shape) != 2:
        return None
    index, axis = (given[2], given[1]) if name == "IndexSelect" else (given[1], given[2] if name == "Gather" else 0)
    index = index.asnumpy()
    if name == "GatherNd" and index.ndim == 2 and index.shape[1] == 1:
        index = index[:, 0]
    if int(axis) != 0 or index.ndim != 1 or len(np.unique(index)) != len(index):
        return None
    return index
