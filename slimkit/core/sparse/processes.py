"""Several processes on one model: calibration data is split, sums are added up, layers are solved by one each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from slimkit.core import errors
from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.call_order import CallOrder
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import Array, device_of, namespace, precision
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import SUMS, Moments
from slimkit.core.sparse.maths.solve import Solved
from slimkit.core.sparse.methods import METHODS

# What a process sends, roughly: enough to tell a gain from a loss.
BYTES_PER_SECOND = 5e8
SECONDS_PER_CALL = 2e-3


def agreed(host: SparseFramework, feeds: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The feeds of all processes: each may have seen other experts, in another order, and all must go on alike.

    Args:
        host: the model.
        feeds: layers in the order this process saw them called; those that share one input together.

    Returns:
        Every layer that any process saw, the same list in each; layers are together where all that saw them agree.
    """
    return merged([[tuple(feed) for feed in found] for found in host.gather([list(feed) for feed in feeds])])


def merged(every: Sequence[Sequence[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """One list of feeds out of several that saw other experts, in another order.

    Args:
        every: lists of layers in the order they were called; those that share one input together.

    Example:
        >>> merged([[("q", "k"), ("e1",)], [("q", "k"), ("e0",), ("e1",)]])
        [('q', 'k'), ('e0',), ('e1',)]
    """
    if all(found == every[0] for found in every):
        return list(every[0])
    order: list[str] = []
    for found in every:
        at = 0
        for name in (n for feed in found for n in feed):
            if name in order:
                at = order.index(name) + 1
            else:  # behind what was called before it
                order.insert(at, name)
                at += 1
    place = [{name: i for i, feed in enumerate(found) for name in feed} for found in every]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in order:
        groups.setdefault(tuple(p.get(name, -1) for p in place), []).append(name)
    return [tuple(names) for names in groups.values()]


class Crew(Protocol):
    """Processes that do one job."""

    def rank(self) -> int:
        """The number of this process, from 0."""

    def gather(self, value: Any) -> list[Any]:
        """A plain JSON value of every process, by its number."""


def first(host: Crew, work: Callable[[], Any]) -> Any:
    """Let the process with number 0 do something that must be done once; all get its result, or its error.

    Args:
        host: the processes, or a model that they share.
        work: returns a plain JSON value.
    """
    told: dict[str, Any] = {}
    own: Exception | None = None
    if host.rank() == 0:
        try:
            told = {"value": work()}
        except Exception as error:  # noqa: BLE001  (raised again once the others know)
            own = error
            told = {"kind": type(error).__name__, "error": str(error)}
    told = host.gather(told)[0]
    if own is not None:
        raise own
    if "error" in told:
        kind = getattr(errors, told["kind"], None)
        raise (kind if kind is not None else errors.ProcessLostError)(told["error"])
    return told["value"]


def dealt(host: SparseFramework, dataset: Iterable[Any]) -> list[tuple[Any, int]]:
    """The batches that are this process's in a walk of files, with their numbers: p, p + n, p + 2 n, ... of n."""
    n, rank = host.processes(), host.rank()
    return [(batch, i) for i, batch in enumerate(dataset) if i % n == rank]


def in_order(host: SparseFramework, own: Sequence[Any]) -> list[Any]:
    """One value for each batch of all processes, in the order of the batches that a walk of files deals out.

    Args:
        host: the model. Process p of n has the batches p, p + n, p + 2 n, ...
        own: a plain JSON value for each batch of this process.
    """
    every = host.gather(list(own))
    return [found[i] for i in range(max(map(len, every))) for found in every if i < len(found)]


def demand_tokens(host: SparseFramework, calls: CallOrder) -> None:
    """Refuse data of which every batch in every process is nothing but padding."""
    if not any(host.gather(calls.tokens)):
        raise ArgumentError(
            "dataset must hold tokens that are no padding. Received: batches whose attention_mask is zero everywhere"
        )


def add_up(host: SparseFramework, moments: Moments, weight: Array) -> None:
    """Add up one layer's moments over all processes, in place; a process may have seen none of its rows.

    Args:
        host: the model.
        moments: this process's sums.
        weight: the layer's weight, which says where to calculate.
    """
    if host.processes() < 2:
        return
    own = {"count": moments.count, "square": moments.dense_square, "inner": moments.dense_inner}
    every = host.gather({**own, "has": [f for f in SUMS if getattr(moments, f) is not None]})
    seen = [set(e["has"]) for e in every if e["count"]]
    if not seen:
        return
    layer, xp = moments.layer, namespace(weight)
    dtype, device = precision(weight, layer.n_in), device_of(weight)
    kept = [f for f in SUMS if all(f in has for has in seen)]
    # Rows of one process that have no dense counterparts spoil the pairing for all.
    moments.paired = moments.paired and "dense_total" in kept
    arrays = [
        xp.zeros(moments.shape(f), dtype=dtype, device=device) if getattr(moments, f) is None else getattr(moments, f)
        for f in kept
    ]
    totals = dict(zip(kept, host.reduce(arrays)))
    for name in SUMS:
        setattr(moments, name, totals.get(name))
    moments.count = sum(e["count"] for e in every)
    moments.dense_square = sum(e["square"] for e in every)
    moments.dense_inner = sum(e["inner"] for e in every)


def owners(layers: Sequence[SparseLayer], method: str, processes: int) -> dict[str, int]:
    """Which process solves which of some layers that do not wait for each other; empty where each had better do all.

    The most expensive layer goes first, each to the process that has least to do.

    Args:
        layers: the layers.
        method: how they are solved.
        processes: how many share the work.

    Example:
        >>> layers = [SparseLayer(n, "linear", (4096, 4096)) for n in "qkv"]
        >>> owners(layers, "hessian", 2)
        {'q': 0, 'k': 1, 'v': 0}
        >>> owners([SparseLayer(n, "linear", (16, 16)) for n in "qkv"], "hessian", 2)
        {}
    """
    if processes < 2 or len(layers) < 2:
        return {}
    costs = {x.name: METHODS[method].seconds(x) for x in layers}
    load = [0.0] * processes
    found: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: -costs[n]):
        found[name] = load.index(min(load))
        load[found[name]] += costs[name]
    saved = sum(load) - max(load)
    sent = sum(2 * 4 * x.size for x in layers) / BYTES_PER_SECOND + SECONDS_PER_CALL * len(layers)
    return found if saved > sent else {}


def exchange(
    host: SparseFramework,
    layers: Sequence[SparseLayer],
    owner: Mapping[str, int],
    solved: Mapping[str, Solved | Exception],
) -> Iterator[tuple[str, Solved]]:
    """Give every process what each has solved.

    Args:
        host: the model.
        layers: the layers, in an order that is the same everywhere.
        owner: layer -> the process that solved it.
        solved: what this process solved, or the error that kept it from it.

    Raises:
        Exception: the error of this process; ArgumentError in the others.
    """
    told: dict[str, Any] = {}
    for name, result in solved.items():
        if isinstance(result, Exception):
            told[name] = {"error": str(result)}
        else:
            told[name] = [result.account, result.bias_shift is not None]
    accounts = {name: found for part in host.gather(told) for name, found in part.items()}
    for layer in layers:
        if isinstance(accounts[layer.name], dict):
            own = solved.get(layer.name)
            raise own if isinstance(own, Exception) else ArgumentError(accounts[layer.name]["error"])
    for layer in layers:
        account, shifted = accounts[layer.name]
        weight = host.weight(layer.name)
        xp, dtype, device = namespace(weight), precision(weight, layer.n_in), device_of(weight)
        own, shape = solved.get(layer.name), (layer.groups, layer.n_out, layer.n_in)
        if isinstance(own, Solved):
            arrays = [xp.astype(layer.to_matrix(own.weight), dtype)]
            arrays += [xp.astype(layer.to_matrix(own.keep), xp.uint8)] if host.keeps_masks else []
            arrays += [xp.astype(own.bias_shift, dtype)] if own.bias_shift is not None else []
        else:
            shapes: list[tuple[tuple[int, ...], Any]] = [(shape, dtype)]
            shapes += [(shape, xp.uint8)] if host.keeps_masks else []
            shapes += [((layer.groups * layer.n_out,), dtype)] if shifted else []
            arrays = [xp.empty(s, dtype=d, device=device) for s, d in shapes]
        new, *rest = (host.spread(a, owner[layer.name]) for a in arrays)
        keep = layer.from_matrix(rest.pop(0) > 0) if host.keeps_masks else None
        yield layer.name, Solved(layer.from_matrix(new), keep, rest[0] if shifted else None, account)
