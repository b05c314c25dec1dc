"""A cell becomes a delta layer in place, under a subclass of its own class, and plain again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from slimkit.core.delta.face import DeltaFace
from slimkit_ms import bridge

__all__ = ["DeltaLayer", "attach", "bridge", "forget"]


class DeltaLayer(DeltaFace):
    """The MindSpore side of a layer that carries deltas; the kinds put it before the layer's own class.

    `plain_construct` is the construct of the layer's own class, bound by name: graph mode resolves no `super()` in
    classes that are made at run time.
    """

    word = "Delta"
    plain_construct: Any

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What the layer's own class holds."""

    def leave(self) -> None:
        """Take everything off that the deltas put on the layer, in place."""
        raise NotImplementedError

    def take_off_deltas(self) -> None:
        """Be the plain layer again, in place; all deltas are gone."""
        assert self.plain_class is not None
        self.leave()
        self.__class__ = self.plain_class


def attach(cell: Any, mixin: Any) -> Any:
    """Let a cell carry deltas, in place: it stays the same object with all that it holds.

    Args:
        cell: the layer.
        mixin: what it becomes, before its own class.

    Returns:
        The cell.
    """
    kind: Any = type(cell)
    cell.__class__ = _class_of(mixin, kind)
    return cell


@functools.cache
def _class_of(mixin: Any, plain: Any) -> type:
    own = {"plain_class": plain, "plain_construct": plain.construct, "__module__": mixin.__module__}
    return type(f"{mixin.word}{plain.__name__}", (mixin, plain), own)


def forget(cell: Any, *names: str) -> None:
    """Take attributes off a cell, in place: values, operators, cells and parameters alike."""
    for name in names:
        for held in (cell.__dict__, cell._primitives, cell._cells, cell._params):
            held.pop(name, None)
