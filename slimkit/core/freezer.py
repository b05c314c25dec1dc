"""Freezing by layer groups: indices, groups and what a call returns, for both wings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from slimkit.core import check
from slimkit.core.errors import ArgumentError
from slimkit.core.showing import Shown


class FreezerLayer(NamedTuple):
    """One layer or layer group of a ModelFreezer.

    Args:
        layer_group_idx: index of its layer group, counted from the front and from the back.
        module: the layer itself.
        is_frozen: whether any of its parameters is frozen; without parameters, whether it is in eval mode.
    """

    layer_group_idx: tuple[int, int]
    module: Any
    is_frozen: bool


LayerGroup = FreezerLayer


class Freezer(Shown, ABC):
    """The half of ModelFreezer that both wings share: indices, groups and what a call returns."""

    def __init__(self, model: Any, freeze_batch_norms: bool = False) -> None:
        self.model = model
        self.freeze_batch_norms = check.boolean(freeze_batch_norms, "freeze_batch_norms")
        self._groups = self._children(model)
        if not self._groups:
            raise ArgumentError("model must have at least one child module: its children are the layer groups.")
        for parameter in self._parameters(model):
            parameter.requires_grad = True

    def _rows(self) -> Iterator[tuple[str, Any]]:
        yield "model", type(self.model).__name__
        for layer in self.get_layer_groups():
            state = "frozen" if layer.is_frozen else "trains"
            yield f"group {layer.layer_group_idx[0]}", f"{type(layer.module).__name__}, {state}"

    @abstractmethod
    def _children(self, module: Any) -> list[Any]:
        """The direct children of a module."""

    @abstractmethod
    def _modules(self, module: Any) -> list[Any]:
        """The module and everything below it, in order."""

    @abstractmethod
    def _parameters(self, module: Any, *, own: bool = False) -> list[Any]:
        """The parameters that can train, of the module alone or with everything below it."""

    @abstractmethod
    def _is_batch_norm(self, module: Any) -> bool:
        """Whether the module is a batch norm of any kind."""

    @abstractmethod
    def _is_training(self, module: Any) -> bool:
        """Whether the module itself is in train mode."""

    @abstractmethod
    def _set_training(self, module: Any, mode: bool) -> None:
        """Set the module's own mode, not its children's."""

    def get_layer_groups(self) -> list[LayerGroup]:
        """The model's direct children in order, each a layer or a nest of layers.

        Returns:
            One LayerGroup(layer_group_idx, module, is_frozen) per child.
        """
        return [self._describe(group, index) for index, group in enumerate(self._groups)]

    def get_layers(self) -> list[FreezerLayer]:
        """The model's layers: every module without children, flattened, in order.

        Returns:
            One FreezerLayer(layer_group_idx, module, is_frozen) per layer.
        """
        return [
            self._describe(module, index)
            for index, group in enumerate(self._groups)
            for module in self._modules(group)
            if not self._children(module)
        ]

    def get_trainable_parameters(self) -> list[Any]:
        """The parameters that are not frozen, which training will update."""
        return [p for p in self._parameters(self.model) if p.requires_grad]

    def freeze(
        self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False
    ) -> dict[int, dict[str, list[Any]]]:
        """Freeze the layer groups between two indices, both inclusive, in place; by default all but the last.

        Args:
            from_index: first layer group; negative counts from the end.
            to_index: last layer group. Parameters held by the model itself go with group 0.
            set_modules_as_eval: also put the frozen modules into eval mode.

        Returns:
            Group index -> {"params": parameters that this call froze}, groups without any left out.

        Raises:
            ArgumentError: an index outside the model.
        """
        return self._switch(from_index, to_index, False, check.boolean(set_modules_as_eval, "set_modules_as_eval"))

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> dict[int, dict[str, list[Any]]]:
        """Unfreeze the layer groups between two indices, both inclusive, in place; by default all.

        Args:
            from_index: first layer group; negative counts from the end.
            to_index: last layer group.
            set_modules_as_training: also put the unfrozen modules into train mode.

        Returns:
            Group index -> {"params": parameters that this call unfroze}, ready for optimizer.add_param_group.

        Raises:
            ArgumentError: an index outside the model.
        """
        flag = check.boolean(set_modules_as_training, "set_modules_as_training")
        return self._switch(from_index, to_index, True, flag)

    def _describe(self, module: Any, index: int) -> FreezerLayer:
        parameters = self._parameters(module)
        frozen = any(not p.requires_grad for p in parameters) if parameters else not self._is_training(module)
        return FreezerLayer((index, index - len(self._groups)), module, frozen)

    def _switch(self, start: int, stop: int, trains: bool, set_mode: bool) -> dict[int, dict[str, list[Any]]]:
        first, last = sorted(self._index(i, name) for i, name in ((start, "from_index"), (stop, "to_index")))
        changed: dict[int, dict[str, list[Any]]] = {}
        for index in range(first, last + 1):
            modules = self._modules(self._groups[index])
            if not trains and not self.freeze_batch_norms:
                modules = [m for m in modules if not self._is_batch_norm(m)]
            parameters = [p for m in modules for p in self._parameters(m, own=True)]
            if index == 0:
                parameters += self._parameters(self.model, own=True)
            # By identity: a shared parameter is listed once, and tensors compare by value.
            switched = list({id(p): p for p in parameters if p.requires_grad != trains}.values())
            for parameter in switched:
                parameter.requires_grad = trains
            if switched:
                changed[index] = {"params": switched}
            for module in modules if set_mode else ():
                self._set_training(module, trains)
        return changed

    def _index(self, index: Any, name: str) -> int:
        n_groups = len(self._groups)
        check.integer(index, name, minimum=-n_groups, maximum=n_groups - 1)
        return int(index) % n_groups
