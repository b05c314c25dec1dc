"""MiSS: one small matrix shared by all shards of a layer's inputs.

    y = W x + b + D' s        s_j = sum of the inputs i with i mod rank = j

so that the weight changes by D[i mod rank, o] at (o, i): every `rank` columns repeat. D is (rank, outputs), or
(rank, repeat) where the outputs repeat as well (PEFT's "mini"), and starts at zero.

Source: Kang & Yin 2024, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta.layers import check_dropout
from slimkit.core.delta.spec import Site
from slimkit.core.errors import ArgumentError

Array = np.ndarray[Any, Any]

PART = "mindpet_delta_miss.mindpet_delta_miss_block"  # below a layer


@dataclass(frozen=True)
class MissSpec:
    """One MiSS on one layer.

    Args:
        rank: rows of the shared matrix; 16 trains on a square layer what a LoRA of rank 8 does.
        repeat: width after which the outputs repeat; 0 for no repeating.
        dropout: share of the input dropped on the way into the matrix, in training.
    """

    rank: int = 16
    repeat: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check.positive(self.rank, "rank")
        check.integer(self.repeat, "repeat", minimum=0)
        check_dropout(self.dropout, "dropout")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def shape(self, outputs: int) -> tuple[int, int]:
        """The shape of the shared matrix."""
        return self.rank, self.repeat or outputs


def by_layer(
    sites: Mapping[str, Site], paths: Iterable[str], rank: Any = 16, repeat: Any = 0, dropout: Any = 0.0
) -> dict[str, MissSpec]:
    """Path -> MiSS, of each chosen layer.

    Raises:
        ArgumentError: a rank exceeds a layer's inputs, or `repeat` does not divide its outputs.

    Example:
        >>> by_layer({"q": Site("linear", (4, 6))}, ["q"], rank=3)["q"].shape(4)
        (3, 4)
    """
    dropout = float(dropout) if isinstance(dropout, int) and not isinstance(dropout, bool) else dropout
    spec = MissSpec(rank, repeat, dropout)
    paths = list(paths)
    for path in paths:
        outputs, inputs = sites[path].shape
        if spec.rank > inputs:
            raise ArgumentError(f"rank of {path} must be at most {inputs}, its inputs. Received: {spec.rank}.")
        if spec.repeat and outputs % spec.repeat:
            raise ArgumentError(f"repeat must divide the {outputs} outputs of {path}. Received: {spec.repeat}.")
    return dict.fromkeys(paths, spec)


def weight_change(block: Array, outputs: int, inputs: int) -> Array:
    """(outputs, inputs): what a shared matrix (rank, outputs or repeat) adds to the weight.

    Example:
        >>> weight_change(np.array([[1.0], [2.0]]), 1, 3).tolist()
        [[1.0, 2.0, 1.0]]
    """
    rank, width = block.shape
    return block[np.arange(inputs)[None, :] % rank, np.arange(outputs)[:, None] % width]
