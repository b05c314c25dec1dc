"""Latency as a budget: times of layers by their widths, and what a whole network takes of them.

A network's time is taken as

    ms(k) = layers * sum_l t_l(n_in(k), n_out(k)) + elements * E(k) + constant

where t_l is the measured time of layer l alone, between measured widths by interpolation; E counts the numbers that all
other operators write (norms, activations, softmax); and the three coefficients, none negative, are fitted to the whole
network measured at several widths. They stand for what layers alone do not show: fusion, layouts, calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.files import PathLike
from slimkit.core.prune.allocate import Account, Allocation
from slimkit.core.prune.expressions import Expr, linear_form
from slimkit.core.prune.layer_times import TimedLayer, other_elements, timed_layers
from slimkit.core.prune.solve import View
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]

FORMAT, VERSION = "slimkit.latency", 1
_KEYS = ("format", "version", "device", "runtime", "threads", "versions", "layers", "networks")
BAD_FIT = 0.1  # of a network's time: a table that foretells one worse is named wherever it is used
_NS = 1e6  # an account counts whole numbers: nanoseconds


class LatencyTable(Shown):
    """Times of layers by their widths on one device, and of networks made of them.

    Args:
        device: what it was measured on.
        runtime: what ran the layers.
        threads: number of them.
        versions: program -> version.

    Attributes:
        layers: kind of layer (with all that is not width: kernel, sizes, batch) -> {"in": widths, "out": widths, "ms":
            one row of times for each width in}.
        networks: a network's digest -> its coefficients and what they were fitted to.

    Example:
        >>> table = LatencyTable("a CPU", "onnxruntime", 1, {})
        >>> table.put("linear, 1 row", [8, 16], [8], [[1.0], [3.0]])
        >>> float(table.ms("linear, 1 row", 12, 8))
        2.0
    """

    def __init__(self, device: str, runtime: str, threads: int, versions: Mapping[str, str]) -> None:
        self.device, self.runtime, self.threads, self.versions = device, runtime, threads, dict(versions)
        self.layers: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        self._grids: dict[str, tuple[Array, Array, Array]] = {}

    def _rows(self) -> list[tuple[str, Any]]:
        return [
            ("device", self.device),
            ("runtime", self.runtime),
            ("kinds of layers", len(self.layers)),
            ("networks", [f"{n['model']}: {n['dense_ms']:.3g} ms" for n in self.networks.values()]),
        ]

    def put(self, kind: str, n_in: list[int], n_out: list[int], ms: list[list[float]]) -> None:
        """Note times of a kind of layer: one row for each width in, in it one time for each width out."""
        self.layers[kind] = {"in": list(n_in), "out": list(n_out), "ms": [list(map(float, row)) for row in ms]}
        self._grids.pop(kind, None)

    def ms(self, kind: str, n_in: Any, n_out: Any) -> Array:
        """Times of a kind of layer at some widths, linear between measured ones and beyond them.

        Args:
            kind: as in `layers`.
            n_in: widths (n,) or one.
            n_out: the same.
        """
        grid = self._grids.get(kind)
        if grid is None:
            told = self.layers[kind]
            grid = tuple(np.asarray(told[k], dtype=np.float64) for k in ("in", "out", "ms"))  # type: ignore[assignment]
            assert grid is not None
            self._grids[kind] = grid
        rows, columns, times = grid
        i, a = _between(rows, n_in)
        j, b = _between(columns, n_out)
        i_next, j_next = np.minimum(i + 1, len(rows) - 1), np.minimum(j + 1, len(columns) - 1)
        low = times[i, j] * (1 - b) + times[i, j_next] * b
        high = times[i_next, j] * (1 - b) + times[i_next, j_next] * b
        found: Array = np.maximum(low * (1 - a) + high * a, 0.0)
        return found

    def holds(self, view: View) -> bool:
        """Whether a network was timed, and the layers that it is made of."""
        return digest_of(view) in self.networks and {x.kind for x in timed_layers(view)} <= self.layers.keys()

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data (docs/formats.md)."""
        told = {name: getattr(self, name) for name in _KEYS[2:]}
        return {"format": FORMAT, "version": VERSION, **told}

    def save(self, path: PathLike) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        files.write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: PathLike) -> LatencyTable:
        """Read a table.

        Raises:
            FileFormatError: the file is no table, or damaged.
        """
        told = files.read_json(path, "table")
        try:
            return cls.of(told)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from None

    @classmethod
    def of(cls, told: Any) -> LatencyTable:
        """A table of plain data.

        Raises:
            FileFormatError: it is none.
        """
        if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("version") != VERSION:
            raise FileFormatError(f"no latency table: format must be {FORMAT!r} and version {VERSION}")
        odd = set(told) ^ set(_KEYS)
        if odd:
            raise FileFormatError(
                f"a latency table has exactly the keys {', '.join(_KEYS)}; these differ: {sorted(odd)}"
            )
        try:
            self = cls(str(told["device"]), str(told["runtime"]), int(told["threads"]), told["versions"])
            for kind, layer in told["layers"].items():
                times = np.asarray(layer["ms"], dtype=np.float64)
                widths = [np.asarray(layer[side], dtype=np.int64) for side in ("in", "out")]
                sound = times.shape == tuple(map(len, widths)) and times.size and np.isfinite(times).all()
                if not sound or (times < 0).any() or any((np.diff(w) <= 0).any() or w[0] < 1 for w in widths):
                    raise FileFormatError(f"the times of {kind!r} must be one for each pair of ascending widths")
                self.put(kind, layer["in"], layer["out"], layer["ms"])
            for digest, network in told["networks"].items():
                told_by = [float(network[k]) for k in ("layers", "elements", "constant")]
                if min(told_by) < 0 or not np.isfinite(told_by).all():
                    raise FileFormatError(f"the coefficients of {digest} must be finite and not negative")
                if any(float(one["ms"]) <= 0 or float(one["foretold_ms"]) < 0 for one in network.get("fitted_to", ())):
                    raise FileFormatError(f"the times that {digest} was fitted to must be above 0")
                self.networks[str(digest)] = dict(network)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"a damaged latency table: {type(error).__name__}: {error}") from None
        return self


def _between(widths: Array, wanted: Any) -> tuple[Array, Array]:
    """(place of the measured width below, how far on towards the next one)."""
    wanted = np.asarray(wanted, dtype=np.float64)
    if len(widths) == 1:
        return np.zeros(wanted.shape, dtype=np.int64), np.zeros(wanted.shape)
    place = np.clip(np.searchsorted(widths, wanted, side="right") - 1, 0, len(widths) - 2)
    return place, (wanted - widths[place]) / (widths[place + 1] - widths[place])


def digest_of(view: View) -> str:
    """What tells one network, at one size of its input, from others."""
    graph = view.coupling.graph
    # What stands between the layers costs time too: the same widths with another activation are another network.
    between = [str(node.attrs.get("fn", node.op)) for node in graph.nodes if node.op == "elementwise"]
    # A matrix apart from its table takes the time that it took before.
    shapes = sorted((p, list(s)) for p, s in graph.shapes.items() if p not in graph.parted)
    told = [shapes, [x.kind for x in timed_layers(view)], [fn for fn in between if "dropout" not in fn]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def table_of(table: Any) -> LatencyTable:
    """A table, or the one in a file."""
    if isinstance(table, LatencyTable):
        return table
    if not isinstance(table, (str, Path)):
        check.wrong_type("table", "a LatencyTable as measure_latency returns it, or the path of one", table)
    return LatencyTable.read(table)


class LatencyAccount(Account):
    """Counts a network's nanoseconds as a function of how many indices each variable keeps.

    Args:
        view: the coupling.
        table: times of its layers.
        fitted: coefficients "layers", "elements" and "constant"; None looks them up in the table.

    Raises:
        ArgumentError: the table does not hold this network.
    """

    is_linear = False

    def __init__(self, view: View, table: LatencyTable, fitted: Mapping[str, Any] | None = None) -> None:
        if fitted is None:
            fitted = table.networks.get(digest_of(view))
        if fitted is None:
            raise ArgumentError(
                f"table holds no measurement of this network at this size of input (it has {len(table.networks)} "
                "others): make one with measure_latency(model, inputs), which adds to a table"
            )
        self._table, self._fitted = table, fitted
        self._aligned = Account(view)
        self._volume = Account.of_terms(other_elements(view), view.counts)
        self.names = list(view.counts)
        self._multiples = []
        layers = timed_layers(view)
        order = {name: k for k, name in enumerate(self.names)}
        self._offsets = np.zeros(2 * len(layers), dtype=np.int64)  # (2 layers,): widths in, then widths out
        self._slopes = np.zeros((2 * len(layers), len(order)), dtype=np.int64)
        for place, layer in enumerate(layers):
            for row, expr in ((place, layer.n_in), (place + len(layers), layer.n_out)):
                self._put(row, expr, order)
        # kind -> the places of its layers
        self._kinds = {k: np.array([p for p, x in enumerate(layers) if x.kind == k]) for k in _kinds(layers)}
        missing = [k for k in self._kinds if k not in table.layers]
        if missing:
            raise ArgumentError(
                f"table has no times of layers of this network: {missing[0]} and {len(missing) - 1} more"
            )

    def _put(self, row: int, expr: Expr, order: Mapping[str, int]) -> None:
        self._offsets[row], slopes = linear_form(expr, order)
        for variable, slope in slopes.items():
            self._slopes[row, variable] = slope

    def joined(
        self, names: Any, offsets: Array, matrix: Array, multiples: Any, counted: Collection[str] = ()
    ) -> LatencyAccount:
        new = super().joined(names, offsets, matrix, multiples, counted)
        assert isinstance(new, LatencyAccount)
        new._volume = self._volume.joined(names, offsets, matrix, multiples, counted)
        return new

    def features(self, counts: Array) -> tuple[float, float]:
        """(milliseconds of the layers alone, numbers that other operators write)."""
        sizes = self._offsets + self._slopes @ counts
        n_in, n_out = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
        layers = sum(float(self._table.ms(k, n_in[at], n_out[at]).sum()) for k, at in self._kinds.items())
        return layers, float(self._volume.count(counts))

    @property
    def off_by(self) -> float:
        """How far the table foretells a network that it was fitted to wrong, relative to what was measured, at most."""
        fitted = self._fitted.get("fitted_to") or ()
        return max((abs(one["foretold_ms"] / one["ms"] - 1) for one in fitted), default=0.0)

    def refuse_ruin(self, allocation: Allocation, full: Mapping[str, int]) -> None:
        """Refuse a latency that no cut reaches, by whose floors the network would go nearly whole for nothing.

        Raises:
            ArgumentError: the allocation misses its target by more than a twentieth.
        """
        if allocation.total > 1.05 * allocation.target:
            dense = self.count(np.array(list(full.values()), dtype=np.int64))
            check.wrong_value(
                "reserved_ratio",
                "a latency that the table foretells of some cut: the narrowest network takes "
                f"{allocation.total / dense:.0%} of the dense one's (what widths do not change takes the rest, or the "
                "layers were too short to be timed); set_node_reserved_ratio cuts as far as it allows",
                allocation.target / dense,
            )

    def ms(self, counts: Array) -> float:
        """Milliseconds for these counts."""
        layers, elements = self.features(counts)
        told = self._fitted
        return float(told["layers"]) * layers + float(told["elements"]) * elements + float(told["constant"])

    def count(self, counts: Array) -> int:
        return round(_NS * self.ms(counts))


def _kinds(layers: list[TimedLayer]) -> list[str]:
    return list(dict.fromkeys(x.kind for x in layers))
