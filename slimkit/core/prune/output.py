"""What the layers that read a variable lose as its indices go: the importance "output", for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.log import progress
from slimkit.core.prune.elimination import ChannelReader, LayerSignal, eliminate
from slimkit.core.prune.experts import ExpertSignal, expert_losses
from slimkit.core.prune.expressions import owners
from slimkit.core.prune.solve import Variable, View

Array = np.ndarray[Any, Any]

_ROOM_BYTES = 4 << 30  # second moments that are in memory at once; more go through the model another time
MAX_INPUTS = 12000  # a matrix of second moments of more takes over a GB, and minutes to invert

Told = Mapping[str, LayerSignal | ExpertSignal]
Signals = Callable[[Sequence[str]], Told]


def output_losses(
    view: View,
    variables: Iterable[Variable],
    signals: Signals,
    read: Callable[[str], Array],
    known: dict[Hashable, Array | None],
) -> dict[str, Array]:
    """The loss at which each index of some variables goes.

    Args:
        view: the coupling.
        variables: those wanted.
        signals: layers -> what calibration tells of them, one pass over the data a call.
        read: path -> a parameter's values.
        known: losses by what they were made of, of the same weights and data; what is made now is added.

    Returns:
        variable -> (size,) as `eliminate` gives it; one that no layer with a signal reads is left out.
    """
    wanted = {v.name: (v, _readers(view, v)) for v in variables}
    keys = {name: _made_of(view, *pair) for name, pair in wanted.items()}
    losses = {name: found for name, key in keys.items() if (found := known.get(key)) is not None}
    wanted = {name: pair for name, pair in wanted.items() if keys[name] not in known}
    for names in _passes(view, {n: [path for path, _ in places] for n, (_, places) in wanted.items()}):
        layers = dict.fromkeys(path.rpartition(".")[0] for n in names for path, _ in wanted[n][1])
        told = signals(list(layers))
        for name in progress(names, "widths"):
            variable, places = wanted[name]
            if variable.kind == "experts":
                known[keys[name]] = None
                signal = told.get(variable.layers[0])
                if isinstance(signal, ExpertSignal):
                    losses[name] = known[keys[name]] = expert_losses(signal)
                continue
            readers = [r for path, axis in places if (r := _reader(view, variable, path, axis, told, read))]
            known[keys[name]] = None
            if readers:
                losses[name] = known[keys[name]] = eliminate(readers, variable.size)
    return losses


def _made_of(view: View, variable: Variable, places: list[tuple[str, int]]) -> Hashable:
    """What the losses of a variable follow from, beside weights and data: its readers, and which inputs it owns."""
    owned = [owners(view.axes[path][axis], view.counts, variable.name) for path, axis in places]
    return variable.size, *((*place, None if o is None else o.tobytes()) for place, o in zip(places, owned))


def _readers(view: View, variable: Variable) -> list[tuple[str, int]]:
    """Weights that read a variable, and along which axis; of experts those that are read expert by expert."""
    if variable.kind == "experts":
        return [(path, axis) for path, axis, _ in variable.places if path.rpartition(".")[0] in variable.layers]
    return [(path, axis) for path, axis, role in variable.places if role == "in" and _width(view, path, axis)]


def _width(view: View, path: str, axis: int) -> int:
    """Inputs of one output of a layer; 0 where its weight is no matrix with its inputs on that axis."""
    shape = view.coupling.graph.shapes[path]
    if path.rpartition(".")[2] != "weight" or not (axis == 1 or (axis == 0 and len(shape) == 2)):
        return 0
    width = int(np.prod(shape[1:])) if axis == 1 else shape[0]
    return width if width <= MAX_INPUTS else 0


def _passes(view: View, readers: dict[str, list[str]]) -> Iterator[list[str]]:
    """Variables whose readers' second moments fit into memory together."""
    names: list[str] = []
    used = 0
    for name, paths in readers.items():
        need = sum(8 * max(view.coupling.graph.shapes[p][:2]) ** 2 for p in paths)
        if names and used + need > _ROOM_BYTES:
            yield names
            names, used = [], 0
        if paths:
            names.append(name)
            used += need
    if names:
        yield names


def _reader(
    view: View, variable: Variable, path: str, axis: int, signals: Told, read: Callable[[str], Array]
) -> ChannelReader | None:
    signal = signals.get(path.rpartition(".")[0])
    owner = owners(view.axes[path][axis], view.counts, variable.name)
    if not isinstance(signal, LayerSignal) or owner is None:
        return None
    weight = read(path)
    matrix = weight.reshape(len(weight), -1) if axis == 1 else weight.T
    if signal.gram.shape != (matrix.shape[1],) * 2:  # grouped, or used in another way than its layer's
        return None
    return ChannelReader(matrix, signal, np.repeat(owner, matrix.shape[1] // len(owner)))
