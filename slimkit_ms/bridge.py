"""The only file that asks a MindSpore cell anything: names, cells, calls, modes, compiled graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import ArgumentError
from slimkit.core.freeze import Entry
from slimkit.core.lazy import require

require("mindspore")

import mindspore as ms  # noqa: E402
from mindspore import nn  # noqa: E402


def check_model(model: Any, name: str = "model") -> nn.Cell:
    """Refuse anything but an nn.Cell."""
    if not isinstance(model, nn.Cell):
        check.wrong_type(name, "a mindspore.nn.Cell", model)
    return model


def get_module(model: nn.Cell, path: str) -> nn.Cell:
    """The cell at a dotted path; ArgumentError offers the nearest path."""
    cells = dict(model.cells_and_names())
    if path not in cells:
        raise ArgumentError(f"the model has no cell {path!r}{check.near(path, list(cells))}")
    return cells[path]


def set_module(model: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Put a cell at a dotted path, give parameters their paths as names and forget compiled graphs, in place."""
    parent_path, _, child = path.rpartition(".")
    parent = get_module(model, parent_path)
    if isinstance(parent, (nn.SequentialCell, nn.CellList)):
        parent[int(child)] = cell
    else:
        setattr(parent, child, cell)
    rename_parameters(model)
    forget_graphs(model)


def rename_parameters(model: nn.Cell) -> None:
    """Set each parameter's name to its path, in place; a shared parameter keeps the first path.

    Replaced cells carry names such as "weight", and equal names make optimizers raise and checkpoints drop tensors.
    """
    seen: set[int] = set()
    for prefix, cell in model.cells_and_names():
        for key, parameter in cell._params.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.name = f"{prefix}.{key}" if prefix else key


def forget_graphs(model: nn.Cell) -> None:
    """Drop compiled graphs, in place: after surgery MindSpore would go on computing the old network."""
    for _, cell in model.cells_and_names():
        cell.compile_cache.clear()


def run(model: nn.Cell, batch: Any) -> Any:
    """Call the cell on one batch."""
    args, kwargs = as_call(batch)
    return model(*args, **kwargs)


@contextlib.contextmanager
def evaluating(model: nn.Cell) -> Iterator[None]:
    """Eval mode; every cell's own mode comes back afterwards, also after an error."""
    modes = [(cell, cell.training) for _, cell in model.cells_and_names()]
    model.set_train(False)
    try:
        yield
    finally:
        for cell, mode in modes:
            cell.training = mode


def as_numpy(tensor: ms.Tensor) -> Any:
    """A copy of a tensor's values; ``asnumpy`` alone may share memory with the tensor."""
    return tensor.asnumpy().copy()


def parameter_entries(model: nn.Cell) -> list[tuple[ms.Parameter, Entry]]:
    """Every parameter with all its names, its size and whether it trains; a shared parameter comes once.

    The running statistics of a norm are parameters here and never train.
    """
    found: dict[int, tuple[ms.Parameter, list[str], bool]] = {}
    for prefix, cell in model.cells_and_names():
        for key, parameter in cell._params.items():
            if parameter is not None:
                may_train = key not in ("moving_mean", "moving_variance") and parameter.is_floating_point()
                names = found.setdefault(id(parameter), (parameter, [], may_train))[1]
                names.append(f"{prefix}.{key}" if prefix else key)
    return [
        (p, Entry(tuple(dict.fromkeys((*names, p.name))), p.size, p.requires_grad, may_train))
        for p, names, may_train in found.values()
    ]
