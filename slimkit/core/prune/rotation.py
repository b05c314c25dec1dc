"""Principal axes of a residual stream, and a model turned onto them, so that the last ones can go.

Of each place r where the stream is read, calibration tells the second moments of what flows there, G = E n n^T of the
normalised stream, and what the loss makes of it, A = W^T diag(s) W over all that reads it there (`elimination`).
A stream that is cut to the axes Q_k costs about 1/2 sum_r tr(A_r N G_r N), N = 1 - Q_k Q_k^T, before any refit. With
A_r taken as the same in all directions and at all places, its least is at the eigenvectors of

    M = sum_r G_r

which SliceGPT (Ashkboos et al. 2024, sec. 3.3) takes for one place at a time; here one Q serves all places, so that no
block needs matrices of its own. To weigh the places by tr(A_r) serves no better. What each axis is worth once the
others are there, the A_r tell: axes go in the order of that loss, with what reads the stream refitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.errors import UnsupportedError
from slimkit.core.prune.elimination import ChannelReader, LayerSignal, eliminate
from slimkit.core.prune.stream import Stream, StreamReader

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]

_ROOM_BYTES = 2 << 30  # second moments that are in memory at once; more go through the model another time


@dataclass(frozen=True)
class Rotation:
    """Axes on which a stream may stand.

    Args:
        axes: (width, width) orthogonal; the columns are the axes, the principal one first.
        losses: (width,) the loss that the model has taken when each axis has gone, as `eliminate` gives it.
        energy: norm's scale -> (width,) mean square of the normalised stream there, along each axis.
    """

    axes: Array
    losses: Array
    energy: Mapping[str, Array]


def principal_axes(stream: Stream, signals: Callable[[Sequence[str]], Mapping[str, Any]], read: Read) -> Rotation:
    """Find the axes of a stream.

    Args:
        stream: of the model.
        signals: layers -> what calibration tells of them, one pass over the data a call.
        read: path -> a parameter's values.

    Raises:
        UnsupportedError: a layer that reads the stream is no plain product, or no batch reached it.
    """
    flows: dict[str, Array] = {}
    uses: dict[str, Array] = {}
    for places in _passes(stream):
        told = signals([r.path.rpartition(".")[0] for _, readers in places for r in readers])
        for norm, readers in places:
            scale = _scale(stream, readers[0].norm, read)
            use = np.zeros((stream.width, stream.width))
            for reader in readers:
                signal = told.get(reader.path.rpartition(".")[0])
                if not isinstance(signal, LayerSignal) or signal.gram.shape != use.shape:
                    raise UnsupportedError(f"rotation needs calibration that reaches {reader.path} as a plain product")
                weight = _matrix(reader, read) * scale
                use += weight.T @ (signal.slope[:, None] * weight)
                if norm not in flows:
                    known = np.where(np.abs(scale) > 1e-6 * np.abs(scale).max(), scale, np.inf)
                    flows[norm] = signal.gram / known / known[:, None]
            uses[norm] = use
    axes = np.linalg.eigh(np.sum(list(flows.values()), axis=0))[1][:, ::-1]
    # An axis may point either way; one rule makes the result that of another machine and framework.
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    turned = {norm: axes.T @ gram @ axes for norm, gram in flows.items()}
    channels = [
        ChannelReader(
            _root(axes.T @ uses[n] @ axes), LayerSignal(turned[n], np.ones(len(axes)), 1), np.arange(len(axes))
        )
        for n in flows
    ]
    losses = eliminate(channels, stream.width)
    return Rotation(axes, losses, {norm: np.diag(gram) for norm, gram in turned.items()})


def turned_values(stream: Stream, rotation: Rotation, kept: Array, read: Read) -> Iterator[tuple[str, Array]]:
    """The parameters of a model that stands on other axes, of which some will be cut; without a cut it says the same.

    The root mean square of a stream that loses axes is taken over fewer features, and of less: the norms' scales make
    up for both, by the root of the share of energy kept over the share of features kept.

    Args:
        stream: of the model.
        rotation: its axes.
        kept: indices of the axes that will stay.
        read: path -> a parameter's values.

    Yields:
        Path and values, of the shape that they had; of a table that is read as well the two ways are apart.
    """
    for path in turned_paths(stream):
        yield path, turned_value(stream, rotation, kept, read, path)


def turned_paths(stream: Stream) -> list[str]:
    """The parameters that turning a stream changes: what writes it, what reads it, and its norms."""
    return list(dict.fromkeys([p for p, _ in stream.writers] + [r.path for r in stream.readers] + stream.norms))


def turned_value(stream: Stream, rotation: Rotation, kept: Array, read: Read, path: str) -> Array:
    """One of the parameters that `turned_values` gives."""
    axes = rotation.axes
    if path in stream.norms:
        energy = rotation.energy[path]
        share = energy[kept].sum() / energy.sum() if len(kept) < len(energy) else 1.0
        return np.full(stream.width, np.sqrt(share * stream.width / len(kept)))
    for written, axis in stream.writers:  # a table without a scale behind it: its two ways turn alike
        if written == path:
            values = np.asarray(read(path), dtype=np.float64)
            turned: Array = values @ axes if axis == values.ndim - 1 else np.tensordot(axes.T, values, 1)
            return turned
    reader = next(r for r in stream.readers if r.path == path)
    turned = (_matrix(reader, read) * _scale(stream, reader.norm, read)) @ axes
    return turned if reader.axis else turned.T


def _scale(stream: Stream, norm: str, read: Read) -> Array:
    return np.asarray(read(norm), dtype=np.float64) if norm else np.ones(stream.width)


def _matrix(reader: StreamReader, read: Read) -> Array:
    values = np.asarray(read(reader.path), dtype=np.float64)
    return values if reader.axis == values.ndim - 1 else values.T


def _root(square: Array) -> Array:
    """R with R^T R = square, for one that is symmetric and not negative."""
    values, vectors = np.linalg.eigh(square)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0))).T
    return root


def _passes(stream: Stream) -> Iterator[list[tuple[str, list[StreamReader]]]]:
    """Places of the stream by norm, or by reader where it has none, whose second moments fit into memory together."""
    places: list[tuple[str, list[StreamReader]]] = []
    used = 0
    for norm in dict.fromkeys(r.norm or r.path for r in stream.readers):
        readers = [r for r in stream.readers if (r.norm or r.path) == norm]
        need = 8 * stream.width**2 * len(readers)
        if places and used + need > _ROOM_BYTES:
            yield places
            places, used = [], 0
        places.append((norm, readers))
        used += need
    if places:
        yield places
