"""Cutting parameters, and what MindSpore's own layers and primitives remember of their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.errors import UnsupportedError
from slimkit_ms import bridge, kinds
from slimkit_ms.attention import settled

import mindspore as ms
from mindspore import nn, ops

Keep = Mapping[str, Sequence[Any]]

# Attributes that name the width of what a layer makes and of what it reads.
_MADE = ("out_channels", "out_features", "num_features", "num_channels", "embedding_size", "embedding_dim")
_READ = ("in_channels", "in_features")
_GROUPS = ("group", "groups")


@dataclass
class Undo:
    """What a cut replaced, so that the cell can be put back as it was.

    Args:
        model: the cell.
        parameters: (the cell that holds it, its key there, parameter before, parameter now).
        attributes: (object, name, value before).
        primitives: (primitive, name, value before).
        classes: (cell, class before).
        resized: (parameter, values before).
    """

    model: nn.Cell
    parameters: list[tuple[nn.Cell, str, ms.Parameter, ms.Parameter]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    primitives: list[tuple[ops.Primitive, str, Any]] = field(default_factory=list)
    classes: list[tuple[nn.Cell, type]] = field(default_factory=list)
    resized: list[tuple[ms.Parameter, Any]] = field(default_factory=list)

    def set(self, cell: nn.Cell, name: str, value: Any) -> None:
        """Change a plain attribute of a cell, in place."""
        if vars(cell)[name] != value:
            self.attributes.append((cell, name, vars(cell)[name]))
            vars(cell)[name] = value

    def turn(self, cell: nn.Cell, kind: type) -> None:
        """Change the class of a cell, in place."""
        if type(cell) is not kind:
            self.classes.append((cell, type(cell)))
            cell.__class__ = kind

    def set_primitive(self, primitive: ops.Primitive, name: str, value: Any) -> None:
        """Change an attribute of a primitive, in place; `init_attrs` too, from which deepcopy builds the copy."""
        if primitive.attrs.get(name, value) != value:
            self.primitives.append((primitive, name, primitive.attrs[name]))
            _set_primitive(primitive, name, value)

    def settle(self) -> None:
        """Give the cut values to the parameters that were there before, in place.

        Optimizers, hooks and whatever else holds a parameter go on meaning it. Compiled graphs of the whole process are
        forgotten: a training step that was compiled before would compute, and write, at the old shapes.
        """
        for cell, key, before, now in self.parameters:
            if before is not now and all(before is not p for p, _ in self.resized):
                self.resized.append((before, before.asnumpy().copy()))
                resize(before, now.asnumpy())
            cell._params[key] = before
        self._follow()
        if self.resized:
            ms.ms_memory_recycle()

    def take_back(self) -> None:
        """Put everything back, in place."""
        for parameter, values in self.resized:
            resize(parameter, values)
        self.resized.clear()
        self.take_back_attributes()
        for cell, key, before, _ in self.parameters:
            cell._params[key] = before
        self._follow()
        self.parameters.clear()
        bridge.forget_graphs(self.model)

    def _follow(self) -> None:
        follow(self.model, {id(now): before for _, _, before, now in self.parameters})

    def take_back_attributes(self) -> None:
        """Put back all but the parameters, in place."""
        for owner, name, value in reversed(self.attributes):
            vars(owner)[name] = value
        for primitive, name, value in reversed(self.primitives):
            _set_primitive(primitive, name, value)
        for cell, kind in reversed(self.classes):
            cell.__class__ = kind
        self.attributes.clear()
        self.primitives.clear()
        self.classes.clear()


def follow(model: nn.Cell, new: Mapping[int, ms.Parameter]) -> None:
    """Put parameters into the tuples that cells such as nn.GRU keep, in place: identity of the old -> the new."""
    for _, cell in model.cells_and_names():
        for name, held in vars(cell).items():
            if isinstance(held, ms.ParameterTuple) and any(id(p) in new for p in held):
                vars(cell)[name] = ms.ParameterTuple(new.get(id(p), p) for p in held)


def resize(parameter: ms.Parameter, values: Any) -> None:
    """Give a parameter values of another shape, in place."""
    parameter.set_data(ms.Tensor(np.ascontiguousarray(values)), slice_shape=True)
    parameter.sliced = False  # a word of parallel training, which the call above takes the change for


def _set_primitive(primitive: ops.Primitive, name: str, value: Any) -> None:
    primitive.add_prim_attr(name, value)
    if name in primitive.init_attrs:
        primitive.init_attrs[name] = value


def aligned(shape: tuple[int, ...], index: Sequence[Any]) -> list[Any]:
    """Kept indices by this parameter's own axes: MindSpore gives a 1-d kernel one axis of size one more than torch."""
    found, left = [], list(index)
    for axis, size in enumerate(shape):
        spare = len(left) < len(shape) - axis
        found.append(None if spare and size == 1 else left.pop(0))
    return found


def cut_parameters(model: nn.Cell, keep: Keep, undo: Undo) -> None:
    """Put sliced parameters into the cells that hold them, in place; names, flags and ties stay.

    Args:
        model: the cell.
        keep: path -> for each axis the kept indices, or None where all stay.
        undo: what is replaced is written here.

    Raises:
        UnsupportedError: a parameter of a type that MindSpore cannot hand over as an array.
    """
    new: dict[int, ms.Parameter] = {}
    for parameter, paths in bridge.parameter_paths(model):
        index = next((keep[path] for path in paths if path in keep), ())
        if any(kept is not None for kept in index):
            new[id(parameter)] = _sliced(parameter, paths[0], index)
    for _, cell in model.cells_and_names():
        for key, parameter in list(cell._params.items()):
            if id(parameter) in new:
                undo.parameters.append((cell, key, parameter, new[id(parameter)]))
                cell._params[key] = new[id(parameter)]
    follow(model, new)


def _sliced(parameter: ms.Parameter, path: str, index: Sequence[Any]) -> ms.Parameter:
    try:
        values = parameter.asnumpy()
    except (TypeError, RuntimeError) as error:
        raise UnsupportedError(f"{path}: a {parameter.dtype} parameter cannot be cut here: {error}") from None
    for axis, kept in enumerate(index):
        if kept is not None:
            values = np.take(values, np.asarray(kept), axis=axis)
    # A new object, since most cuts are only tried; `Undo.settle` brings the old one back.
    return ms.Parameter(
        ms.Tensor(np.ascontiguousarray(values)),
        name=parameter.name,
        requires_grad=parameter.requires_grad,
        layerwise_parallel=parameter.layerwise_parallel,
        parallel_optimizer=parameter.parallel_optimizer,
    )


def cut_layers(model: nn.Cell, groups: Mapping[str, int], undo: Undo) -> None:
    """Make the attributes and primitives of MindSpore's own layers say their parameters' new shapes, in place.

    Args:
        model: the cell, its parameters already cut.
        groups: path of a grouped convolution or group norm -> its number of groups now.
        undo: what is replaced is written here.
    """
    changed = {id(now) for _, _, _, now in undo.parameters}
    for path, cell in model.cells_and_names():
        own = {key: p for key, p in cell._params.items() if p is not None}
        if isinstance(cell, nn.MultiheadAttention):
            if any(id(p) in changed for p in (*own.values(), cell.out_proj.weight)):
                _cut_attention(cell, undo)
        elif path in groups or any(id(p) in changed for p in own.values()):
            _cut_layer(cell, own, groups.get(path), undo)


def _cut_attention(cell: nn.MultiheadAttention, undo: Undo) -> None:
    now = dict(settled(cell))
    kind = now.pop("__class__", type(cell))
    for name, value in now.items():
        undo.set(cell, name, value)
    undo.turn(cell, kind)


def _cut_recurrent(cell: nn.Cell, own: Mapping[str, ms.Parameter], undo: Undo) -> None:
    for name, key in (("hidden_size", "weight_hh"), ("input_size", "weight_ih")):
        if name in vars(cell):
            weight = next(p for path, p in own.items() if path.startswith(key))
            undo.set(cell, name, int(weight.shape[1]))


def _cut_layer(cell: nn.Cell, own: Mapping[str, ms.Parameter], group: int | None, undo: Undo) -> None:
    attributes = vars(cell)
    names = [n for n in _GROUPS if isinstance(attributes.get(n), int)]
    if group is not None:
        for name in names or [n for n in ("num_groups",) if n in attributes]:
            undo.set(cell, name, group)
    if isinstance(cell, (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)):
        _cut_recurrent(cell, own, undo)
        return
    count = next((attributes[n] for n in names), 1)
    weight = next((own[k] for k in ("weight", "embedding_table", "gamma") if k in own), None)
    if weight is None:
        return
    shape = tuple(weight.shape)
    if isinstance(attributes.get("normalized_shape"), (tuple, list)):
        undo.set(cell, "normalized_shape", type(attributes["normalized_shape"])(shape))
    made, read = shape[0], shape[1] * count if len(shape) > 1 else shape[0]
    if kinds.is_transposed(cell):
        made, read = shape[1] * count, shape[0]
    elif kinds.is_kind(cell, "embedding") or "embedding_dim" in attributes:
        made = shape[1]
    for name in _MADE:
        if isinstance(attributes.get(name), int):
            undo.set(cell, name, made)
    for name in _READ:
        if isinstance(attributes.get(name), int):
            undo.set(cell, name, read)
    for primitive in cell._primitives.values():
        if primitive is None or "out_channel" not in primitive.attrs:
            continue
        # The 2-D transposed convolution is the gradient of a convolution, which makes what the layer reads.
        backward = "in_channel" not in primitive.attrs and (made, read) == (shape[1] * count, shape[0])
        backward = backward and kinds.is_transposed(cell)
        undo.set_primitive(primitive, "out_channel", read if backward else made)
        if "in_channel" in primitive.attrs:
            undo.set_primitive(primitive, "in_channel", read)
        for name in _GROUPS:
            undo.set_primitive(primitive, name, count)
