"""Batches of data: how one becomes a call of the model, and what a data set of them must be."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.core import check
from slimkit.core.log import logger


@dataclass(frozen=True)
class Call:
    """A ready call: a batch that a data set gave in another form, or what one part of a model hands to the next.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One batch as (args, kwargs): a tensor, a tuple or list of arguments, a mapping of keyword arguments, or a Call.

    Example:
        >>> as_call({"x": 1})
        ((), {'x': 1})
    """
    if isinstance(batch, Call):
        return batch.args, dict(batch.kwargs)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def without_labels(batch: Any, function: Callable[..., Any]) -> Any:
    """A labelled batch as the model takes it: of a tuple or list, only as many values as `function` has parameters.

    Args:
        batch: one batch; anything but a tuple or list comes back as it is.
        function: the model's forward or construct, bound.

    Returns:
        The batch without the values that are for the loss alone.

    Example:
        >>> without_labels(("image", "label"), lambda image: image)
        ('image',)
    """
    if not isinstance(batch, (tuple, list)):
        return batch
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return batch
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return batch[: sum(kind in positional for kind in kinds)]


class Steady:
    """A data set that is read again and again, and must give as many batches each time.

    Args:
        value: a re-iterable of batches.
        name: the argument's name, for the message.

    Raises:
        ArgumentError: while it is read, when it gives another number of batches than at first.

    Example:
        >>> [list(steady) for steady in [Steady([1, 2])] for _ in range(2)]
        [[1, 2], [1, 2]]
    """

    def __init__(self, value: Iterable[Any], name: str = "dataset") -> None:
        self._value, self._name, self._count = value, name, -1

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in self._value:
            yield batch
            count += 1
        if self._count < 0:
            self._count = count
        elif count != self._count:
            check.wrong_value(
                self._name, "a data set that gives the same batches each time", f"{self._count} batches, then {count}"
            )


def tensors_in(value: Any) -> Iterator[Any]:
    """The tensors of a framework in what a model takes or returns: itself, or those in its tuples, lists and dicts.

    Example:
        >>> list(tensors_in({"logits": None, "rows": [1, 2]}))
        []
    """
    if check.framework_of(value) in ("torch", "mindspore") and hasattr(value, "shape"):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def dataset(value: Any, name: str = "dataset") -> Iterable[Any]:
    """Refuse a data set that is empty, cannot be iterated, or can be iterated only once.

    What `create_tuple_iterator()` and `create_dict_iterator()` of a MindSpore pipeline give may be read only once; it
    is read into memory.

    Args:
        value: a list of batches, a data loader, or anything else that gives a fresh iterator each time.
        name: the argument's name, for the message.

    Returns:
        The same object, or its batches in a list.

    Example:
        >>> dataset([1, 2])
        [1, 2]
    """
    if isinstance(value, (str, bytes, Mapping)) or (check.framework_of(value) is not None and hasattr(value, "shape")):
        check.wrong_type(name, "a list of batches", value)
    if not isinstance(value, Iterable):
        check.wrong_type(name, "a list of batches", value)
    if type(value).__module__.startswith("mindspore.dataset.") and isinstance(value, Iterator):
        value = list(value)
        logger.info("%s: %d batches of a pipeline's iterator were read into memory", name, len(value))
    if isinstance(value, Iterator):
        check.wrong_type(name, "re-iterable (a list, a data loader); a generator can be read only once", value)
    if next(iter(value), None) is None:
        check.wrong_value(name, "a data set with at least one batch", value)
    return value


def digest(data: Sequence[Any], bytes_of: Callable[[Any], tuple[str, bytes] | None]) -> str:
    """What tells batches from others.

    Args:
        data: the batches.
        bytes_of: a tensor's type and shape, and its bytes; None for anything else.

    Example:
        >>> digest([{"x": 1}], lambda _: None) == digest([{"x": 1}], lambda _: None)
        True
    """
    made = hashlib.sha256()

    def feed(value: Any) -> None:
        found = bytes_of(value)
        if found is not None:
            made.update(found[0].encode())
            made.update(found[1])
        elif isinstance(value, dict) or hasattr(value, "items"):
            for key, item in value.items():
                made.update(str(key).encode())
                feed(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                feed(item)
        else:
            made.update(repr(value).encode())

    for batch in data:
        feed(batch)
        made.update(b"|")
    return made.hexdigest()
