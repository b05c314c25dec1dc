"""Base parameters that train with a delta (a head): each delta has its own values, the base has its own as well.

The live parameter holds the values of the delta that acts, or the base's. The others lie aside, in a record on the
module that holds the parameter: attribute -> whose values are live, and owner -> (values, whether they train). The
base's owner is "".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.errors import UnsupportedError

RECORD = "slimkit_trained_with_delta"
BASE = ""


class Owned(NamedTuple):
    """One base parameter that deltas have values of their own for."""

    path: str
    module: Any
    key: str
    # {"live": owner, "aside": {owner: (values, trains)}}
    record: dict[str, Any]

    @property
    def owners(self) -> list[str]:
        """Everyone with values for it."""
        return [self.record["live"], *self.record["aside"]]

    @property
    def parameter(self) -> Any:
        """The live parameter, whichever object that is now."""
        return getattr(self.module, self.key)


def owned(access: DeltaFramework, model: Any) -> Iterator[Owned]:
    """Every base parameter that deltas have values of their own for."""
    for path, module in access.holders(model):
        for key, record in vars(module).get(RECORD, {}).items():
            yield Owned(f"{path}.{key}" if path else key, module, key, record)


def take(access: DeltaFramework, model: Any, name: str, parameters: Sequence[str], *, freeze: bool) -> list[str]:
    """Note that base parameters train with a delta from now on, in place; they start from the base's values.

    Another delta that has values of its own for one of them stops acting.

    Args:
        access: the wing.
        model: the model, the delta on it.
        name: the delta.
        parameters: paths of base parameters.
        freeze: whether the base stands still while no delta has values for them.

    Returns:
        A line about each delta that stopped acting.
    """
    known = {one.path: one for one in owned(access, model)}
    new = [p for p in parameters if p not in known or name not in known[p].owners]
    if not new:
        return []
    rivals = {n for p in new if p in known for n in known[p].owners if n != BASE}
    layers = list(access.layers(model).values())
    stopped = sorted(n for n in rivals if any(layer.active_deltas.get(n) for layer in layers))
    if stopped:
        for layer in layers:
            layer.set_active_deltas({n: w for n, w in layer.active_deltas.items() if n not in stopped})
        show(access, model, [n for layer in layers for n, w in layer.active_deltas.items() if w])
        access.activated(model)
    for path in new:
        holder, _, key = path.rpartition(".")
        module = access.module(model, holder)
        record = vars(module).setdefault(RECORD, {}).setdefault(key, {"live": BASE, "aside": {}})
        parameter = getattr(module, key)
        # Nobody else's values are live by now: a copy of the base's lies aside.
        record["aside"][BASE] = (access.exchange(parameter, None), parameter.requires_grad and not freeze)
        record["live"] = name
    return [f"{n!r} does not act any more: it and {name!r} each have values for {new[0]}" for n in stopped]


def refuse_clash(found: Iterable[Owned], names: Collection[str]) -> None:
    """Refuse to let deltas act together that have different values for the same parameter; `found` as by `owned`."""
    for one in found:
        both = [n for n in names if n in one.owners]
        if len(both) > 1:
            raise UnsupportedError(
                f"{both[0]!r} and {both[1]!r} each have values for {one.path}; only one of them can act at a time."
            )


def show(access: DeltaFramework, model: Any, names: Collection[str]) -> None:
    """Let every recorded parameter have the values of the delta among `names` that owns it, or the base's, in place."""
    show_found(access, owned(access, model), names)


def show_found(access: DeltaFramework, found: Iterable[Owned], names: Collection[str]) -> None:
    """As `show`, for the parameters that `owned` gave."""
    for one in found:
        wanted = next((n for n in names if n in one.owners), BASE)
        live, aside = one.record["live"], one.record["aside"]
        if wanted != live:
            (value, trains), parameter = aside.pop(wanted), one.parameter
            aside[live] = (access.exchange(parameter, value), parameter.requires_grad)
            one.record["live"], parameter.requires_grad = wanted, trains


def drop(access: DeltaFramework, model: Any, names: Collection[str], acting: Collection[str]) -> None:
    """Forget deltas' values, in place; what only they had values for has the base's again.

    Args:
        access: the wing.
        model: the model.
        names: the deltas that leave.
        acting: the deltas that act.
    """
    show(access, model, [n for n in acting if n not in names])
    for one in list(owned(access, model)):
        aside = one.record["aside"]
        one.record["aside"] = {n: v for n, v in aside.items() if n not in names}
        if set(one.owners) == {BASE}:
            _forget(one)


def keep_live(access: DeltaFramework, model: Any) -> None:
    """Let the live values be the base's from now on, in place, as after merging for good."""
    for one in list(owned(access, model)):
        _forget(one)


def values_of(access: DeltaFramework, model: Any, name: str) -> dict[str, Any]:
    """Path -> one delta's own values of base parameters: the parameter while they are live, else what lies aside."""
    return {
        one.path: one.parameter if one.record["live"] == name else one.record["aside"][name][0]
        for one in owned(access, model)
        if name in one.owners
    }


def _forget(one: Owned) -> None:
    records = vars(one.module)[RECORD]
    del records[one.key]
    if not records:
        del vars(one.module)[RECORD]
