"""Putting deltas on a model and taking them off: the steps that both wings share, over a few questions to the wing.

A layer is never replaced. It becomes a delta layer in place, the same object under a subclass of its own class, and
plain again when its last delta leaves. So the layer's parameters exist once, whatever replaces them afterwards
(`load_state_dict(assign=True)`, untying, sharding, `set_data`), and all that hangs on the object stays true: hooks, a
forward somebody put on it, parametrisations, names, references to it, `isinstance`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit.core import check
from slimkit.core.delta import held_base, layered, owned
from slimkit.core.delta import spec as rules
from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import DeltaReport
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.freeze import matched, report_of
from slimkit.core.log import logger

FLAGS = "slimkit_flags_before_delta"


def apply_kind(
    access: DeltaFramework, model: Any, kind: Any, targets: Any, whole: Mapping[str, Callable[..., Any]], *,
    exclude: Any, strict: bool, dtype: Any, options: Mapping[str, Any], **how: Any,
) -> DeltaReport:  # fmt: skip
    """Put a delta of any kind on a model, in place; `whole` puts on the kinds that act on the whole model."""
    kind = check.choice(kind.lower() if isinstance(kind, str) else kind, rules.KINDS, "kind")
    if kind in whole:
        scope = {"strict": strict} if kind == "prefix" else {}
        put = functools.partial(whole[kind], model, targets, dtype=dtype, **scope)
        return apply_in_place(access, model, kind, put, options=options, **how)
    targets = "all-linear" if targets is None else targets
    return apply_layers(access, model, kind, targets, exclude=exclude, strict=strict, dtype=dtype, **how, **options)


def apply_layers(
    access: DeltaFramework,
    model: Any,
    kind: str,
    targets: Any,
    *,
    name: str = rules.DEFAULT_NAME,
    exclude: Any = None,
    freeze: bool = True,
    also_train: Any = None,
    strict: bool = True,
    dtype: Any = None,
    specs: Mapping[str, Any] | None = None,
    **options: Any,
) -> DeltaReport:
    """Put a delta of a layer kind on a model, in place; see `apply_delta` of the wings.

    Everything is decided and built before the model is touched.
    """
    rules.delta_name(name)
    _refuse_unknown(kind, options)
    access.at_rest(model)
    sites = access.sites(model)
    standing = access.layers(model)
    for path, layer in standing.items():
        if path in sites and sites[path].kind and (kind != "lora" or layer.delta_kind != "lora"):
            sites[path] = replace(sites[path], reason=f"it carries a delta of kind {layer.delta_kind!r} already")
    if specs is None:
        paths, skipped, unmatched = rules.choose(sites, kind, targets, exclude, strict=strict)
    else:
        paths, skipped, unmatched = list(specs), {}, ()
        for path in paths:
            site = sites[path]
            if site.kind not in rules.KINDS[kind] or site.reason:
                why = site.reason or f"a {site.type_name} cannot take {kind}"
                raise UnsupportedError(f"{path}: {why}.")
    taken = [p for p in paths if p in standing and name in standing[p].delta_specs]
    if taken:
        raise ArgumentError(f"{taken[0]} carries a delta named {name!r} already; choose another name or remove it.")
    merged = [p for p in paths if p in standing and standing[p].delta_is_merged]
    if merged:
        raise ArgumentError(f"the deltas of {merged[0]} are merged; unmerge them before another is added.")
    check.boolean(freeze, "freeze")
    flags, trained = _planned_flags(access, model, freeze, also_train)
    begun, notes = dict[str, Any](), list[str]()
    fresh = specs is None  # values that come from a file need no start of their own
    if specs is None and kind == "lora":
        specs, begun, notes = layered.loras(access, model, sites, paths, options)
    elif specs is None:
        specs = layered.specs(kind, sites, paths, options)
    elif kind == "lora":
        held_base.check(access, model, sites, specs)
    layer_options = {p: dict(options) if specs is None else specs[p].to_dict() for p in paths}
    described: dict[str, dict[str, Any]] = {p: {"type": sites[p].kind, **layer_options[p]} for p in paths}
    before = set(map(id, standing.values()))
    put: dict[int, Any] = {}  # a layer held under two paths carries one delta
    try:
        for path in paths:
            layer = access.module(model, path)
            if id(layer) not in put:
                if id(layer) not in before:
                    access.attach(kind, layer, name, dtype, layer_options[path])
                put[id(layer)] = layer
                if kind == "lora":
                    layer.add(name, (specs or {})[path], dtype, fresh=fresh, start=begun.get(path))
            described[path] |= layer.delta_options(name)  # what putting it on decided is in there too
    except Exception:
        for layer in put.values():
            if id(layer) not in before:
                access.detach(layer)
            elif name in layer.delta_specs:
                layer.drop_delta(name)
        raise
    access.attached(model, paths)
    _remember_flags(access, model)
    notes += owned.take(access, model, name, trained, freeze=freeze)
    _set_flags(access, model, flags)
    summary = str(report_of(access.parameters(model))).splitlines()[0]
    logger.info("%s %r on %d layers: %s", kind, name, len(paths), summary)
    for note in notes:
        logger.info("%s", note)
    return DeltaReport(kind, name, described, skipped, unmatched, summary, tuple(notes))


def apply_in_place(
    access: DeltaFramework,
    model: Any,
    kind: str,
    put: Callable[..., dict[str, dict[str, Any]]],
    *,
    name: str,
    freeze: bool,
    also_train: Any,
    options: Mapping[str, Any],
) -> DeltaReport:
    """Put a delta on a model that swaps no layer (prefix, prompt), in place; `put` does it and says where."""
    rules.delta_name(name)
    check.boolean(freeze, "freeze")
    _refuse_unknown(kind, options)
    flags, trained = _planned_flags(access, model, freeze, also_train)
    described = put(name=name, **options)
    _remember_flags(access, model)
    notes = owned.take(access, model, name, trained, freeze=freeze)
    _set_flags(access, model, flags)
    access.changed(model)
    summary = str(report_of(access.parameters(model))).splitlines()[0]
    logger.info("%s %r on %d layers: %s", kind, name, len(described), summary)
    return DeltaReport(kind, name, described, trainable=summary, notes=tuple(notes))


def _planned_flags(
    access: DeltaFramework, model: Any, freeze: bool, also_train: Any
) -> tuple[dict[str, bool], list[str]]:
    """Base parameter -> whether it shall train once the delta is on, and those that the delta brings along."""
    found = access.parameters(model)
    asked = matched(found, also_train, "exclude") if also_train is not None else set()
    readings = list(zip(found.names, found.readings()))
    trained = [name for name, (_, _, may_train) in readings if may_train and name in asked]
    flags = {
        name: (may_train and name in asked) or (now and not (freeze and rules.PREFIX not in name))
        for name, (_, now, may_train) in readings
    }
    return flags, [name for name in trained if rules.PREFIX not in name]


def _remember_flags(access: DeltaFramework, model: Any) -> None:
    """Note once how the base's parameters stood, each on the module that holds it, for the day the last delta leaves.

    On the modules, since a model may be wrapped or be part of another by then.
    """
    for _, module in access.holders(model):
        if FLAGS not in vars(module):
            flags = {key: bool(p.requires_grad) for key, p in access.own_parameters(module).items()}
            if flags:
                vars(module)[FLAGS] = flags


def _restore_flags(access: DeltaFramework, model: Any) -> None:
    """Let the base's parameters train as before the first delta, in place."""
    for _, module in access.holders(model):
        own = access.own_parameters(module)
        for key, trains in vars(module).pop(FLAGS, {}).items():
            if key in own and own[key].requires_grad != trains:
                own[key].requires_grad = trains


def _set_flags(access: DeltaFramework, model: Any, flags: Mapping[str, bool]) -> None:
    found = access.parameters(model)
    for parameter, (name, now) in zip(found.held, found.trains().items()):
        if flags.get(name, now) != now:
            parameter.requires_grad = flags[name]


def mergeable(access: DeltaFramework, model: Any) -> dict[str, Any]:
    """Path -> layer with deltas, where all of them can be put into weights that nothing else uses."""
    access.at_rest(model)
    layers = _layers(access, model)
    for path, layer in layers.items():
        try:
            layer.refuse_merging_deltas()
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None
    sources = [(path, source) for path, layer in layers.items() for source in layer.sources().values()]
    for (path, _), owners in zip(sources, access.owners(model, [source for _, source in sources])):
        if owners > 1:
            raise UnsupportedError(
                f"the weight of {path} is shared with another module, which merging would change; untie them first."
            )
    return layers


def merge(access: DeltaFramework, model: Any, *, unload: bool = False) -> DeltaReport:
    """Add every active LoRA to the weights, in place; see `merge_delta` of the wings."""
    check.boolean(unload, "unload")
    layers = mergeable(access, model)
    done = [p for p, layer in layers.items() if layer.delta_is_merged]
    if done and not unload:
        raise ArgumentError(f"the deltas are merged already ({done[0]}); unmerge_delta puts the weights back.")
    if unload:
        _refuse_built(layers)
    kinds = ", ".join(dict.fromkeys(layer.delta_kind for layer in layers.values()))
    described = {p: {n: layer.delta_options(n) for n in layer.delta_specs} for p, layer in layers.items()}
    here: list[Any] = []
    try:
        for layer in {id(x): x for x in layers.values()}.values():
            if not layer.delta_is_merged:
                layer.merge_deltas()
                here.append(layer)
    except Exception:
        for layer in here:
            layer.unmerge_deltas()
        raise
    if unload:
        for layer in {id(x): x for x in layers.values()}.values():
            layer.keep_merged_deltas()  # the merged weight is the weight from now on
        owned.keep_live(access, model)
        _detach(access, model, layers)
    access.changed(model)
    return DeltaReport(kinds, "merged", described)


def unmerge(access: DeltaFramework, model: Any) -> DeltaReport:
    """Put back the weights as they were before merging, bit for bit, in place."""
    access.at_rest(model)
    layers = {p: x for p, x in _layers(access, model).items() if x.delta_is_merged}
    if not layers:
        raise ArgumentError("the deltas of this model are not merged.")
    _refuse_unmerging(layers)
    for layer in {id(x): x for x in layers.values()}.values():
        layer.unmerge_deltas()
    access.changed(model)
    kinds = ", ".join(dict.fromkeys(x.delta_kind for x in layers.values()))
    return DeltaReport(kinds, "unmerged", {p: {"deltas": list(x.delta_specs)} for p, x in layers.items()})


def _refuse_unknown(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a kind does not have."""
    known = rules.OPTIONS[kind]
    for option in options:
        if option not in known:
            hint = check.near(option, [*known, "targets", "exclude", "also_train", "name"])
            raise ArgumentError(
                f"option of {kind} must be one of {', '.join(map(repr, known))}. Received: {option!r}{hint}"
            )


def _refuse_unmerging(layers: Mapping[str, Any]) -> None:
    for path, layer in layers.items():
        try:
            layer.refuse_unmerging_deltas()
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from None


def remove(access: DeltaFramework, model: Any, names: Any = None) -> DeltaReport:
    """Take deltas off a model, in place; see `remove_delta` of the wings."""
    layers = _layers(access, model)
    known = sorted({n for layer in layers.values() for n in layer.delta_specs})
    gone = known if names is None else check.strings([names] if isinstance(names, str) else names, "names")
    for name in gone:
        check.choice(name, known, "names")
    described = {p: {"removed": [n for n in x.delta_specs if n in gone]} for p, x in layers.items()}
    empty = {p: x for p, x in layers.items() if all(n in gone for n in x.delta_specs)}
    _refuse_built(empty)
    access.at_rest(model)
    _refuse_unmerging({p: x for p, x in layers.items() if x.delta_is_merged})
    owned.drop(access, model, gone, list(active_weights(access, model)))
    for layer in {id(x): x for x in layers.values()}.values():
        if layer.delta_is_merged:
            layer.unmerge_deltas()
        if any(n not in gone for n in layer.delta_specs):
            for name in [n for n in gone if n in layer.delta_specs]:
                layer.drop_delta(name)
    _detach(access, model, empty)
    access.activated(model)
    access.changed(model)
    return DeltaReport("", ", ".join(gone), {p: d for p, d in described.items() if d["removed"]})


def _refuse_built(layers: Mapping[str, Any]) -> None:
    """Refuse to take off what the model was built with."""
    built = [p for p, x in layers.items() if x.built_as_delta]
    if built:
        raise UnsupportedError(f"{built[0]} was built as a delta layer; there is no layer to put back in its place.")


def _detach(access: DeltaFramework, model: Any, layers: Mapping[str, Any]) -> None:
    """Let layers be plain again; when no delta is left in the model, the flags are what they were too."""
    for layer in {id(x): x for x in layers.values()}.values():
        access.detach(layer)
    access.taken_off(model)
    left = access.layers(model)
    if all(layer.delta_kind != "prefix" for layer in left.values()):
        access.without_prefix(model)
    if not left:
        access.settle(model)
        _restore_flags(access, model)


def activate(access: DeltaFramework, model: Any, names: Any) -> dict[str, float]:
    """Choose which named deltas act and with which weight, in place; see `set_delta` of the wings."""
    layers = _layers(access, model)
    known = sorted({n for layer in layers.values() for n in layer.delta_specs})
    if names is None or (isinstance(names, (Mapping, Sequence)) and not names):
        weights: dict[str, float] = {}
    else:
        weights = rules.weights_of(names, known)
    _refuse_merged(layers)
    for path, layer in layers.items():
        parts = [n for n, w in weights.items() if n in layer.delta_specs and w not in (0.0, 1.0)]
        if parts and layer.delta_kind != "lora":
            raise UnsupportedError(
                f"{path} carries {layer.delta_kind} {parts[0]!r}, which acts or does not: its weight must be 0 or 1. "
                f"Received: {weights[parts[0]]}"
            )
    acting = [n for n, w in weights.items() if w]
    found = list(owned.owned(access, model))
    owned.refuse_clash(found, acting)
    for layer in layers.values():
        layer.set_active_deltas(weights)
    owned.show_found(access, found, acting)
    access.activated(model)
    access.changed(model)
    return weights


def _refuse_merged(layers: Mapping[str, Any]) -> None:
    merged = [p for p, x in layers.items() if x.delta_is_merged]
    if merged:
        raise ArgumentError(f"the deltas are merged ({merged[0]}); unmerge them before choosing others.")


def active_weights(access: DeltaFramework, model: Any) -> dict[str, float]:
    """The deltas that act, with their weights."""
    found: dict[str, float] = {}
    for layer in access.layers(model).values():
        found.update({n: w for n, w in layer.active_deltas.items() if w})
    return found


@contextlib.contextmanager
def disabled(access: DeltaFramework, model: Any) -> Iterator[None]:
    """Run the base alone while the context is open; see `disable_delta` of the wings."""
    layers = _layers(access, model)
    _refuse_merged(layers)
    before = [(layer, dict(layer.active_deltas)) for layer in layers.values()]
    shown = list(active_weights(access, model))
    activate(access, model, {})
    try:
        yield
    finally:
        for layer, weights in before:
            layer.set_active_deltas(weights)
        owned.show(access, model, shown)
        access.activated(model)
        access.changed(model)


def _layers(access: DeltaFramework, model: Any) -> dict[str, Any]:
    layers = access.layers(model)
    if not layers:
        raise ArgumentError("the model carries no delta; apply_delta puts one on.")
    return layers
