"""What a wing does to a model on behalf of the deltas: the questions and actions that the shared steps need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from slimkit.core.delta.face import DeltaFace
from slimkit.core.delta.peft import task_type
from slimkit.core.delta.positions import recognised
from slimkit.core.delta.spec import DeltaReport, Site
from slimkit.core.freeze import Parameters

Array = np.ndarray[Any, Any]


class DeltaTensor(Protocol):
    """What the shared steps ask of a tensor of either framework itself: a parameter, or a statistic beside it."""

    # Whether it trains; a statistic never does.
    requires_grad: bool
    shape: Any


class DeltaFramework(ABC):
    """What a wing does to a model on behalf of these steps."""

    @abstractmethod
    def sites(self, model: Any) -> dict[str, Site]:
        """Every module path with what it is."""

    @abstractmethod
    def layers(self, model: Any) -> dict[str, DeltaFace]:
        """Path -> layer, of the layers that hold a delta; a shared layer under each of its paths."""

    @abstractmethod
    def module(self, model: Any, path: str) -> Any:
        """The module at a path."""

    @abstractmethod
    def holders(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Every module of the base with a path, each once; those inside a delta are left out."""

    @abstractmethod
    def own_parameters(self, module: Any) -> dict[str, DeltaTensor]:
        """Attribute -> parameter of the base that a module holds itself."""

    def changed(self, model: Any) -> None:
        """Forget what was compiled from the model as it was before; nothing where nothing is."""
        return

    def settle(self, model: Any) -> None:
        """Undo what a delta needed around the layers, once the last one is off."""
        return

    def without_prefix(self, model: Any) -> None:
        """Undo what a prefix needed around the layers, once the last one is off."""
        return

    @abstractmethod
    def attach(self, kind: str, module: Any, name: str, dtype: Any, options: Mapping[str, Any]) -> None:
        """Let a layer carry deltas, in place: the same object with all it holds; a LoRA layer has no delta yet.

        Nothing is changed when an error is raised.
        """

    def detach(self, layer: Any) -> None:
        """Let a layer be what it was before `attach`, in place, with the parameters it has now."""
        layer.take_off_deltas()

    def attached(self, model: Any, paths: Sequence[str]) -> None:
        """Do what is needed around layers that carry a delta now, in place; nothing where nothing is."""
        return

    def taken_off(self, model: Any) -> None:
        """Follow, in place, that deltas were taken off layers; nothing where nothing outside them depends on it."""
        return

    def at_rest(self, model: Any) -> None:
        """Let every parameter be the one that lasts, in place, where a run leaves others in its place."""
        return

    def activated(self, model: Any) -> None:
        """Follow, in place, which deltas act now; nothing where nothing outside the layers depends on it."""
        return

    @abstractmethod
    def keeps_zeros(self, module: Any) -> bool:
        """Whether a layer's zeros were made on purpose and recorded: by slimkit, or by the framework's own pruning."""

    @abstractmethod
    def exchange(self, parameter: Any, value: Any) -> Any:
        """Give a parameter another value, in place; gives the value it had, which shares nothing with it.

        `value` is what an earlier exchange gave, or None to leave the parameter as it is.
        """

    @abstractmethod
    def holdable(self, module: Any) -> bool:
        """Whether a linear layer's weight can be held in fewer bits: whole, in memory, a plain parameter."""

    @abstractmethod
    def gradients(
        self, model: Any, paths: Sequence[str], batches: Sequence[Any], loss: Callable[..., Any] | None
    ) -> Iterator[tuple[str, Array]]:
        """Path and dL/dW (outputs, inputs) of linear layers, summed over batches; the model is as it was."""

    @abstractmethod
    def given(
        self,
        model: Any,
        paths: Sequence[str],
        batches: Sequence[Any],
        seen: Callable[[str, Array], None],
        loss: Callable[..., Any] | None = None,
    ) -> None:
        """Call ``seen(path, rows)`` with what each layer is given, (n, inputs), rows of padding left out.

        `loss` is what calls the model with a batch, where the model cannot be called with it as it is.
        """

    @abstractmethod
    def parameters(self, model: Any) -> Parameters:
        """Every parameter, as the freezing rules see it."""

    @abstractmethod
    def owners(self, model: Any, parameters: Sequence[Any]) -> list[int]:
        """How many different modules hold each of these parameters; one walk over the model for all."""


class DeltaStorage(DeltaFramework):
    """What a wing adds for files: values out of tensors and into them, under names that both wings share."""

    @abstractmethod
    def value(self, tensor: Any) -> Array:
        """A tensor's values as NumPy, in its own element type; see `slimkit.core.delta.tensors` for bfloat16."""

    @abstractmethod
    def fill(self, tensor: Any, value: Array) -> None:
        """Put values into a tensor, in place, in the tensor's own dtype and on its device."""

    @abstractmethod
    def take_dtype(self, tensor: Any, value: Array) -> None:
        """Give a delta's tensor the element type of the values that a file has for it, in place."""

    @abstractmethod
    def split(self, model: Any, names: Sequence[str]) -> None:
        """Give the places of these names one new tensor with the values they have, in place; others keep theirs."""

    @abstractmethod
    def sample(self, tensor: Any) -> Array:
        """At most 64 evenly spaced values of a tensor, as float32."""

    @abstractmethod
    def weight(self, model: Any, path: str) -> Any:
        """The weight of the layer at a path, as it was before any merging."""

    def base_sample(self, model: Any, path: str, weight: Any) -> Array:
        """A sample of the weight of the layer at a path, as it was before it was held in fewer bits."""
        known: Array | None = vars(self.module(model, path)).get("plain_sample")
        return self.sample(weight) if known is None else known

    @abstractmethod
    def apply_kind(self, model: Any, kind: str, targets: list[str] | None, **options: Any) -> DeltaReport:
        """Put a delta other than lora on a model."""

    def about(self, model: Any) -> dict[str, Any]:
        """What PEFT's configuration says of the base: its task, and where it came from."""
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        return {"task_type": task_type(type(model).__name__), "base_model_name_or_path": name or None}

    def prefix_sizes(self, model: Any, config: Mapping[str, Any]) -> Mapping[str, Sequence[int]] | None:
        """The attention layers that PEFT's configuration speaks of, where a run is not what finds them."""
        return None

    def prefix_form(self, model: Any, layers: Sequence[Any]) -> int:
        """PEFT's num_transformer_submodules for a prefix: 1, or 2 for one in the cache of an encoder-decoder model.

        Raises:
            UnsupportedError: PEFT has no such prefix.
        """
        return 1

    def positions(self, model: Any) -> list[str] | None:
        """Paths of the modules that are given position numbers, by their names; None where the wing knows them."""
        return recognised(self.sites(model))

    @abstractmethod
    def prefix_rows(self, model: Any, layers: Sequence[Any]) -> list[tuple[Array, Array]]:
        """Keys and values (tokens, heads * width) of the prefixes of layers, as they are outside training."""

    @abstractmethod
    def tables(self, model: Any, kind: str) -> list[Any]:
        """The embedding tables of prefix encoders or prompts that were built into the model by hand."""

    @abstractmethod
    def table_facts(self, model: Any, kind: str) -> dict[str, Any]:
        """What PEFT's configuration says of the one table: token_dim, num_layers, num_attention_heads."""

    @abstractmethod
    def may_train(self, tensor: Any) -> bool:
        """Whether an optimizer may touch a tensor of the base: a parameter that is no running statistic."""

    @abstractmethod
    def neutral(self, model: Any) -> dict[str, DeltaTensor]:
        """Base parameter and statistic -> tensor, by torch's names ("norm.weight", not "norm.gamma").

        A tensor that several places hold comes under the name of each.
        """

    def unsaved(self, model: Any) -> set[str]:
        """Those names of `neutral` that no file holds: what the model works out itself when it is made."""
        return set()
