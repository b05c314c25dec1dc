"""Nested states of optimizers and generators as JSON beside a file of tensors: what others pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import FileFormatError, UnsupportedError

_PLAIN = (str, bool, int, type(None))
_KINDS = "biuf"  # NumPy's whole and floating numbers


def pack(value: Any, keep: Callable[[Any], str | None]) -> Any:
    """A nested value as JSON; tensors are handed to `keep`, which stores them and returns their name.

    Args:
        value: dicts with any plain keys, lists, tuples, str, bool, int, float, None, tensors, NumPy's numbers.
        keep: stores a tensor and returns its name, or None for anything else.

    Returns:
        A JSON value from which `unpack` makes the same nested value.

    Raises:
        UnsupportedError: a value of another kind, named by its path's end.

    Example:
        >>> unpack(pack({1: (2.5, None)}, lambda v: None), {}.__getitem__)
        {1: (2.5, None)}
    """
    name = keep(value)
    if name is not None:
        return {"tensor": name}
    if isinstance(value, np.generic) and value.dtype.kind in _KINDS:
        value = value.item()
    if isinstance(value, str) and value:
        check.text(value, "a text in a checkpoint")
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS and value.dtype.itemsize <= 8:
        flat = value.reshape(-1).tolist()  # Python's numbers hold each of these to the last bit
        packed = [repr(v) for v in flat] if value.dtype.kind == "f" else flat
        return {"array": packed, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {"dict": [[pack(k, keep), pack(v, keep)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, keep) for v in value]}
    raise UnsupportedError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}")


def unpack(packed: Any, fetch: Callable[[str], Any]) -> Any:
    """What `pack` was given; tensors are fetched by name.

    Raises:
        FileFormatError: not made by `pack`, or a tensor is missing.
    """
    if isinstance(packed, _PLAIN):
        return packed
    try:
        if len(packed) == 1:
            ((kind, body),) = packed.items()
            if kind == "tensor":
                return fetch(body)
            if kind == "float":
                return float(body)
            if kind == "dict":
                return {unpack(k, fetch): unpack(v, fetch) for k, v in body}
            if kind in ("list", "tuple"):
                items = [unpack(v, fetch) for v in body]
                return items if kind == "list" else tuple(items)
        numbers = np.array(packed["array"], dtype=packed["dtype"])
        return numbers.reshape(packed["shape"]) if "shape" in packed else numbers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the checkpoint's state is damaged: {error!r}") from None
