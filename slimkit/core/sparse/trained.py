"""What the training of a block asks of the block in some framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from slimkit.core.sparse.maths.backend import Array


class TrainedBlock(Protocol):
    """A block whose parameters are trained; arrays are those of the framework, float32."""

    def sizes(self) -> Sequence[int]:
        """How many samples each batch has."""

    def start(self) -> dict[str, Array]:
        """Copies of the parameters to train, by name."""

    def free(self) -> Mapping[str, Array]:
        """Where their entries may change: ones, and zeros where a weight is zero."""

    def target(self, index: int) -> tuple[Array, Array | None]:
        """What a batch's output should be, samples first, and which tokens (samples, tokens) count; None for all."""

    def loss(self, values: Mapping[str, Array], index: int, weights: Array) -> float:
        """The sum of weights (output - target)^2 with these parameters."""

    def slope(self, values: Mapping[str, Array], index: int, weights: Array) -> tuple[float, dict[str, Array]]:
        """The same about what training draws the output to, and its gradient by the parameters."""

    def keep(self, values: Mapping[str, Array]) -> None:
        """Put the parameters in place."""
