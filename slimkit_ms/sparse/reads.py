"""Seeing what is multiplied with a weight that no cell is called for: experts in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from slimkit.core.sparse.experts import routed
from slimkit_ms import bridge
from slimkit_ms.sparse.slots import Slot

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

    An operator is handed copies of what was sliced, turned or cast, so that neither identity nor address tells where a
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
        slots: Mapping[str, Slot],
        seen: Seen,
        valid: Array | None = None,
        transposed: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._seen, self._transposed = seen, transposed
        self._valid = None if valid is None or bool(valid.all()) else valid
        self._picked: Array | None = None  # the tokens gathered last
        found: dict[int, tuple[ms.Parameter, dict[int, tuple[str, Slot]]]] = {}
        for name, slot in slots.items():
            parameter = slot.parameter(model)
            assert isinstance(slot.index, int)  # experts alone are read
            found.setdefault(id(parameter), (parameter, {}))[1][slot.index] = name, slot
        self._stacks = [_Stack(parameter, places) for parameter, places in found.values()]

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
        for stack in self._stacks:
            for where, name, slot, kind in stack.inside(weight, turn_weight):
                if kind != slot.kind:
                    self._transposed(name)
                    continue
                if rows is None:
                    rows = bridge.as_numpy(x.astype(ms.float32))
                    assert rows is not None
                    rows = np.swapaxes(rows, -1, -2) if turn_x and rows.ndim > 1 else rows
                self._seen(name, *routed(_rows_of(rows, where, weight.shape), self._picked, self._valid))
        return rows is not None


class _Stack:
    """The experts of one parameter, known by their values."""

    def __init__(self, parameter: ms.Parameter, places: Mapping[int, tuple[str, Slot]]) -> None:
        self._parameter, self._places = parameter, places
        self._shape = tuple(parameter.shape[1:])
        self._samples: dict[Any, Array] = {}

    def inside(self, operand: ms.Tensor, turned: bool) -> Iterator[tuple[tuple[int, ...], str, Slot, str]]:
        """The experts that an operand of a product holds, where, and how each lies in the parameter.

        Args:
            operand: (..., in, out), or (..., out, in) when turned.
            turned: whether the operator turns it.
        """
        if operand.dtype not in (ms.float32, ms.float16, ms.bfloat16, ms.float64):
            return
        for kind in ("conv1d", "linear"):
            # As it lies in the parameter: (in, out) of a "conv1d", (out, in) of a "linear".
            flip = turned == (kind == "conv1d")
            size = tuple(operand.shape[-2:])
            if (size[::-1] if flip else size) != self._shape:
                continue
            yield from self._matching(operand, flip, kind)

    def _matching(self, operand: ms.Tensor, flip: bool, kind: str) -> Iterator[tuple[tuple[int, ...], str, Slot, str]]:
        steps = [max(1, n // SAMPLE) for n in self._shape]
        own = self._sample(operand.dtype, steps)
        high, wide = reversed(steps) if flip else steps
        some = _values(operand[..., ::high, ::wide])
        for where in np.ndindex(*operand.shape[:-2]):
            sample = some[where].T if flip else some[where]
            alike = [i for i in self._places if np.array_equal(own[i], sample)]
            if len(alike) > 1 or not sample.any():  # experts that are equal through and through share their rows
                whole = _values(operand)[where]
                whole = whole.T if flip else whole
                alike = [i for i in alike if np.array_equal(_values(self._parameter[i].astype(operand.dtype)), whole)]
            for i in alike:
                yield where, *self._places[i], kind

    def _sample(self, dtype: Any, steps: list[int]) -> Array:
        """Some entries of every expert, rounded as the operator rounds its factors."""
        if dtype not in self._samples:
            self._samples[dtype] = _values(self._parameter[:, :: steps[0], :: steps[1]].astype(dtype))
        return self._samples[dtype]


def _values(tensor: ms.Tensor) -> Array:
    values: Array = tensor.astype(ms.float32).asnumpy()  # only looked at: no copy is needed
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
