"""What a framework does for the pruner; everything else about pruning is written once, in the core."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from slimkit.core.prune.attributes import Field
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.plan import Derived, PrunePlan
from slimkit.core.prune.rehearsal import Rehearsal
from slimkit.core.prune.solve import View

Array = np.ndarray[Any, Any]


class PruneFramework(Protocol):
    """What a framework does for the pruner; everything else is written once, here."""

    framework: str
    model: Any

    @property
    @abstractmethod
    def has_example(self) -> bool:
        """Whether an example of what the model takes was given, so that it can be run."""

    @property
    @abstractmethod
    def one_head_size(self) -> bool:
        """Whether code has one number for the size of queries, keys and values alike."""

    @abstractmethod
    def trace(self) -> Graph:
        """The model's graph."""

    @abstractmethod
    def show(self, examples: Sequence[Any]) -> None:
        """Trace these examples too, beside the one that the pruner was made with."""

    @abstractmethod
    def rehearse(self, plan: PrunePlan, view: View) -> Rehearsal:
        """Run or compile the cut model, leave the model as it was, and say where its code contradicts the plan.

        `view` is the coupling that the plan was made from; `trace` made its graph.
        """

    @abstractmethod
    def error_of(self, plan: PrunePlan) -> str | None:
        """The error that stops the model when it is cut so; None where it runs. The model is left as it was."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and floating-point buffer by path, tied ones once."""

    @abstractmethod
    def buffers(self) -> set[str]:
        """The paths among `shapes` that are no parameters."""

    @abstractmethod
    def read(self, path: str) -> Array | None:
        """A parameter's values, float32 or float64, not to be written to; None where it has none (meta device)."""

    @abstractmethod
    def rows(self, path: str, axis: int) -> Iterable[Any]:
        """A parameter's slices along an axis as tensors of the framework, float32 or float64, on its device; copies."""

    @abstractmethod
    def integers(self) -> dict[str, dict[str, int]]:
        """Module path -> its whole-number attributes, without those that the cut of its own weights settles."""

    @abstractmethod
    def config(self) -> dict[str, Field]:
        """Fields of the model's configuration that may say a width (`widths_of`); empty without one."""

    @abstractmethod
    def configured(self, changes: Mapping[str, Field]) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the model that the configuration builds with other values in some fields, by every path; None where
        it builds none, empty where a framework has no such configurations."""

    @abstractmethod
    def stacked(self) -> list[str]:
        """Paths of the modules that say that they hold experts, one matrix an expert in one parameter."""

    @abstractmethod
    def row_steps(self) -> Mapping[str, int]:
        """Parameter -> what its last axis stays a multiple of, so that the framework can still compute with it."""

    @abstractmethod
    def config_mismatch(self) -> str | None:
        """Where a model built afresh from the configuration differs from this one: "" nowhere, None without one."""

    @abstractmethod
    def computed(self) -> set[str]:
        """Paths of the parameters and buffers that a saved model lacks: loading by a configuration computes them."""

    @abstractmethod
    def derived(self, config: Mapping[str, tuple[Field, Field]]) -> Derived:
        """Numbers in the model that become others with the fields of its configuration, (before, after) each."""

    @abstractmethod
    def heads_told(
        self, config: Mapping[str, tuple[Field, Field]], among: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """Of some attributes (module -> names) those that become others with the fields of the configuration."""

    @abstractmethod
    def gradients(self, data: Iterable[Any], loss: Callable[..., Any] | None, square: bool) -> dict[str, Array]:
        """Mean gradient of each parameter over the batches, or the mean of its square."""

    @abstractmethod
    def activations(self, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Array]:
        """Mean absolute output of each channel of each layer."""

    @abstractmethod
    def signals(
        self, data: Iterable[Any], layers: Sequence[str], loss: Callable[..., Any] | None, seed: int
    ) -> Mapping[str, LayerSignal | ExpertSignal]:
        """What layers are given, or what the experts in a module say, and how much the loss depends on what they say;
        layers that are no plain product, and modules whose experts cannot be asked one by one, are left out."""

    @abstractmethod
    def cut(self, plan: PrunePlan, names: Mapping[str, str]) -> Callable[[], None]:
        """Cut the model in place and return a call that takes it back; on an error the model is as it was."""

    @abstractmethod
    def turn(self, values: Iterable[tuple[str, Array]], parted: Mapping[str, str]) -> Callable[[], None]:
        """Give parameters other values, in place, and return a call that takes it back; before that, those in `parted`
        no longer share theirs with another one."""

    @abstractmethod
    def snapshot(self) -> Any:
        """A copy of the model before the cut."""

    @abstractmethod
    def compensate(
        self, dense: Any, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float | None
    ) -> dict[str, Any]:
        """Refit the cut model's layers to the outputs of the snapshot, in place."""
