"""What a stored model gives once all its blocks were walked: what comes behind them runs on what left the last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from slimkit import bridge
from slimkit.replay import replaying
from slimkit.sparse.inputs import as_input, valid_tokens
from slimkit.sparse.residual import input_of
from slimkit.sparse.stored_inputs import StoredInputs
from slimkit.sparse.trained import output_of

import torch


def outputs(model: torch.nn.Module, batch: Any, hidden: torch.Tensor, blocks: Sequence[str], wraps: bool) -> Any:
    """The model's first output for a batch, as a float32 array without the rows of padding.

    Args:
        model: the model, with the weights outside its blocks.
        batch: the batch.
        hidden: what leaves the last block.
        blocks: the blocks' paths.
        wraps: whether blocks give a tuple.
    """

    def stub(path: str, *args: Any, **kwargs: Any) -> Any:
        x = hidden if path == blocks[-1] else input_of(args, kwargs)
        return (x,) if wraps else x

    modules = {b: bridge.get_module(model, b) for b in blocks}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = partial(stub, path)
        with replaying(model) as run:
            found = as_input(model, output_of(run(batch)), valid_tokens(batch))
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)
    return found.float().cpu().numpy()


def changes(
    model: torch.nn.Module, probes: Sequence[Any], inputs: Sequence[StoredInputs], blocks: Sequence[str]
) -> list[list[float]]:
    """For each batch the power of the model's output, and what variants change of it.

    Args:
        model: the model, with the weights outside its blocks.
        probes: the batches.
        inputs: what has left the last block: of the model as it is, and of each variant.
        blocks: the blocks' paths.
    """
    rows = []
    for index, batch in enumerate(probes):
        dense, *others = (outputs(model, batch, one.hidden(index), blocks, one.wraps) for one in inputs)
        rows.append([float((dense * dense).sum()), *(float(((o - dense) ** 2).sum()) for o in others)])
    return rows
