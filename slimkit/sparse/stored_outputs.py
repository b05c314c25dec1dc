"""What a stored model gives once all its blocks were walked: what comes behind them runs on what left the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit.chain import BlockChain
from slimkit.sparse.inputs import as_input, valid_tokens
from slimkit.sparse.stored_inputs import StoredInputs
from slimkit.sparse.trained import output_of

import torch


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

        def answered(one: StoredInputs) -> Any:
            """The first output as a float32 array without the rows of padding."""
            given = BlockChain(model, blocks, one.wraps).rest(batch, one.hidden(index))  # noqa: B023
            return as_input(model, output_of(given), valid_tokens(batch)).float().cpu().numpy()  # noqa: B023

        dense, *others = map(answered, inputs)
        rows.append([float((dense * dense).sum()), *(float(((o - dense) ** 2).sum()) for o in others)])
    return rows
