"""What judging asks of a model in some framework."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np


class CompareFramework(Protocol):
    """A framework as `core/compare` sees it. A source is a model, or a function without arguments that makes one."""

    def held(self, source: Any) -> bool:
        """Whether a source is a model in memory already."""

    def open(self, source: Any, name: str) -> Any:
        """The model of a source; ArgumentTypeError names what it is when it is none."""

    def evaluating(self, model: Any) -> AbstractContextManager[Any]:
        """Evaluation mode without gradients; modes are as before afterwards."""

    def logits(self, model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits (length, vocabulary) of one window of tokens (length,), float32 or float64."""

    def outputs(self, model: Any, batch: Any) -> np.ndarray[Any, Any]:
        """The first output for a batch, (samples, ...), without the rows of padding averaged in."""

    def figures(self, model: Any, example: Any) -> dict[str, float]:
        """parameters, nonzero, bytes and macs of a model for one example."""

    def window(self, ids: np.ndarray[Any, Any]) -> Any:
        """A window of tokens as an example of what the model takes."""

    def forward(self, model: Any, example: Any) -> None:
        """One forward; it returns when the work is done."""

    def decode(self, model: Any, ids: np.ndarray[Any, Any], n_tokens: int) -> bool:
        """Generate greedily with a cache, one token a step; False where the model cannot."""
