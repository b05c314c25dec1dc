"""How files hold tensors that transformers puts together when it loads them: experts one by one, older names."""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property
from typing import Any

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)

import torch


class Layouts:
    """The conversions of one model between its parameters and the tensors of its files.

    Before version 5 transformers had none, and its parameters are what files hold.

    Args:
        model: a model of transformers; its weights may be on the meta device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    @cached_property
    def _loading(self) -> Any:
        """Where transformers converts; None before version 5."""
        try:
            from transformers import conversion_mapping, core_model_loading  # noqa: F401
        except ImportError:
            return None
        return core_model_loading

    @cached_property
    def _conversions(self) -> list[Any]:
        """Half a second of patterns: made where a parameter is not in the files as it is."""
        from transformers import conversion_mapping

        # A prefix that some files carry is looked for where tensors are looked for.
        return [
            c
            for c in conversion_mapping.get_model_conversion_mapping(self._model, add_legacy=False)
            if not isinstance(c, self._loading.PrefixChange)
        ]

    def split(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What files hold of a parameter: names and tensors; a tensor on the meta device gives meta tensors."""
        if self._loading is None or not self._conversions:
            return {name: value}
        return dict(self._loading.revert_weight_conversion(self._model, {name: value}))

    def join(self, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
        """The parameter again from all its pieces, in the order that `split` gave them."""
        kinds = self._loading.WeightConverter
        renamings = [c for c in self._conversions if not isinstance(c, kinds)]
        converters = [c for c in self._conversions if isinstance(c, kinds)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        whole: Any = None
        renamed = ""
        for key, tensor in pieces.items():
            renamed, pattern = self._loading.rename_source_key(key, renamings, converters)
            if pattern is None:
                return tensor  # only its name differs
            whole = whole or deepcopy(by_pattern[pattern])
            whole.add_tensor(renamed, key, pattern, tensor)
        (value,) = whole.convert(renamed, model=self._model, config=self._model.config).values()
        return value[0] if isinstance(value, list) else value
