"""What the sparsity walk asks of a MindSpore cell; its arrays are NumPy's, for MindSpore has no triangular solve."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit.core.sparse.layer import Layer
from slimkit.core.sparse.processes import agreed
from slimkit.core.sparse.walk import Stage
from slimkit_ms import bridge
from slimkit_ms.sparse.stages import CellStage, last_two, trace, watching

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


class MindSporeHost:
    """A MindSpore cell behind the face that slimkit.core.sparse.compress asks for."""

    def __init__(self, model: nn.Cell) -> None:
        self.model = model
        self.keeps_masks = True

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, Layer], dict[str, str]]:
        """Every Dense and Conv2d by name, and those that cannot be sparse with the reason."""
        found: dict[str, Layer] = {}
        skipped: dict[str, str] = {}
        owner: dict[int, str] = {}
        tables = {id(c.embedding_table) for _, c in self.model.cells_and_names() if isinstance(c, nn.Embedding)}
        for name, cell in self.model.cells_and_names():
            kind = kind_of(cell)
            if kind is None:
                continue
            weight = cell.weight
            if not weight.is_floating_point():
                skipped[name] = f"its weight is {weight.dtype}, which has no linear algebra"
            elif id(weight) in tables:
                skipped[name] = "its weight is tied to an embedding"
            elif id(weight) in owner:
                # Two cells on one parameter would need the inputs of both; rare in MindSpore, so left whole.
                skipped[name] = f"its weight is shared with {owner[id(weight)]!r}"
            else:
                owner[id(weight)] = name
                found[name] = _describe(name, kind, cell)
        for name in [r.split("'")[1] for r in skipped.values() if r.startswith("its weight is shared")]:
            if found.pop(name, None) is not None:
                skipped[name] = "its weight is shared with another cell"
        return found, skipped

    def weight(self, name: str) -> Array:
        """The layer's weight in float32."""
        return bridge.as_numpy(bridge.get_module(self.model, name).weight.astype(ms.float32))

    def store(self, name: str, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place and shift the bias, in the parameters' own dtype."""
        cell = bridge.get_module(self.model, name)
        cell.weight.set_data(ms.Tensor(np.ascontiguousarray(weight, dtype=np.float32)).astype(cell.weight.dtype))
        if bias_shift is not None:
            bias = bridge.as_numpy(cell.bias.astype(ms.float32)) + bias_shift
            cell.bias.set_data(ms.Tensor(bias.astype(np.float32)).astype(cell.bias.dtype))

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Nothing to do: the report is made at the end."""

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember weights and biases; the function returned puts them back."""
        kept = []
        for name in names:
            cell = bridge.get_module(self.model, name)
            for parameter in (cell.weight, cell.bias if cell.has_bias else None):
                if parameter is not None:
                    kept.append((parameter, parameter.value().copy()))

        def restore() -> None:
            for parameter, value in kept:
                parameter.set_data(value)

        return restore

    def stages(self, dataset: Iterable[Any], names: Sequence[str], paired: bool) -> Iterator[Stage]:
        """The whole cell as one stage; its layers in the order they are called."""
        cells = {name: bridge.get_module(self.model, name) for name in names}
        dense = copy.deepcopy(self.model) if paired else None
        calls = trace(self.model, dataset, cells)
        yield CellStage(self.model, dense, dataset, names, agreed(self, calls.feeds), calls)

    def outputs(self, batch: Any) -> Array:
        """The cell's first output for a batch, as a float32 NumPy array."""
        with watching(self.model, {}):
            output = bridge.run(self.model, batch)
        output = output[0] if isinstance(output, (tuple, list)) else output
        return bridge.as_numpy(output.astype(ms.float32))

    def processes(self) -> int:
        """How many processes of mindspore.communication share the calibration data."""
        from mindspore.communication import GlobalComm, get_group_size

        return get_group_size() if GlobalComm.INITED else 1

    def rank(self) -> int:
        """The number of this process of mindspore.communication, from 0."""
        from mindspore.communication import get_rank

        return get_rank() if self.processes() > 1 else 0

    def gather(self, value: Any) -> list[Any]:
        """A plain JSON value of every process of mindspore.communication, by its number."""
        n, rank = self.processes(), self.rank()
        if n < 2:
            return [value]
        text = json.dumps(value).encode()
        sizes = np.zeros(n, np.float32)
        sizes[rank] = len(text)
        sizes = _all_reduce(sizes).astype(np.int64)
        table = np.zeros((n, int(sizes.max())), np.float32)  # bytes, exact in any dtype
        table[rank, : len(text)] = np.frombuffer(text, np.uint8)
        table = _all_reduce(table).astype(np.uint8)
        return [json.loads(bytes(row[:size])) for row, size in zip(table, sizes)]

    def reduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Sums over all processes of mindspore.communication, when it runs."""
        n = self.processes()
        if n < 2:
            return list(arrays)
        totals = []
        for array in arrays:
            if array.dtype == np.float32:
                totals.append(_all_reduce(array))
                continue
            # AllReduce knows no float64: each process sends two halves of every number to a place of its own.
            parts = np.zeros((n, 2, *array.shape), np.float32)
            parts[self.rank(), 0] = array
            parts[self.rank(), 1] = array - parts[self.rank(), 0]
            totals.append(_all_reduce(parts).sum((0, 1), dtype=np.float64))
        return totals


def _all_reduce(values: Array) -> Array:
    from mindspore import ops

    total: Array = bridge.as_numpy(ops.AllReduce()(ms.Tensor(np.ascontiguousarray(values, np.float32))))
    return total


def kind_of(cell: nn.Cell) -> str | None:
    """The core's word for a cell that can be sparse, or None."""
    if isinstance(cell, nn.Dense):
        return "linear"
    return "conv2d" if isinstance(cell, nn.Conv2d) else None


def _describe(name: str, kind: str, cell: nn.Cell) -> Layer:
    shape, has_bias = tuple(cell.weight.shape), bool(cell.has_bias)
    if kind == "linear":
        return Layer(name, kind, shape, has_bias=has_bias)
    return Layer(name, kind, shape, cell.group, last_two(cell.stride), last_two(cell.dilation), has_bias)
