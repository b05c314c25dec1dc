"""The only file that asks a MindSpore cell anything: names, cells, calls, modes, compiled graphs."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import ArgumentError
from slimkit.core.freeze import Parameters, Reading
from slimkit.core.lazy import require
from slimkit.core.weights.coupling import SmallTensor, Structure
from slimkit.core.weights.heads import Heads, heads_told_by
from slimkit_ms import kinds

require("mindspore")

import mindspore as ms  # noqa: E402
from mindspore import nn  # noqa: E402
from mindspore.graph.api import _pynative_executor  # noqa: E402  (no public call forgets a broken-off gradient)


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
        parent[list(parent._cells).index(child)] = cell  # children of a sequence may have names
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


def forget_graphs(model: nn.Cell, keep: Collection[str] | None = None) -> None:
    """Drop compiled graphs, in place: after surgery MindSpore would go on computing the old network.

    Those of cells that hold the model, or a part of it, go as well (a loss cell, a training step), and those of
    functions under `ms.jit`, which may call it.

    Args:
        model: the cell.
        keep: compiled phases of the model that stay, where it computes what it did and a graph of another use is
            dropped: then nothing outside it is touched.
    """
    executor = getattr(nn.cell, "_cell_graph_executor", None)
    cells = [cell for _, cell in model.cells_and_names()]
    if keep is None:
        holders, others = _compiled_outside(cells)
        _forget_functions(model, executor, others)
        cells += holders
    for cell in cells:
        gone = {phase for phase in cell.compile_cache if phase not in (keep or ())}
        if gone and executor is not None:
            executor.del_net_res(cell, gone)
        cell.compile_cache.difference_update(gone)


def _compiled_outside(cells: Sequence[nn.Cell]) -> tuple[list[nn.Cell], set[int]]:
    """Living cells outside these that hold one of them and were compiled, and the ids of those that hold none (only of
    cells that a compiled function's phase names)."""
    own = {id(cell) for cell in cells}
    caches = getattr(nn.cell, "cells_compile_cache", {})
    asked = {cell for cell, phases in caches.items() if phases} | {n for p in _jit_phases() for n in _numbers(p)}
    asked -= own
    if not asked:
        return [], set()
    # Nothing in a cell says who holds it. By its class, for a dead weak reference cannot be asked; a cell whose
    # constructor failed holds nothing.
    found = [o for o in gc.get_objects() if id(o) in asked and issubclass(type(o), nn.Cell) and "_cells" in vars(o)]
    holders = [o for o in found if any(id(cell) in own for _, cell in o.cells_and_names())]
    return holders, {id(o) for o in found} - {id(o) for o in holders}


def _numbers(phase: str) -> list[int]:
    """The ids of objects that a phase names."""
    return [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", phase)]


def _jit_phases() -> set[str]:
    """What functions under `ms.jit` were compiled to; a set that MindSpore looks into before it compiles."""
    executor = getattr(nn.cell, "_cell_graph_executor", None)
    found: set[str] = getattr(sys.modules.get(type(executor).__module__), "ms_compile_cache", set())
    return found


def _forget_functions(model: nn.Cell, executor: Any, others: set[int]) -> None:
    """Drop the graphs of functions under `ms.jit`, but for the methods of these other cells (an optimizer's)."""
    phases = _jit_phases()
    gone = {p for p in phases if not any(number in others for number in _numbers(p))}
    if gone:
        executor.del_net_res(model, gone)
        phases.difference_update(gone)


_ZEROS = "slimkit_made_zeros"


def record_zeros(cell: nn.Cell) -> None:
    """Note on a layer, in place, that zeros in its weight were made on purpose and are meant to stay."""
    vars(cell)[_ZEROS] = True


def record_zeros_of(model: nn.Cell, names: Iterable[str]) -> None:
    """Note on the layers of these names, in place, that their zeros were made; names that no layer has pass.

    A part of a parameter has the parameter's name and which part it is: "experts.w[3]", "attn.in_proj_weight[query]";
    the note is on the cell that has the parameter.
    """
    cells = dict(model.cells_and_names())
    for name in names:
        path, _, key = name.partition("[")[0].rpartition(".")
        if name in cells:
            record_zeros(cells[name])
        elif path in cells and key in cells[path]._params:
            record_zeros(cells[path])


def forget_zeros(cell: nn.Cell) -> None:
    """Undo `record_zeros`, in place."""
    vars(cell).pop(_ZEROS, None)


def has_made_zeros(cell: nn.Cell) -> bool:
    """Whether zeros in a layer's weight were made on purpose, by slimkit."""
    return _ZEROS in vars(cell)


def tensors(value: Any) -> Any:
    """NumPy arrays in nested values as tensors, of the same dtype."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ms.Tensor(value)
    if isinstance(value, Mapping):
        return {k: tensors(v) for k, v in value.items()}
    return type(value)([tensors(v) for v in value]) if type(value) in (tuple, list) else value


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One batch as (args, kwargs) for a cell, NumPy arrays as tensors."""
    args, kwargs = as_call(batch)
    return tensors(args), tensors(kwargs)


def run(model: nn.Cell, batch: Any) -> Any:
    """Call the cell on one batch."""
    args, kwargs = call_of(batch)
    return model(*args, **kwargs)


@contextlib.contextmanager
def whole_gradient() -> Iterator[None]:
    """Take a gradient; after an error in the model's code nothing is left of it for later gradients to trip over."""
    try:
        yield
    except BaseException:
        # PyNative records operators as they run, and the half-written record would stay open.
        _pynative_executor.clear_res()
        raise


@contextlib.contextmanager
def evaluating(model: nn.Cell) -> Iterator[None]:
    """Eval mode; every cell's own mode comes back afterwards, also after an error."""
    # The phase chooses among compiled graphs: left at "predict", a training cell would run its evaluation graph.
    modes = [(cell, cell.training, cell._phase, dict(cell.get_flags())) for _, cell in model.cells_and_names()]
    model.set_train(False)
    try:
        yield
    finally:
        for cell, mode, phase, flags in modes:
            cell.training, cell._phase = mode, phase
            cell.get_flags().clear()
            cell.get_flags().update(flags)


def as_numpy(tensor: ms.Tensor) -> Any:
    """A copy of a tensor's values; ``asnumpy`` alone may share memory with the tensor."""
    return tensor.asnumpy().copy()


def parameters(model: nn.Cell) -> Parameters:
    """Every parameter with all its names; a shared parameter comes once.

    The running statistics of a norm are parameters here and never train.
    """
    held: list[ms.Parameter] = []
    names: list[str] = []
    further: dict[int, list[str]] = {}
    place: dict[int, int] = {}
    # In the order of cells_and_names, without its nested generators, which take three times as long.
    waiting: list[tuple[str, nn.Cell]] = [("", model)]
    seen: set[int] = set()
    while waiting:
        stem, cell = waiting.pop()
        if id(cell) in seen:
            continue
        seen.add(id(cell))
        for key, parameter in cell._params.items():
            if parameter is None:
                continue
            at = place.get(id(parameter))
            if at is None:
                place[id(parameter)] = len(held)
                held.append(parameter)
                names.append(stem + key)
            else:
                further.setdefault(at, []).append(stem + key)
        if cell._cells:
            waiting += [(f"{stem}{name}.", c) for name, c in reversed(cell._cells.items()) if c is not None]
    return Parameters(held, names, further, _readings, lambda parameter: parameter._param_info.name)


def _readings(held: Sequence[ms.Parameter], paths: Sequence[str]) -> Iterator[Reading]:
    """What MindSpore says of each parameter, when it is asked for."""
    dtypes: dict[int, tuple[bool, Any]] = {}
    for parameter, path in zip(held, paths):
        # Each of these is a call into the framework, and there may be ten thousand parameters: every one is made
        # once, on the record that needs no waiting for the device, and a dtype is compared by identity first.
        info, dtype = parameter._param_info, parameter.dtype
        known = dtypes.get(id(dtype))
        if known is None:  # the dtype is kept alive, so that no other takes its identity
            known = dtypes[id(dtype)] = dtype in _TRAINABLE, dtype
        is_statistic = path.endswith(kinds.STATISTICS) and path.rpartition(".")[2] in kinds.STATISTICS
        yield parameter.size, info.requires_grad, known[0] and not is_statistic


_TRAINABLE = {ms.float16, ms.bfloat16, ms.float32, ms.float64, ms.complex64, ms.complex128}


def parameter_paths(model: nn.Cell) -> list[tuple[ms.Parameter, list[str]]]:
    """Every parameter with the paths it is held under, in order; a shared parameter comes once."""
    found: dict[int, tuple[ms.Parameter, list[str]]] = {}
    for prefix, cell in model.cells_and_names():
        for key, parameter in cell._params.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append(f"{prefix}.{key}" if prefix else key)
    return list(found.values())


def is_weight(parameter: ms.Parameter, path: str) -> bool:
    """Whether a parameter is a weight rather than state: floating point, and no running statistic."""
    return parameter.is_floating_point() and path.rpartition(".")[2] not in kinds.STATISTICS


@contextlib.contextmanager
def pynative() -> Iterator[None]:
    """Run operators one by one, so that hooks and Python code see them; the mode that was set comes back afterwards."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)


@contextlib.contextmanager
def hooked(cells: Mapping[str, nn.Cell], seen: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call ``seen(name, inputs, output)`` after each run of the cells, while the context is open; in PyNative mode."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _cell, inputs, output: seen(name, inputs, output)

    handles = [cell.register_forward_hook(hook(name)) for name, cell in cells.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def structure(model: nn.Cell) -> Structure:
    """What weight pruning asks of a cell: shapes, kinds of layer, attention heads and tied tensors."""
    words: dict[int, str] = {}
    names: dict[int, list[str]] = {}
    targets: dict[str, SmallTensor] = {}
    heads: dict[str, Heads] = {}
    for path, cell in model.cells_and_names():
        for key, parameter in cell._params.items():
            if parameter is not None:
                fused = isinstance(cell, nn.MultiheadAttention) and key.startswith("in_proj")
                words.setdefault(id(parameter), "linear" if fused else _kind(cell))
        told = heads_told_by(cell)
        if told is None and (path == "" or "att" in type(cell).__name__.lower()):
            told = heads_told_by(getattr(cell, "config", None))
        if told is not None:
            heads[path] = told
    for parameter in model.get_parameters():
        names.setdefault(id(parameter), []).append(parameter.name)
        targets[parameter.name] = SmallTensor(tuple(parameter.shape), words.get(id(parameter), "other"))
    return Structure(
        targets=targets,
        heads=heads,
        tied=tuple(tuple(group) for group in names.values() if len(group) > 1),
        rotary=any("rotary" in type(c).__name__.lower() for _, c in model.cells_and_names()),
    )


def _kind(cell: nn.Cell) -> str:
    """The kind of layer, in the words of core.coupling."""
    kind = kinds.kind_of(cell)
    if kind is not None and not kind.transposed and kind.word in ("linear", "embedding", "conv", "norm"):
        return kind.word
    return "norm" if kinds.is_norm(cell) else "other"


def is_plain_layer(cell: nn.Cell) -> bool:
    """Whether a cell is a layer or a container of MindSpore itself, whose code takes its shapes from its parameters.

    Layers made of others, such as attention, compute with sizes of their own and are not plain.
    """
    if not type(cell).__module__.startswith("mindspore."):
        return False
    return isinstance(cell, (nn.SequentialCell, nn.CellList, nn.CellDict)) or not any(
        inner is not cell and inner._params for _, inner in cell.cells_and_names()
    )
