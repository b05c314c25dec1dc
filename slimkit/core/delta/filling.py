"""Putting deltas that a file describes on a model, and filling them and the base with the file's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta import base as base_values
from slimkit.core.delta import held_base, inject, owned
from slimkit.core.delta.base import HELD, BaseValue, Placement
from slimkit.core.delta.bundle import compare_keys, compare_shapes
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.layered import SPECS, spec_of_record
from slimkit.core.delta.spec import KINDS, PREFIX, DeltaReport, LoraSpec, key
from slimkit.core.errors import ArgumentError
from slimkit.core.freeze import report_of
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]


def put_made(
    access: DeltaStorage,
    model: Any,
    name: str,
    specs: Mapping[str, LoraSpec],
    parts: Mapping[str, Mapping[str, Array]],
    *,
    freeze: bool,
) -> DeltaReport:
    """Put a LoRA whose values are known on a model, in place, in their own types; it does not train.

    Args:
        access: the wing.
        model: the model.
        name: of the delta.
        specs: path -> LoRA.
        parts: path -> part ("a", "b", those of a rest) -> array.
        freeze: whether the base stands still under it.
    """
    report = inject.apply_layers(access, model, "lora", None, name=name, freeze=freeze, specs=specs)
    fill_made(access, model, name, parts)
    return report


def fill_made(access: DeltaStorage, model: Any, name: str, parts: Mapping[str, Mapping[str, Array]]) -> None:
    """Give the parts of a LoRA that is made, not trained, their values, in place, in the values' own types."""
    for path, layer in access.layers(model).items():
        tensors = layer.delta_tensors(name) if path in parts else {}
        for part, value in parts.get(path, {}).items():
            tensor = tensors[key("lora", part, name)]
            access.take_dtype(tensor, value)
            access.fill(tensor, value)
            if part in ("a", "b"):
                tensor.requires_grad = False


def check_paths(access: DeltaStorage, model: Any, paths: Iterable[str], where: str) -> None:
    sites = access.sites(model)
    for path in paths:
        if path not in sites and PREFIX not in path:
            raise ArgumentError(
                f"the delta in {where} was trained on a model with a layer {path!r}, which this model does not "
                f"have{check.near(path, list(sites))}. load_delta(..., rename=...) translates paths."
            )


def finish(
    access: DeltaStorage,
    model: Any,
    deltas: list[dict[str, Any]],
    tensors: Mapping[str, Array],
    values: Mapping[str, BaseValue],
    freeze: bool,
    where: str,
    notes: tuple[str, ...] = (),
) -> DeltaReport:
    """Check the base's tensors, put the deltas on, then fill both."""
    places = base_values.place(access.neutral(model), values, where)
    for line in (held := held_base.told(access, model, deltas)):
        logger.warning("%s: %s", where, line)
    notes += held
    described = put_on(access, model, deltas, tensors, freeze, where)
    notes += fill_base(access, model, places, deltas, freeze)
    summary = report_of(access.parameters(model))
    kinds = ", ".join(dict.fromkeys(d["kind"] for d in deltas))
    named = ", ".join(dict.fromkeys(d["name"] for d in deltas))
    return DeltaReport(kinds, named, described, trainable=str(summary).splitlines()[0], notes=notes)


def fill_base(
    access: DeltaStorage,
    model: Any,
    places: Iterable[Placement],
    deltas: Sequence[Mapping[str, Any]],
    freeze: bool,
) -> tuple[str, ...]:
    """Give tensors of the base the values that came with deltas, in place, or give their places one of their own.

    Args:
        access: the wing.
        model: the model, the deltas on it.
        places: what goes where; see `base.place`.
        deltas: their records; what trains belongs to the one it came with, and the base's values come back without it.
        freeze: whether the base stands still without the deltas.

    Returns:
        A line about each thing that is worth one.
    """
    notes, held = [], set(getattr(model, HELD, ()))
    # A value for what stays in common goes in first: a tensor of one's own is made beside it, not from it.
    places = sorted(places, key=lambda p: p.split)
    for place in places:
        if place.split:
            access.split(model, place.names)
            notes.append(f"{' and '.join(place.names)} now hold a tensor of their own, as the file means it")
    base, paths = access.neutral(model), paths_of(access, model)
    known = list(dict.fromkeys(str(d["name"]) for d in deltas))
    for name in known:
        # What trains is a delta's; what does not train is one's where the file says whose.
        alone = len(known) == 1
        theirs = [base[p.names[0]] for p in places if p.owner == name or (alone and (p.trains or bool(p.owner)))]
        own = [paths[id(t)] for t in theirs if id(t) in paths and access.may_train(t)]
        notes += owned.take(access, model, name, own, freeze=freeze)
    for place in places:
        tensor = base[place.names[0]]
        access.fill(tensor, place.value)
        if not place.trains:
            held.update(place.names)
        elif access.may_train(tensor):
            tensor.requires_grad = True
    if held:
        setattr(model, HELD, sorted(held))
        notes.append(f"{len(held)} tensors of the base came with the file: {', '.join(sorted(held)[:5])}")
    return tuple(notes)


def paths_of(access: DeltaStorage, model: Any) -> dict[int, str]:
    """id of each parameter of the base -> the first path that holds it, by the framework's own names."""
    found: dict[int, str] = {}
    for path, module in access.holders(model):
        for attribute, parameter in access.own_parameters(module).items():
            found.setdefault(id(parameter), f"{path}.{attribute}" if path else attribute)
    return found


def put_on(
    access: DeltaStorage,
    model: Any,
    deltas: list[dict[str, Any]],
    tensors: Mapping[str, Array],
    freeze: bool,
    where: str,
) -> dict[str, Any]:
    """Apply recorded deltas and fill them, in place; on any error what was put on comes off again."""
    described: dict[str, Any] = {}
    done: list[str] = []
    wanted: dict[str, Any] = {}
    checks: list[tuple[Any, dict[str, str]]] = []
    try:
        for delta in deltas:
            built_in = _built_in(access, model, delta)
            described.update(built_in)
            left = {p: r for p, r in delta["layers"].items() if p not in built_in}
            if left:
                report = apply_record(access, model, {**delta, "layers": left}, freeze)
                done.append(delta["name"])
                described.update(report.layers)
            # A prompt stands before the whole model: where exactly it is held differs between the frameworks.
            prompt = next(iter(delta["layers"]), None) if delta["kind"] == "prompt" else None
            for here, layer in access.layers(model).items():
                path = here if prompt is None else prompt
                if path in delta["layers"] and layer.delta_kind == delta["kind"] and delta["name"] in layer.delta_specs:
                    parts = layer.delta_tensors(delta["name"], delta["file_name"])
                    names = {part: f"{path}.{part}" if path else part for part in parts}
                    wanted |= {names[part]: tensor for part, tensor in parts.items()}
                    checks.append((layer, names))
        compare_keys(tensors, wanted, where)
        compare_shapes(tensors, {k: tuple(t.shape) for k, t in wanted.items()}, where)
        for layer, names in checks:
            layer.refuse_values({part: tensors[name] for part, name in names.items()}, where)
    except Exception:
        for name in done:
            inject.remove(access, model, name)
        raise
    for spelled, tensor in wanted.items():
        access.take_dtype(tensor, tensors[spelled])
        access.fill(tensor, tensors[spelled])
    return described


def _built_in(access: DeltaStorage, model: Any, delta: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded layers that the model was built with: they are there already, and only want values."""
    layers = access.layers(model)
    found = {}
    for path, record in delta["layers"].items():
        layer = layers.get(path)
        if layer is None or not layer.built_as_delta or delta["name"] not in layer.delta_specs:
            continue
        if layer.delta_kind != delta["kind"]:
            raise ArgumentError(f"{path} was built as {layer.delta_kind!r}; the file holds {delta['kind']!r}.")
        own = layer.delta_options(delta["name"])
        differs = [k for k, v in record.items() if k in own and k not in ("init", "dropout") and own[k] != v]
        if differs:
            raise ArgumentError(
                f"{path} was built with {differs[0]}={own[differs[0]]!r}; the file says {record[differs[0]]!r}."
            )
        found[path] = dict(own)
    return found


def apply_record(access: DeltaStorage, model: Any, delta: Mapping[str, Any], freeze: bool) -> DeltaReport:
    """Put one recorded delta on a model, its values still to be filled in."""
    kind = check.choice(delta.get("kind"), KINDS, "kind")
    records: Mapping[str, Any] = delta["layers"]
    if kind in SPECS:
        specs = {p: spec_of_record(kind, r) for p, r in records.items()}
        return inject.apply_layers(access, model, kind, None, name=str(delta["name"]), freeze=freeze, specs=specs)
    options = dict(next(iter(records.values())))
    if options.pop("heads", None) is not None:
        options["sizes"] = {path: record["heads"] for path, record in records.items()}
    return access.apply_kind(model, kind, list(records), name=delta["name"], freeze=freeze, **options)
