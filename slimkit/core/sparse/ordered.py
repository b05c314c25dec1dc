"""Sums over calibration rows that come out alike, to the last bit, whatever number of processes makes them.

Process p of n has the batches p, p + n, p + 2 n, ... The product that one call of a layer adds is made by itself, in
the process that has the batch. In round i all processes have sent their i-th batch through; then the products of the
batches i n, i n + 1, ... are added to the total one by one, in this order, so that the total goes through the same
additions as in one process. Of the total each process keeps and adds to one part only: what it sends to the others in a
round is a whole product, and what it gets is its part of everybody's. In the end the parts go to those who need them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import Array, device_of, namespace, precision
from slimkit.core.sparse.maths.moments import SUMS, Moments


class OrderedSums:
    """Moments of some layers' inputs, summed batch by batch in one order over all processes.

    Args:
        host: the model.
        moments: layer -> moments without rows, made with `apart`; afterwards the sums over all processes.
    """

    def __init__(self, host: SparseFramework, moments: Mapping[str, Moments]) -> None:
        self._host, self._moments = host, moments
        self._n, self._rank = host.processes(), host.rank()
        self._calls: dict[str, list[Moments]] = {}

    def add(self, name: str, *inputs: Array) -> None:
        """Add the rows of one call; see Moments.add."""
        whole = self._moments[name]
        if self._n == 1 and whole.layer.kind != "conv2d":  # one product a call: it needs no memory of its own
            whole.add(*inputs)
            return
        call = whole.alike()
        call.add(*inputs)
        self._calls.setdefault(name, []).append(call)

    def ended(self) -> None:
        """This process has sent a batch through."""
        self._round(False)

    def close(self, readers: Mapping[str, Collection[int]]) -> None:
        """This process has sent all its batches through; wait for the others, and put the totals together.

        Args:
            readers: layer -> the processes that need its total; the others are left without one.
        """
        while self._n > 1 and not self._round(True):
            pass
        for name, moments in self._moments.items() if self._n > 1 else ():
            self._whole(moments, readers[name])

    def _round(self, done: bool) -> bool:
        """Add what every process's batch gave; whether all processes are done."""
        calls, self._calls = self._calls, {}
        if self._n == 1:
            for name, found in calls.items():
                for call in found:
                    self._moments[name].fold(call.facts(), {f: getattr(call, f) for f in call.facts()["has"]})
            return done
        told = {"done": done, "calls": {name: [call.facts() for call in found] for name, found in calls.items()}}
        every = self._host.gather(told)
        for name, moments in self._moments.items():
            facts = [part["calls"].get(name, []) for part in every]
            if any(facts):
                self._add(moments, calls.pop(name, []), facts)
        return all(part["done"] for part in every)

    def _add(self, moments: Moments, calls: list[Moments], facts: list[list[dict[str, Any]]]) -> None:
        """Add the calls of one layer by all processes, each to its own part of the total."""
        parts: list[list[dict[str, Array]]] = [[{} for _ in found] for found in facts]
        for field in SUMS:
            has = [[i for i, call in enumerate(found) if field in call["has"]] for found in facts]
            if not any(has):
                continue
            bounds = self._bounds(moments, field)
            mine = [calls[i].flat(field) for i in has[self._rank]]
            if len(mine) == 1:
                sent = mine[0]  # its parts lie in the order of the processes already
            else:
                pieces = [flat[bounds[r] : bounds[r + 1]] for r in range(self._n) for flat in mine]
                sent = namespace(self._weight(moments)).concat(pieces) if pieces else self._zeros(moments, 0)
            gives = [(bounds[r + 1] - bounds[r]) * len(mine) for r in range(self._n)]
            width = bounds[self._rank + 1] - bounds[self._rank]
            got = self._host.swap(sent, gives, [width * len(found) for found in has])
            at = 0
            for r, found in enumerate(has):
                for i in found:
                    parts[r][i][field] = got[at : at + width]
                    at += width
            for i in has[self._rank]:
                setattr(calls[i], field, None)  # what was sent need not stay in memory
        for told, arrays in zip(facts, parts):
            for fact, own in zip(told, arrays):
                moments.fold(fact, own)

    def _whole(self, moments: Moments, readers: Collection[int]) -> None:
        """Give the processes that need it all parts of a total."""
        for field in SUMS:
            part = getattr(moments, field)
            if part is None:
                continue
            bounds = self._bounds(moments, field)
            reads = [r in readers for r in range(self._n)]
            gives = [part.shape[0] * read for read in reads]
            gets = [(bounds[r + 1] - bounds[r]) * reads[self._rank] for r in range(self._n)]
            sent = namespace(part).concat([part] * sum(reads))
            setattr(moments, field, None)
            whole = self._host.swap(sent, gives, gets)
            if reads[self._rank]:
                moments.take(field, whole)

    def _bounds(self, moments: Moments, field: str) -> list[int]:
        """Where each process's part of a flat sum begins and ends."""
        size = moments.flat_size(field)
        return [size * r // self._n for r in range(self._n + 1)]

    def _weight(self, moments: Moments) -> Array:
        return self._host.weight(moments.layer.name)

    def _zeros(self, moments: Moments, n: int) -> Array:
        weight = self._weight(moments)
        dtype = precision(weight, moments.layer.n_in)
        return namespace(weight).zeros((n,), dtype=dtype, device=device_of(weight))
