"""Putting deltas on a model and taking them off: the steps that both wings share, over a few questions to the wing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit.core import check
from slimkit.core.delta import spec as rules
from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import DeltaReport, LoraSpec
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.freeze import matched, report_of
from slimkit.core.log import logger

FLAGS = "slimkit_flags_before_delta"
LAYER_KINDS = ("lora", "adapter", "low_rank_adapter")


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
    specs: Mapping[str, LoraSpec] | None = None,
    **options: Any,
) -> DeltaReport:
    """Put a delta of a layer kind on a model, in place; see `apply_delta` of the wings.

    Everything is decided and built before the model is touched.
    """
    rules.delta_name(name)
    for option in options:
        check.choice(option, rules.OPTIONS[kind], f"option of {kind}")
    sites = access.sites(model)
    standing = access.layers(model)
    for path, layer in standing.items():
        if path in sites and (kind != "lora" or layer.delta_kind != "lora"):
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
    taken = [p for p in paths if p in standing and name in standing[p].specs]
    if taken:
        raise ArgumentError(f"{taken[0]} carries a delta named {name!r} already; choose another name or remove it.")
    merged = [p for p in paths if p in standing and getattr(standing[p], "unmerged", None) is not None]
    if merged:
        raise ArgumentError(f"the deltas of {merged[0]} are merged; unmerge them before another is added.")
    check.boolean(freeze, "freeze")
    flags = _planned_flags(access, model, freeze, also_train)
    notes: list[str] = []
    fresh = specs is None  # values that come from a file need no start of their own
    if kind == "lora":
        if specs is None:
            sites.update({p: replace(sites[p], zeros=access.is_sparse(access.module(model, p))) for p in paths})
            specs = rules.lora_specs(sites, paths, **options)
            kept = [p for p in paths if specs[p].keep_zeros]
            if kept and options.get("keep_zeros") is None:
                notes.append(f"{len(kept)} layers have sparse weights: their deltas keep the zeros (keep_zeros=False)")
        described: dict[str, dict[str, Any]] = {p: {"type": sites[p].kind, **specs[p].to_dict()} for p in paths}
    else:
        described = {p: {"type": sites[p].kind, **options} for p in paths}
    made: dict[int, Any] = {}
    new: dict[str, Any] = {}
    for path in paths:
        module = access.module(model, path)
        if id(module) in made:
            new[path] = made[id(module)]
        elif path not in standing:
            layer = made[id(module)] = new[path] = access.make(kind, module, name, dtype, options)
            if kind == "lora":
                layer.add(name, (specs or {})[path], dtype, fresh=fresh)
    for path in paths:
        layer = standing.get(path)
        if layer is not None and name not in layer.specs:
            layer.add(name, (specs or {})[path], dtype, fresh=fresh)
            new[path] = layer
    access.put(model, new)
    _remember_flags(access, model)
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
    for option in options:
        check.choice(option, rules.OPTIONS[kind], f"option of {kind}")
    flags = _planned_flags(access, model, freeze, also_train)
    described = put(name=name, **options)
    _remember_flags(access, model)
    _set_flags(access, model, flags)
    access.changed(model)
    summary = str(report_of(access.parameters(model))).splitlines()[0]
    logger.info("%s %r on %d layers: %s", kind, name, len(described), summary)
    return DeltaReport(kind, name, described, trainable=summary)


def _planned_flags(access: DeltaFramework, model: Any, freeze: bool, also_train: Any) -> dict[str, bool]:
    """Base parameter -> whether it shall train once the delta is on."""
    found = access.parameters(model)
    trained = matched(found, also_train, "exclude") if also_train is not None else set()
    return {
        name: (may_train and name in trained) or (now and not (freeze and rules.PREFIX not in name))
        for name, (_, now, may_train) in zip(found.names, found.readings())
    }


def _remember_flags(access: DeltaFramework, model: Any) -> None:
    """Note once how the base's parameters stood, for the day the last delta leaves."""
    if not hasattr(model, FLAGS):
        flags = access.parameters(model).trains()
        setattr(model, FLAGS, {name: now for name, now in flags.items() if rules.PREFIX not in name})


def _set_flags(access: DeltaFramework, model: Any, flags: Mapping[str, bool]) -> None:
    found = access.parameters(model)
    for parameter, (name, now) in zip(found.held, found.trains().items()):
        if flags.get(name, now) != now:
            parameter.requires_grad = flags[name]


def merge(access: DeltaFramework, model: Any, *, unload: bool = False) -> DeltaReport:
    """Add every active LoRA to the weights, in place; see `merge_delta` of the wings."""
    check.boolean(unload, "unload")
    layers = _layers(access, model)
    unfit = [p for p, layer in layers.items() if layer.delta_kind != "lora"]
    if unfit:
        raise UnsupportedError(f"only lora can be merged; {unfit[0]} carries {layers[unfit[0]].delta_kind!r}.")
    done = [p for p, layer in layers.items() if layer.unmerged is not None]
    if done and not unload:
        raise ArgumentError(f"the deltas are merged already ({done[0]}); unmerge_delta puts the weights back.")
    for path, layer in layers.items():
        if access.owners(model, layer.weight) > 1:
            raise UnsupportedError(
                f"the weight of {path} is shared with another module, which merging would change; untie them first."
            )
    if unload:
        _refuse_built(layers)
    described = {p: {n: s.to_dict() for n, s in layer.specs.items()} for p, layer in layers.items()}
    for layer in {id(x): x for x in layers.values()}.values():
        if layer.unmerged is None:
            layer.merge()
    access.changed(model)
    if unload:
        for layer in layers.values():
            layer.unmerged = None  # the merged weight is the weight from now on
        _restore(access, model, layers)
    return DeltaReport("lora", "merged", described)


def unmerge(access: DeltaFramework, model: Any) -> DeltaReport:
    """Put back the weights as they were before merging, bit for bit, in place."""
    layers = {p: x for p, x in _layers(access, model).items() if getattr(x, "unmerged", None) is not None}
    if not layers:
        raise ArgumentError("the deltas of this model are not merged.")
    for layer in {id(x): x for x in layers.values()}.values():
        layer.unmerge()
    access.changed(model)
    return DeltaReport("lora", "unmerged", {p: {"deltas": list(x.specs)} for p, x in layers.items()})


def remove(access: DeltaFramework, model: Any, names: Any = None) -> DeltaReport:
    """Take deltas off a model, in place; see `remove_delta` of the wings."""
    layers = _layers(access, model)
    known = sorted({n for layer in layers.values() for n in layer.specs})
    gone = known if names is None else check.strings([names] if isinstance(names, str) else names, "names")
    for name in gone:
        check.choice(name, known, "names")
    described = {p: {"removed": [n for n in x.specs if n in gone]} for p, x in layers.items()}
    empty = {p: x for p, x in layers.items() if all(n in gone for n in x.specs)}
    _refuse_built(empty)
    for layer in {id(x): x for x in layers.values()}.values():
        if getattr(layer, "unmerged", None) is not None:
            layer.unmerge()
    for path, layer in layers.items():
        if path not in empty:
            for name in [n for n in gone if n in layer.specs]:
                layer.drop(name)
    access.changed(model)
    _restore(access, model, empty)
    return DeltaReport("", ", ".join(gone), {p: d for p, d in described.items() if d["removed"]})


def _refuse_built(layers: Mapping[str, Any]) -> None:
    """Refuse to take off what the model was built with."""
    built = [p for p, x in layers.items() if not hasattr(x, "revert") and x.original is None]
    if built:
        raise UnsupportedError(f"{built[0]} was built as a delta layer; there is no layer to put back in its place.")


def _restore(access: DeltaFramework, model: Any, layers: Mapping[str, Any]) -> None:
    """Put the original layers back, or take off what stands beside them; when nothing is left, the flags too."""
    beside = {id(x): x for x in layers.values() if hasattr(x, "revert")}
    swapped = {p: x for p, x in layers.items() if id(x) not in beside}
    for layer in swapped.values():
        layer.original.training = layer.training
    access.put(model, {p: layer.original for p, layer in swapped.items()})
    for layer in beside.values():
        layer.revert()
    left = access.layers(model)
    if all(layer.delta_kind != "prefix" for layer in left.values()):
        access.without_prefix(model)
    if not left:
        access.settle(model)
        if hasattr(model, FLAGS):
            _set_flags(access, model, getattr(model, FLAGS))
            delattr(model, FLAGS)


def activate(access: DeltaFramework, model: Any, names: Any) -> dict[str, float]:
    """Choose which named LoRAs are active and with which weight, in place; see `set_delta` of the wings."""
    layers = {p: x for p, x in _layers(access, model).items() if x.delta_kind == "lora"}
    known = sorted({n for layer in layers.values() for n in layer.specs})
    if names is None or (isinstance(names, (Mapping, Sequence)) and not names):
        weights: dict[str, float] = {}
    else:
        weights = rules.weights_of(names, known)
    merged = [p for p, x in layers.items() if x.unmerged is not None]
    if merged:
        raise ArgumentError(f"the deltas are merged ({merged[0]}); unmerge them before choosing others.")
    for layer in layers.values():
        layer.set_active(weights)
    access.changed(model)
    return weights


def active_weights(access: DeltaFramework, model: Any) -> dict[str, float]:
    """The active LoRAs with their weights."""
    found: dict[str, float] = {}
    for layer in access.layers(model).values():
        found.update(getattr(layer, "active", {}))
    return found


def _layers(access: DeltaFramework, model: Any) -> dict[str, Any]:
    layers = access.layers(model)
    if not layers:
        raise ArgumentError("the model carries no delta; apply_delta puts one on.")
    return layers


def plus_groups(
    named: Sequence[tuple[str, Any]], lr: Any, ratio: Any = 16.0, weight_decay: Any = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups in which LoRA's b learns faster than a; see `lora_plus_groups` of the wings."""
    check.number(lr, "lr", minimum=0)
    check.number(ratio, "ratio", minimum=0)
    check.number(weight_decay, "weight_decay", minimum=0)
    fast = [p for n, p in named if f"{rules.PREFIX}lora_b" in n]
    slow = [p for n, p in named if f"{rules.PREFIX}lora_b" not in n]
    if not fast:
        raise ArgumentError("no lora_b trains in this model; call apply_delta(model, 'lora', ...) first.")
    groups = [{"params": fast, "lr": lr * ratio, "weight_decay": weight_decay}]
    return groups + ([{"params": slow, "lr": lr, "weight_decay": weight_decay}] if slow else [])
