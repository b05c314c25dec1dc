"""What sparsity asks of a model in some framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from slimkit.core.sparse.maths.backend import Array
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.trained import TrainedBlock

Seen = Callable[..., None]


class PassedBlock(Protocol):
    """A block of a walk over files that only looks, with one way of inputs."""

    def pass_on(self) -> None:
        """Send every batch through the block as it is, also through the last one."""


class CalibratedBlock(Protocol):
    """A part of the model through which calibration data can be sent again and again.

    Attributes:
        feeds: layers in the order they are called, the same in every process; those that share one input together.
        joined: where layers' outputs join the residual stream, as far as `join` has learned it.
        reached: layer -> seconds of a forward over all batches until its call, as far as one was watched.
        names: its layers where they must be done before the next part, for it leaves memory then; empty elsewhere.
        rows: what an earlier run reported of its layers, where it has done them; None where they are to be done.
    """

    names: list[str]
    rows: Mapping[str, dict[str, Any]] | None
    feeds: list[tuple[str, ...]]
    joined: dict[str, str]
    reached: Mapping[str, float]

    def replay(self, names: Sequence[str], seen: Seen, ended: Callable[[], None] | None = None) -> None:
        """Send every batch through, calling ``seen(name, x, dense x, drift)`` at each call of the layers.

        Dense inputs and drifts (see Moments.add) may be None, or left out. `ended` is called after each batch.
        """

    def join(self) -> None:
        """Learn where layers' outputs join the residual stream; UnsupportedError where that cannot be known."""

    def outputs(self) -> Iterator[Array]:
        """What each batch gives as the part is now, in float32 and without the rows of padding."""

    def trained(self, inherited: float = 1.0) -> TrainedBlock | None:
        """The part to be trained once its layers are solved; None for what stands outside blocks.

        Args:
            inherited: which share of what the parts before have lost it is drawn to make up for.
        """

    def advance(self) -> None:
        """Take the outputs of the part as it is now as the inputs of the next."""


class SparseFramework(Protocol):
    """What the walk asks of a model in some framework.

    Attributes:
        keeps_masks: whether the whole model, and so all its masks, may be in memory at once.
        deals: whether every process is given all batches and takes every n-th, p, p + n, ..., so that the result is
            that of one process to the last bit; otherwise each process is given its own.
    """

    keeps_masks: bool
    deals: bool

    def not_finite(self) -> list[str]:
        """The parameters in memory that hold NaN or infinity."""

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Learn that a layer is done, and its row of the report."""

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """Every layer that can be sparse by name, and those that cannot with the reason; batches may help."""

    def weight(self, name: str) -> Array:
        """The layer's weight as an array."""

    def store(self, name: str, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place, in the parameter's own dtype and device, and shift the bias."""

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """The parts of the model, first to last; `residual` says that `join` will be asked of them."""

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember the weights and biases of the layers; the function returned puts them back."""

    def probing(self, dataset: Iterable[Any], names: Sequence[str]) -> Iterator[CalibratedBlock]:
        """The same parts for a walk that only looks."""

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """A plain JSON value that an earlier run has found out; else it is made."""

    def changes(
        self, probes: Sequence[Any], names: Sequence[str], variants: Sequence[Callable[[Sequence[str]], None]]
    ) -> list[list[float]]:
        """For each batch of this process the power of the model's output, and what each variant changes of it.

        A variant masks the layers that it is given, in place; afterwards the model is as it was.
        """

    def outputs(self, batch: Any) -> Any:
        """The model's first output for a batch, as a NumPy array without the rows of padding."""

    def processes(self) -> int:
        """How many processes share the calibration data."""

    def rank(self) -> int:
        """The number of this process, from 0."""

    def gather(self, value: Any) -> list[Any]:
        """A plain JSON value of every process, by its number."""

    def reduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Sums over all processes; exact where all but one give zeros."""

    def spread(self, array: Array, owner: int) -> Array:
        """What the process with that number has, in all: the others hand in an array of its shape and type."""

    def swap(self, sent: Array, gives: Sequence[int], gets: Sequence[int]) -> Array:
        """Give every process its part of a flat array, and get as many numbers of each, in the processes' order."""
