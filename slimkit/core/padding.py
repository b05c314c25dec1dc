"""Which rows of what flows through a model are padding, by the masks in a batch."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from slimkit.core.batch import as_call
from slimkit.core.distill.masks import IGNORED

Array = np.ndarray[Any, Any]

# The keys and values of attention from a decoder to its encoder: they read what the encoder says.
_ACROSS = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value)(_proj)?$"
)


def given(batch: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """What a batch gives a function, by the names of its parameters, whether it gives it by name or by place.

    Args:
        batch: one batch.
        function: the model's forward or construct, bound.

    Returns:
        parameter -> value; values of a `*args` have no name and are left out.

    Example:
        >>> given((1, 2), lambda ids, attention_mask: None)
        {'ids': 1, 'attention_mask': 2}
    """
    args, kwargs = as_call(batch)
    names: list[str] = []
    if args:
        with contextlib.suppress(TypeError, ValueError):  # no signature
            kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
            names = [n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds]
    return {**dict(zip(names, args)), **kwargs}


class Padding:
    """The masks of one batch.

    Args:
        batch: one batch.
        function: the model's forward or construct, bound.
        to_array: makes an array of a tensor, None of anything else.
        two_sided: whether the model has an encoder and a decoder, whose texts differ.

    Example:
        >>> batch = {"input_ids": np.ones((1, 3)), "attention_mask": np.array([[1, 1, 0]])}
        >>> found = Padding(batch, lambda input_ids, attention_mask: None, lambda value: value, False)
        >>> found.real("fc", (1, 3, 8)).tolist(), found.real("fc", (3, 8)).tolist(), found.real("pooler", (1, 8))
        ([[True, True, False]], [True, True, False], None)
    """

    def __init__(
        self, batch: Any, function: Callable[..., Any], to_array: Callable[[Any], Any], two_sided: bool
    ) -> None:
        values = given(batch, function)
        self._two_sided = two_sided
        self._first = _flat(to_array(values.get("attention_mask")))
        self._second = _flat(to_array(values.get("decoder_attention_mask")))
        if self._second is None and values.get("decoder_input_ids") is None:
            # The decoder's text is made of the labels, one place on: a place without a label is padding.
            labels = to_array(values.get("labels"))
            self._second = _flat(None if labels is None else labels != IGNORED)

    def real(self, path: str, shape: tuple[int, ...]) -> Array | None:
        """Which rows of a tensor are no padding.

        Args:
            path: of the layer that is given the tensor or says it; "" for the model's answer.
            shape: (batch, position, ...), or (batch * position, ...).

        Returns:
            (batch, position) or (batch * position,) bool; None where the tensor has no such rows.
        """
        mask = self._second if self._two_sided and not _is_encoders(path) else self._first
        if mask is None:
            return None
        if len(shape) > 2 and tuple(shape[:2]) == mask.shape:
            return mask
        return mask.reshape(-1) if len(shape) == 2 and shape[0] == mask.size else None


def _flat(mask: Any) -> Array | None:
    """A mask (batch, position) as bool; None for none, and for those of pairs of positions."""
    return None if mask is None or np.ndim(mask) != 2 else np.asarray(mask) != 0


def _is_encoders(path: str) -> bool:
    return "encoder" in path.split(".") or _ACROSS.search(path) is not None
