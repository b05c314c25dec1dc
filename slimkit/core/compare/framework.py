"""What judging asks of a model in some framework."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from slimkit.core.errors import ArgumentTypeError, UnsupportedError


class CompareFramework(Protocol):
    """A framework as `core/compare` sees it. A source is a model, or a function without arguments that makes one.

    The wings say what a model and a tensor are and run them; what follows from that stands here once.
    """

    model_type: type
    model_word: str
    tensor_type: type

    def held(self, source: Any) -> bool:
        """Whether a source is a model in memory already."""
        return isinstance(source, self.model_type)

    def open(self, source: Any, name: str) -> Any:
        """The model of a source; ArgumentTypeError names what it is when it is none."""
        if not self.held(source) and not callable(source):
            raise ArgumentTypeError(
                f"{name} must be a {self.model_word}, or a function without arguments that makes one. "
                f"Received: {type(source).__name__}"
            )
        return self.check(source if self.held(source) else source(), name)

    def check(self, model: Any, name: str) -> Any:
        """The model that a source gave; ArgumentTypeError when it is none."""

    def evaluating(self, model: Any) -> AbstractContextManager[Any]:
        """Evaluation mode without gradients; modes are as before afterwards."""

    def logits(self, model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits (length, vocabulary) of one window of tokens (length,), float32 or float64; a decoder's are of what it
        predicts alone."""
        found = self.first(self.called(model, self.window(ids)))
        if found.ndim != 3 or len(found) != 1:
            raise UnsupportedError(
                "a language model must give logits (batch, length, vocabulary). "
                f"Received: {tuple(found.shape)} from {type(model).__name__}"
            )
        return self.numbers(found)[0]

    def read(self, model: Any, n: int) -> int:
        """How many tokens of a window of n are read and not predicted: half of them by an encoder, else the first."""
        return 1

    def called(self, model: Any, example: Any) -> Any:
        """What a model makes of a window or a batch."""

    def first(self, output: Any) -> Any:
        """The logits of an output, or its first tensor."""
        found = getattr(output, "logits", None)
        if found is None:
            found = output
            while not isinstance(found, self.tensor_type) and isinstance(found, (Mapping, tuple, list)) and len(found):
                found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
        if not isinstance(found, self.tensor_type):
            raise UnsupportedError(f"a model must give a tensor first. Received: {type(output).__name__}")
        return found

    def numbers(self, tensor: Any) -> np.ndarray[Any, Any]:
        """A tensor as an array, float32 where it is narrower."""

    def outputs(self, model: Any, batch: Any) -> np.ndarray[Any, Any]:
        """The first output for a batch, (samples, ...), without the rows of padding averaged in."""

    def figures(self, model: Any, example: Any) -> dict[str, Any]:
        """parameters, nonzero, bytes and macs of a model for one example."""
        measured = self.measured(model, example)
        return {
            "parameters": float(measured.parameters),
            "nonzero": float(measured.parameters - measured.zeros),
            "bytes": float(measured.parameter_bytes),
            "macs": float(measured.macs),
        }

    def measured(self, model: Any, example: Any) -> Any:
        """What `measure_model` says of a model for one example, unpriced."""

    def window(self, ids: np.ndarray[Any, Any]) -> Any:
        """A window of tokens as an example of what the model takes."""

    def forward(self, model: Any, example: Any) -> None:
        """One forward; it returns when the work is done."""

    def decode(self, model: Any, ids: np.ndarray[Any, Any], n_tokens: int) -> bool:
        """Generate greedily with a cache, one token a step; False where the model cannot."""
