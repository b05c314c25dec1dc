"""What the measuring of a large transformer asks of a framework."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from slimkit.core.checkpoint.weightfile import Array

# (path of a layer, its input, its output, the mask of the batch's tokens)
Seen = Callable[[str, Array, Any, Array | None], None]


class WeightsFramework(Protocol):
    """One model, as `core.weights.measuring` sees it."""

    @abstractmethod
    def classes(self) -> dict[str, str]:
        """Path of every layer -> the name of its class."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Path of every layer -> the number of its parameters."""

    @abstractmethod
    def matrices(self) -> dict[str, str]:
        """Path of every linear layer -> the name of its weight."""

    @abstractmethod
    def array(self, value: Any) -> Array:
        """The first tensor of what a layer gave, as NumPy."""

    @abstractmethod
    def watch(self, paths: Sequence[str], batches: Iterable[Any], seen: Seen) -> None:
        """Run the model over all batches, and call ``seen`` after each of the layers; the model stays as it is.

        A layer's input is a copy of what it was given first, since it may add to it in place; its output comes as the
        framework's.
        """
