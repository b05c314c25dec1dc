"""A layer becomes a delta layer in place, under a subclass of its own class, and plain again."""

from __future__ import annotations

import copyreg
import functools
import sys
import types
from typing import TYPE_CHECKING, Any

from slimkit import bridge
from slimkit.core.delta.face import DeltaFace
from slimkit.core.errors import UnsupportedError
from slimkit.sharded import sharded_class

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

__all__ = ["DeltaLayer", "attach", "bridge", "device_for", "layer_class"]


_OWN = "forward_under_delta"  # holds the forward that was put on a layer, while the layer carries deltas


class DeltaLayer(DeltaFace):
    """The torch side of a layer that carries deltas; the kinds put it before the layer's own class."""

    word = "Delta"
    # What the plain layer calls with its weight, and at which places of that call weight and input stand.
    reads: tuple[tuple[Any, int, int], ...] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What the layer's own class holds."""

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """The plain layer's output with the deltas in it.

        Args:
            out: what the plain layer gives for `x`.
            x: its input; layers that come after the plain one need none.
            low: (input, a) -> what the plain layer computes with `a` for its weight; None for the layer's own way.
        """
        raise NotImplementedError

    def taken(self, args: Any) -> Any:
        """The arguments that the plain layer gets, where it is run by a forward of somebody else's."""
        return args

    def without_bias(self, given: list[Any]) -> list[Any]:
        """The arguments of a call in `reads` without the layer's bias."""
        raise NotImplementedError

    def leave(self) -> None:
        """Take everything off that the deltas put on the layer, in place."""
        raise NotImplementedError

    def take_off_deltas(self) -> None:
        """Be the plain layer again, in place; all deltas are gone."""
        assert self.plain_class is not None
        self.leave()
        if _OWN in vars(self):
            vars(self)["forward"] = vars(self).pop(_OWN)
        mine = next(c for c in type(self).__mro__ if "made_of" in vars(c))
        self.__class__ = _rebased(type(self), mine, self.plain_class)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: by its parts it can be found again, in copies and in pickles.
        made_of = vars(type(self)).get("made_of")
        return super().__reduce_ex__(protocol) if made_of is None else (_bare, made_of, dict(self.__dict__))


def attach(layer: nn.Module, mixin: Any) -> Any:
    """Let a layer carry deltas, in place: it stays the same object with all that it holds.

    Args:
        layer: the layer.
        mixin: what it becomes, before its own class.

    Returns:
        The layer.
    """
    plain, patched = layer_class(layer), "forward" in vars(layer)
    if patched:
        # Where it would be found before the class's own it must not stay: a compiler calls what it finds there.
        vars(layer)[_OWN] = vars(layer).pop("forward")
    layer.__class__ = _rebased(type(layer), plain, _class_of(mixin, plain, patched))
    return layer


def layer_class(layer: nn.Module) -> type:
    """The class of a layer beneath those that parametrisations and FSDP put over it."""
    kind = type(layer)
    while True:
        if parametrize.is_parametrized(layer) and any(
            isinstance(vars(kind).get(name), property) for name in layer.parametrizations
        ):
            kind = kind.__bases__[0]
        elif sharded_class() is not None and kind.__bases__[0] is sharded_class():
            kind = kind.__bases__[1]
        else:
            return kind


@functools.cache
def _class_of(mixin: Any, plain: Any, patched: bool) -> type:
    bases = (_Patched, mixin, plain) if patched else (mixin, plain)
    own = {"plain_class": plain, "made_of": (mixin, plain, patched), "__module__": mixin.__module__}
    return types.new_class(f"{mixin.word}{plain.__name__}", bases, {}, lambda names: names.update(own))


def _bare(mixin: Any, plain: Any, patched: bool) -> Any:
    kind = _class_of(mixin, plain, patched)
    return copyreg.__newobj__(kind)  # type: ignore[attr-defined]  # typeshed leaves it out


def _rebased(kind: type, old: type, new: type) -> type:
    """`kind` with `new` where it derives from `old`: classes made at run time stand over the layer's own."""
    if kind is old:
        return new
    bases = tuple(_rebased(b, old, new) if issubclass(b, old) else b for b in kind.__bases__)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(
        kind.__name__.replace(old.__name__, new.__name__), bases, {}, lambda names: names.update(own)
    )


def device_for(layer: nn.Module) -> torch.device:
    """Where a delta's parameters go: beside the weight, or where a hook brings a weight that lies elsewhere."""
    weight: Any = layer.weight
    hook = vars(layer).get("_hf_hook")
    if not weight.is_meta or hook is None:
        return weight.device
    # Hooks of accelerate come in chains; the last that names a device is the one that the weight is brought to.
    places = [vars(one).get("execution_device") for one in vars(hook).get("hooks", (hook,))]
    place = next((p for p in reversed(places) if p is not None), "cpu")
    return torch.device(place)


class _Forward:
    """The `forward` of a layer that had one of its own before the delta came; the layer goes on holding that one."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        return _through if layer is None else types.MethodType(_through, layer)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[_OWN] = value

    def __delete__(self, layer: Any) -> None:
        if vars(layer).pop(_OWN, None) is None:
            raise AttributeError("forward")


class _Patched(DeltaLayer):
    """A layer whose own forward was replaced on the object (a hook of accelerate, a patch) before the delta came."""

    forward = _Forward()


def _through(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward that was put on a layer, with the delta where that comes to use the weight."""
    if not isinstance(layer, _Patched):  # somebody kept this, and the delta is off
        return type(layer).forward(layer, *args, **kwargs)
    own = vars(layer).get(_OWN)
    plain: Any = layer.plain_class
    if own is None:
        return super(_Patched, layer).forward(*args, **kwargs)  # type: ignore[misc]  # the kind's, next in line
    if vars(layer).get("delta_is_running"):
        return plain.forward(layer, *args, **kwargs)
    # A forward of somebody else's moves and replaces what the layer holds; what is the delta's it never knew.
    aside = {k: v for held in (layer._parameters, layer._buffers) for k, v in held.items() if "mindpet_delta_" in k}
    places = {k: layer._parameters if k in layer._parameters else layer._buffers for k in aside}
    for key, held in places.items():
        vars(layer)[key] = held.pop(key)
    vars(layer)["delta_is_running"] = True
    try:
        if not layer.delta_acts:
            return own(*args, **kwargs)
        if not layer.reads:
            return layer.acted(own(*layer.taken(args), **kwargs))
        # A compiler takes the mode apart, and counts the delta twice.
        inside = _not_compiled(_inside) if "torch._dynamo" in sys.modules else _inside
        return inside(layer, own, args, kwargs)
    finally:
        del vars(layer)["delta_is_running"]
        for key, held in places.items():
            held[key] = vars(layer).pop(key)


def _not_compiled(function: Any) -> Any:
    return torch.compiler.disable(function)


def _inside(layer: Any, own: Any, args: Any, kwargs: Any) -> Any:
    """Run somebody else's forward with the delta where it uses the layer's weight."""
    with _Reading(layer) as reading:
        out = own(*args, **kwargs)
    if not reading.met:
        name = layer.plain_class.__name__
        raise UnsupportedError(
            f"a forward was put on this {name} that does not use its weight as {name} does, so its delta cannot act; "
            f"put the delta on before that forward, or remove one of the two."
        )
    return out


class _Reading(TorchFunctionMode):
    """Add the delta where a layer's weight is used, whoever calls."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.met = layer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for reader, weight_at, input_at in self.layer.reads:
            if func is reader and len(args) > max(weight_at, input_at) and args[weight_at] is self.layer.weight:
                self.met = True

                low = functools.partial(self._with_factor, func, args, kwargs, weight_at, input_at)
                return self.layer.acted(out, args[input_at], low=low)
        return out

    def _with_factor(self, func: Any, args: Any, kwargs: Any, weight_at: int, input_at: int, x: Any, a: Any) -> Any:
        """The same call for the input `x`, with `a` for the weight and without the bias."""
        given = list(args)
        given[input_at], given[weight_at] = x, a
        return func(*self.layer.without_bias(given), **kwargs)
