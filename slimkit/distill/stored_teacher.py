"""A teacher that stays in its folder: one block at a time is in memory, for some batches at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.chain import BlockChain, stack_of
from slimkit.core.batch import Call
from slimkit.core.distill.config import SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.errors import UnsupportedError
from slimkit.core.log import logger
from slimkit.distill import taps
from slimkit.stored import StoredModel, fill, to_meta

import torch

# Batches whose hidden states are in memory at once; for as many the folder is read once.
WALKED_TOGETHER = 32


class StoredTeacher:
    """Answers batches as the model of a folder does; what lies outside its blocks stays in memory.

    Args:
        source: the folder.
        labels: what is asked of it.

    Raises:
        ArgumentError: it has no stack of blocks.
        UnsupportedError: it lacks a tensor.
    """

    def __init__(self, source: Path, labels: Sequence[SoftLabel]) -> None:
        self._stored = StoredModel(source)
        halves = {place.dtype for place in self._stored.places.values()} & {"F16", "BF16"}
        if halves:  # CPUs are slow in them
            logger.info("the teacher computes in float32, its files stay %s", " and ".join(sorted(halves)))
            self._stored.compute = torch.float32
        self._labels, self._store, model = tuple(labels), taps.Store(), self._stored.model
        self._blocks = stack_of(model)
        self._chain = BlockChain(model, self._blocks)
        inside = tuple(b + "." for b in self._blocks)
        outside = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
        model.load_state_dict(self._stored.read(outside), strict=False, assign=True)
        model.tie_weights()
        model.requires_grad_(False)
        taps.attach(model, self._store, self._labels, "t")

    def answers(self, calls: Sequence[tuple[Any, Any]]) -> Iterator[list[np.ndarray]]:
        """For each call the labels' tensors, as float32 arrays."""
        batches = [Call(*call) for call in calls]
        hidden: list[torch.Tensor | None] = [None] * len(batches)
        seen: list[dict[int, torch.Tensor]] = [{} for _ in batches]
        for number, path in enumerate(self._blocks):
            block = self._stored.model.get_submodule(path)
            fill(block, path, self._stored.read(f"{path}.{name}" for name, _ in block.named_parameters()))
            with self._chain.at(number) as send:
                for index, batch in enumerate(batches):
                    hidden[index] = self._listen(seen[index], path, partial(send, batch, hidden[index]))
            to_meta(block)
        for index, batch in enumerate(batches):
            state = hidden[index]
            if state is None:
                raise UnsupportedError("teacher must be a model whose blocks pass hidden states straight to the next")
            output = self._listen(seen[index], None, partial(self._chain.rest, batch, state))
            found = [
                seen[index][place] if label.t_module else pick(output, label.t_output_idx, "teacher")
                for place, label in enumerate(self._labels)
            ]
            hidden[index] = None
            yield [tensor.float().cpu().numpy() for tensor in found]

    def _listen(self, seen: dict[int, torch.Tensor], block: str | None, run: Callable[[], Any]) -> Any:
        """Run something, and keep what the labels read in a block, or outside all of them."""
        self._store.listening, self._store.seen = True, {}
        result = run()
        self._store.listening = False
        for place, tensor in self._store.seen.items():
            path = self._labels[place].read("t").module or ""
            home = next((b for b in self._blocks if path == b or path.startswith(b + ".")), None)
            if home == block:
                seen[place] = tensor.detach().clone()
        return result
