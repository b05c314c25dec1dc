"""How a model reads text: what a framework says of it to whoever makes windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TextReader:
    """How a model reads text.

    Args:
        tokenizer: its own.
        max_length: tokens that it takes at most.
        causal: whether it is a language model that reads from left to right, which may see packed documents.
        make: (tokens, mask), both (batch, length) -> a batch of what it takes.
    """

    tokenizer: Any
    max_length: int
    causal: bool
    make: Callable[[Array, Array], Any]
