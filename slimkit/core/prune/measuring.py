"""Making a latency table: which layers and networks are timed, by what, and the fit between them."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from slimkit.core import check, files
from slimkit.core.errors import FileFormatError
from slimkit.core.files import PathLike
from slimkit.core.log import logger
from slimkit.core.prune.expressions import Expr, size_of
from slimkit.core.prune.latency import BAD_FIT, LatencyAccount, LatencyTable, digest_of
from slimkit.core.prune.layer_times import TimedLayer, timed_layers
from slimkit.core.prune.onnx_times import Point

if TYPE_CHECKING:
    from slimkit.core.prune.pruner import PrunerBase


_FINE = 16  # widths of one side at most
_SHARES = (0.25, 0.5, 1.0)
# Cuts at which the whole network is timed: how the parameters are shared, and how many stay.
_CUTS = (("uniform", 0.8), ("uniform", 0.6), ("uniform", 0.4), ("uniform", 0.25), ("global", 0.7), ("global", 0.45))
_LEAST = 0.01  # of the longest time of a kind: what a shorter one counts as
_DENSE = 3.0  # the dense network's weight in the fit


class Times(Protocol):
    """What times layers and networks on a device."""

    device: str
    runtime: str
    versions: dict[str, str]

    @abstractmethod
    def layers(self, points: Sequence[Point]) -> list[float]:
        """Milliseconds of layers by themselves."""

    @abstractmethod
    def networks(self, models: Sequence[Any]) -> list[float]:
        """Milliseconds of networks, taken in turn."""


def measure(
    times: Times, model: Any, pruner: Callable[[Any], PrunerBase], path: PathLike | None, alignment: int
) -> LatencyTable:
    """Time a network's layers by their widths, and the network whole at several cuts; what a table holds is not timed
    again.

    Args:
        times: what times.
        model: the network; it stays as it is.
        pruner: makes a pruner of a network.
        path: a table to add to and to keep the result in, or None.
        alignment: widths are timed at multiples of it.

    Returns:
        The table.

    Raises:
        FileFormatError: the file is of another device or runtime.
    """
    check.positive(alignment, "alignment")
    table = _begun(times, path)
    base = pruner(model).set_alignment(alignment)
    view = base._begun().coupling.view([])
    layers = timed_layers(view)
    _time_layers(times, table, layers, view.counts, alignment)
    networks, features = [model], [LatencyAccount(view, table, _PLAIN).features(np.array(list(view.counts.values())))]
    told: list[tuple[str, float]] = [("", 1.0)]
    for allocation, ratio in _CUTS:
        small = copy.deepcopy(model)
        cut = pruner(small).set_alignment(alignment).set_importance_evaluation_function("l1").set_allocation(allocation)
        cut._quiet = True  # wherever a cut lands is as good
        whole = cut._wanted_whole(None)
        desc = cut._planned(ratio, whole)
        seen = cut._begun().coupling.view(whole)
        variables = cut._report["variables"]
        keep = np.array([variables[n]["keep"] for n in seen.counts], dtype=np.int64)
        features.append(LatencyAccount(seen, table, _PLAIN).features(keep))
        cut.prune_by_desc(desc)
        networks.append(small)
        told.append((allocation, desc["made"]["reached"]))
    found = times.networks(networks)
    if not all(math.isfinite(ms) and ms > 0 for ms in found):
        check.wrong_value("the times of whole networks", "finite milliseconds above 0", found)
    table.networks[digest_of(view)] = _fitted(type(model).__name__, features, found, told)
    if path is not None:
        table.save(path)
    return table


_PLAIN = {"layers": 1.0, "elements": 0.0, "constant": 0.0}


def _begun(times: Times, path: PathLike | None) -> LatencyTable:
    if path is not None and files.as_path(path, "path").exists():
        table = LatencyTable.read(path)
        for name in ("device", "runtime", "versions"):
            if getattr(table, name) != getattr(times, name):
                raise FileFormatError(
                    f"{path} holds times of another {name}: {getattr(table, name)!r}, and here it is "
                    f"{getattr(times, name)!r}. Give another path"
                )
        return table
    return LatencyTable(times.device, times.runtime, 1, times.versions)


def _time_layers(
    times: Times, table: LatencyTable, layers: Sequence[TimedLayer], counts: Mapping[str, int], alignment: int
) -> None:
    """Add times of all kinds of these layers that the table lacks, or holds for narrower or fewer widths."""
    plans: dict[str, tuple[dict[str, Any], Widths, Widths]] = {}
    for layer in layers:
        spec, ins, outs = plans.setdefault(layer.kind, (layer.spec, Widths(), Widths()))
        ins.add(layer.n_in, counts, alignment, spec.get("in_a_group") or 1)
        outs.add(layer.n_out, counts, alignment, 1)
    points: dict[str, list[Point]] = {}
    for kind, (spec, ins, outs) in plans.items():
        known = table.layers.get(kind)
        if known is not None and ins.fine <= set(known["in"]) and outs.fine <= set(known["out"]):
            continue
        points[kind] = [(spec, i, o) for i, o in cross(ins, outs)]
    timed = times.layers([point for some in points.values() for point in some])
    if not all(math.isfinite(ms) and ms >= 0 for ms in timed):
        odd = next(ms for ms in timed if not math.isfinite(ms) or ms < 0)
        check.wrong_value("the times of layers", "finite milliseconds from 0 on", odd)
    found = iter(timed)
    for kind, some in points.items():
        _, ins, outs = plans[kind]
        measured = {(i, o): next(found) for _, i, o in some}
        rows, columns = sorted(ins.fine), sorted(outs.fine)
        table.put(kind, rows, columns, filled(measured, ins, outs))


class Widths:
    """Widths at which a side of a layer is timed.

    Attributes:
        fine: all of them, with the other side as wide as it gets.
        coarse: those of which every pair is timed.
    """

    def __init__(self) -> None:
        self.fine: set[int] = set()
        self.coarse: set[int] = set()

    def add(self, expr: Expr, counts: Mapping[str, int], alignment: int, unit: int) -> None:
        """Cover a layer's side: its full width, and what may be left of it."""
        full = size_of(expr, counts)
        self.fine.add(full)
        self.coarse.add(full)
        if isinstance(expr, int):
            return
        step = math.lcm(math.gcd(alignment, full), unit)
        every = range(step, full, step * max(1, -(-full // (step * _FINE))))
        self.fine.update(every)
        self.coarse.update(min(self.fine, key=lambda w: abs(w - full * share)) for share in _SHARES)


def cross(ins: Widths, outs: Widths) -> list[tuple[int, int]]:
    """The pairs of widths that are timed: a coarse grid, and each side finely where the other is widest."""
    pairs = {(i, o) for i in ins.coarse for o in outs.coarse}
    pairs |= {(i, max(outs.fine)) for i in ins.fine} | {(max(ins.fine), o) for o in outs.fine}
    return sorted(pairs)


def filled(measured: Mapping[tuple[int, int], float], ins: Widths, outs: Widths) -> list[list[float]]:
    """Times of all pairs of fine widths.

    t(i, o) = t(i, O) t(I, o) / t(I, O) r(i, o), with r the factor that makes it right on the coarse grid, linear
    between. The time of a small layer can come out as nothing beside the call's: none counts as less than a hundredth
    of the longest, so that no factor divides by nothing, and none comes out as longer than the longest.

    Args:
        measured: (width in, width out) -> time, of the pairs of `cross`.
        ins: widths in.
        outs: widths out.
    """
    longest = max(measured.values())
    if longest <= 0:
        return [[0.0] * len(outs.fine) for _ in ins.fine]
    ms = {pair: max(time, _LEAST * longest) for pair, time in measured.items()}
    rows, columns = sorted(ins.fine), sorted(outs.fine)
    by_in = np.array([ms[i, columns[-1]] for i in rows])
    by_out = np.array([ms[rows[-1], o] for o in columns])
    product = np.outer(by_in, by_out) / ms[rows[-1], columns[-1]]
    sparse = LatencyTable("", "", 1, {})
    some, other = sorted(ins.coarse), sorted(outs.coarse)
    told = [[ms[i, o] / product[rows.index(i), columns.index(o)] for o in other] for i in some]
    sparse.put("factor", some, other, told)
    low, high = np.meshgrid(np.clip(rows, some[0], some[-1]), np.clip(columns, other[0], other[-1]), indexing="ij")
    found = np.minimum(product * sparse.ms("factor", low.ravel(), high.ravel()).reshape(product.shape), longest)
    return [[round(float(x), 6) for x in row] for row in found]


def _fitted(
    name: str, features: Sequence[tuple[float, float]], found: Sequence[float], told: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """Coefficients that make times of layers into those of the whole network, least squares of relative errors."""
    from scipy.optimize import nnls

    wanted = np.asarray(found)
    rows = np.array([[layers, elements, 1.0] for layers, elements in features])  # (networks, 3)
    scale = np.maximum(rows.max(0), 1e-30)
    # A ratio is of the dense network's time, so that counts most.
    weight = np.where(np.arange(len(wanted)) == 0, _DENSE, 1.0) / wanted
    answer, _ = nnls(rows / scale * weight[:, None], wanted * weight)
    coefficients = answer / scale
    foretold = rows @ coefficients
    worst = float(np.abs(foretold / wanted - 1).max())
    if worst > BAD_FIT:
        logger.warning("latencies of %s are foretold up to %.0f %% off: its times vary, or widths do not say them",
                       name, 100 * worst)  # fmt: skip
    return {
        "model": name,
        "dense_ms": round(float(wanted[0]), 6),
        "layers": float(coefficients[0]),
        "elements": float(coefficients[1]),
        "constant": float(coefficients[2]),
        "fitted_to": [
            {"allocation": allocation, "params_kept": round(kept, 4), "ms": round(float(ms), 6),
             "foretold_ms": round(float(said), 6)}
            for (allocation, kept), ms, said in zip(told, found, foretold)
        ],
    }  # fmt: skip
