"""Seeing what is multiplied with a weight that no module is called for: experts in one parameter, fused attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slimkit.core.sparse.experts import routed
from slimkit.sparse.slots import WeightSlot

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operator -> where its two factors stand among the arguments.
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


class Reads(TorchDispatchMode):
    """Calls ``seen(paths, rows)`` before each product with a watched weight, whatever Python code asks for it.

    All of torch's ways to apply a weight end in a few products of matrices, and an operand that is a view of a
    parameter shows by its address which part of it is meant.

    Args:
        model: the model.
        slots: path -> slot of the weights to watch.
        seen: gets the paths whose weights one product reads, its rows (rows, n_in), and for an expert which tokens
            they are, if that is known.
        valid: which tokens of the batch are no padding; None when all count.
        transposed: called with a path when its weight is read as (in, out) though its kind says (out, in), or the
            other way round; such reads are not passed on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        slots: Mapping[str, WeightSlot],
        seen: Callable[[list[str], torch.Tensor, torch.Tensor | None], None],
        valid: torch.Tensor | None = None,
        transposed: Callable[[str], None] = lambda _path: None,
    ) -> None:
        super().__init__()
        self._seen, self._transposed = seen, transposed
        self._places = []
        for path, slot in slots.items():
            weight = slot.weight(model)
            start = weight.data_ptr()
            self._places.append((start, start + weight.numel() * weight.element_size(), path, slot))
        self._places.sort(key=lambda place: place[0])
        self._valid = None if valid is None or bool(valid.all()) else valid
        self._picked: torch.Tensor | None = None  # the tokens gathered last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operator, then run it."""
        if func in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[func])
            if not self._look(left, right):
                self._look(right.mT, left.mT)  # a weight may stand on either side
        elif func is aten.linear.default:
            self._look(args[0], args[1].mT)
        elif func is aten._grouped_mm.default and len(args) > 2 and args[1].ndim == 3:
            start = 0
            for i, stop in enumerate(args[2].tolist()):
                self._look(args[0][start:stop], args[1][i])
                start = stop
        elif func is aten.index.Tensor and args[0].ndim == 2 and len(args[1]) == 1 and args[1][0] is not None:
            index = args[1][0]
            self._picked = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        return func(*args, **(kwargs or {}))

    def _look(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether `weight` is (part of) a watched one; what is multiplied with it is passed on."""
        start = weight.data_ptr()
        reach = sum((n - 1) * step for n, step in zip(weight.shape, weight.stride()))
        stop = start + (reach + 1) * weight.element_size()
        read = [(path, slot) for a, b, path, slot in self._places if start <= a and b <= stop]
        if not read:
            return False
        if weight.ndim == 3 and weight.stride(0) != 0:
            for a, w in zip(x, weight):
                self._look(a, w)
            return True
        if weight.ndim == 3:  # one matrix, expanded over the batch
            weight = weight[0]
        kind = _layout(weight)
        for path, slot in read:
            if kind != slot.kind:
                self._transposed(path)
        paths = [path for path, slot in read if slot.kind == kind]
        if paths:
            self._seen(paths, *self._rows(x.reshape(-1, x.shape[-1]), read[0][1]))
        return True

    def _rows(self, rows: torch.Tensor, slot: WeightSlot) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows that count, and which tokens they are."""
        valid = None if self._valid is None else self._valid.to(rows.device)
        if not isinstance(slot.index, int):
            if valid is not None and valid.numel() == len(rows):
                rows = rows[valid.T.reshape(-1)]  # attention puts tokens first, then samples
            return rows, None
        return routed(rows, self._picked, valid)


def _layout(weight: torch.Tensor) -> str:
    """How the (in, out) operand lies in memory: "linear" for rows of inputs per output, "conv1d" for the opposite."""
    return "linear" if weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0] else "conv1d"
