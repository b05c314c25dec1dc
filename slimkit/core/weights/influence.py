"""Which blocks of a transformer to keep: block influence and the map it suggests (ShortGPT, Men et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.batch import tensors_in
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import ArgumentError
from slimkit.core.showing import Shown
from slimkit.core.weights.heads import best


@dataclass(frozen=True, repr=False)
class LayerSuggestion(Shown):
    """Blocks worth keeping.

    Args:
        pattern: finds a block's number in a parameter's name; for `PruneConfig.add_blocks_params`.
        layer_id_map: {new block: block of the large model}, in the old order.
        influence: for each block of the large model, how much it changes what runs through it: 1 - mean cosine.
    """

    pattern: str
    layer_id_map: dict[int, int]
    influence: list[float]


def find_stack(classes: Mapping[str, str], sizes: Mapping[str, int], blocks: str | None = None) -> list[str]:
    """The paths of a model's blocks: numbered modules of one class under one parent, the heaviest such stack.

    Args:
        classes: module path -> name of its class.
        sizes: module path -> number of its parameters.
        blocks: the parent's path, where the heaviest stack is not the one that is meant.

    Returns:
        The blocks' paths in order.

    Raises:
        ArgumentError: there is no stack of at least two blocks.

    Example:
        >>> find_stack({"h.0": "Block", "h.1": "Block", "head": "Linear"}, {"h.0": 5, "h.1": 5, "head": 9})
        ['h.0', 'h.1']
    """
    stacks: dict[tuple[str, str], list[str]] = {}
    for path, name in classes.items():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and blocks in (None, parent):
            stacks.setdefault((parent, name), []).append(path)
    found = [stack for stack in stacks.values() if len(stack) > 1]
    if not found:
        parents = sorted({p.rpartition(".")[0] for p in classes if p.rpartition(".")[2].isdigit()})
        where = "the model" if blocks is None else f"blocks={blocks!r}"
        raise ArgumentError(f"{where} must hold at least two numbered blocks of one class. Numbered: {parents}")
    stack = max(found, key=lambda paths: sum(sizes.get(p, 0) for p in paths))
    return sorted(stack, key=lambda p: int(p.rpartition(".")[2]))


class Influence:
    """Gathers, block by block, the cosine between what goes in and what comes out, over every token that counts."""

    def __init__(self, paths: Sequence[str], keep: int) -> None:
        self.paths = list(paths)
        self.keep = check.integer(keep, "keep", minimum=1, maximum=len(self.paths))
        self._sum = np.zeros(len(self.paths))
        self._count = np.zeros(len(self.paths))

    def add(self, path: str, before: Array, after: Array, mask: Array | None = None) -> None:
        """Add one batch.

        Args:
            path: the block's.
            before, after: (..., width) of equal shape.
            mask: (...), true where a token counts; None: everywhere, or where its shape does not fit.
        """
        if before.shape != after.shape:
            raise ArgumentError(
                f"block {path!r} turns {list(before.shape)} into {list(after.shape)}; it must keep the shape."
            )
        before, after = before.astype(np.float64), after.astype(np.float64)
        norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        cosine = np.sum(before * after, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
        weight = np.ones_like(cosine)
        if mask is not None and mask.shape == cosine.shape:
            weight = (mask != 0).astype(np.float64)
        at = self.paths.index(path)
        self._sum[at] += np.sum(cosine * weight)
        self._count[at] += np.sum(weight)

    def suggestion(self) -> LayerSuggestion:
        """The `keep` blocks of greatest influence; of equal ones the earlier stays."""
        if not self._count.all():
            raise ArgumentError(
                f"block {self.paths[int(np.argmin(self._count))]!r} was not run by the calibration data."
            )
        influence = 1.0 - self._sum / self._count
        kept = best(influence, self.keep)
        numbers = [int(p.rpartition(".")[2]) for p in self.paths]
        parent = self.paths[0].rpartition(".")[0].replace(".", r"\.")
        pattern = rf"{parent}\.(\d+)\." if parent else r"^(\d+)\."
        return LayerSuggestion(
            pattern, {new: numbers[old] for new, old in enumerate(kept.tolist())}, influence.tolist()
        )


def mask_of(batch: Any) -> Any:
    """The attention mask of a batch of keyword arguments, if it has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def first_tensor(value: Any) -> Any:
    """The first tensor in what a block takes or returns: itself, or the first of a tuple, list or dict."""
    return next(tensors_in(value), None)
