"""Saving the deltas of a model and putting them on another one, in either framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta import base as base_values
from slimkit.core.delta import filling, owned, peft, storage_peft
from slimkit.core.delta.base import HELD, BaseValue
from slimkit.core.delta.bundle import MANIFEST, fingerprint, read_bundle, write_bundle
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.positions import counted
from slimkit.core.delta.spec import KINDS, DeltaReport, delta_name
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]


def collect(
    access: DeltaStorage, model: Any, names: Any = None
) -> tuple[list[dict[str, Any]], dict[str, Array], list[str], dict[str, Any]]:
    """Everything a bundle holds of a model: records of the deltas, tensors, names of trained base tensors, the base."""
    layers = access.layers(model)
    known = sorted({n for layer in layers.values() for n in layer.delta_specs})
    wanted = known if names is None else check.strings([names] if isinstance(names, str) else names, "names")
    for name in wanted:
        check.choice(name, known, "names")
    tensors: dict[str, Array] = {}
    deltas = []
    for name in wanted:
        for kind in KINDS:
            chosen = {p: x for p, x in layers.items() if x.delta_kind == kind and name in x.delta_specs}
            if not chosen:
                continue
            records = {}
            for path, layer in chosen.items():
                records[path] = layer.delta_options(name)
                for part, tensor in layer.delta_tensors(name).items():
                    tensors[f"{path}.{part}" if path else part] = access.value(tensor)
            deltas.append({"name": name, "kind": kind, "layers": records})
    extra, said = _extra(access, model, wanted)
    if not deltas and not extra:
        raise ArgumentError("the model carries no delta and nothing in it trains: there is nothing to save.")
    base = {**_base_of(access, model, {p: p for d in deltas for p in d["layers"]}), **said}
    return deltas, {**tensors, **extra}, sorted(extra), base


def _extra(access: DeltaStorage, model: Any, names: Sequence[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Values of the base that travel with these deltas, and what the manifest says of them."""
    layers = access.layers(model)
    # A delta layer built into the model by hand may hold parameters that no record speaks of: they travel by name.
    spoken = {
        f"{p}.{part}" if p else part for p, x in layers.items() for n in x.delta_specs for part in x.delta_tensors(n)
    }
    every = access.neutral(model)
    held = set(getattr(model, HELD, ()))
    paths = filling.paths_of(access, model)
    records = {one.path: one for one in owned.owned(access, model)}
    theirs = {one.path: [n for n in one.owners if n != owned.BASE] for one in records.values()}
    own = {n: owned.values_of(access, model, n) for n in names}
    extra: dict[str, Array] = {}
    still, owners = [], {}
    for group in base_values.common({n: t for n, t in every.items() if n not in spoken}):
        first, path = group[0], paths.get(id(every[group[0]]), "")
        here = [n for n in names if path in own[n]]
        if len(here) > 1:
            raise ArgumentError(
                f"{here[0]!r} and {here[1]!r} each have values of their own for {first}; save one at a time with names."
            )
        trains = every[first].requires_grad
        if here:
            extra[first], owners[first] = access.value(own[here[0]][path]), here[0]
            one = records[path]
            aside = one.record["aside"].get(here[0])
            still += [first] if held & set(group) and not (trains if aside is None else aside[1]) else []
        elif (trains and path not in theirs) or held & set(group):
            extra[first] = access.value(every[first])
            still += [] if trains else [first]
    said: dict[str, Any] = {"shared": base_values.shared(every, extra)}
    said |= {"still": sorted(still)} if still else {}
    owners = {n: o for n, o in owners.items() if len(names) > 1 or n in still}
    return extra, said | ({"owners": owners} if owners else {})


def _base_of(access: DeltaStorage, model: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    """Shapes and fingerprint of the weights under a delta, by the names on the left."""
    weights = {old: access.weight(model, new) for old, new in paths.items()}
    weights = {p: w for p, w in weights.items() if w is not None}
    samples = {p: access.base_sample(model, paths[p], w) for p, w in weights.items()}
    return {
        "fingerprint": fingerprint({p: (tuple(w.shape), samples[p]) for p, w in weights.items()}),
        "layers": {p: list(w.shape) for p, w in weights.items()},
    }


def save_peft(access: DeltaStorage, model: Any, directory: Any, names: Any = None) -> Path:
    """Write one delta as Hugging Face PEFT's files; see `save_delta` of the wings."""
    folder = files.as_path(directory, "directory")
    access.at_rest(model)
    storage_peft.write(access, model, folder, collect(access, model, names))
    return folder


def save(access: DeltaStorage, model: Any, directory: Any, names: Any = None) -> Path:
    """Write a model's deltas, and what else trains, as a slimkit bundle; see `save_delta` of the wings."""
    folder = files.as_path(directory, "directory")
    access.at_rest(model)
    deltas, tensors, extra, base = collect(access, model, names)
    return write_bundle(folder, deltas, tensors, extra, base)


def load(
    access: DeltaStorage,
    model: Any,
    directory: Any,
    *,
    name: str | None = None,
    freeze: bool = True,
    same_base: bool = False,
    rename: Any = None,
    positions: Any = None,
) -> DeltaReport:
    """Put saved deltas on a model, in place; see `load_delta` of the wings."""
    folder = files.as_path(directory, "directory")
    if not folder.is_dir():
        raise FileFormatError(f"directory must be an existing folder. Received: {str(folder)!r}{files.meant(folder)}")
    if name is not None:
        delta_name(name)
    check.boolean(freeze, "freeze")
    check.boolean(same_base, "same_base")
    files.settle(folder)
    access.at_rest(model)
    if not (folder / MANIFEST).exists() and peft.is_adapter(folder):
        return storage_peft.load(access, model, folder, name or "default", freeze, rename, positions)
    manifest, tensors = read_bundle(folder)
    deltas = _renamed(manifest["deltas"], name)
    extra = {n: tensors.pop(n) for n in manifest["extra"] if n in tensors}
    if len(extra) != len(manifest["extra"]):
        lost = [str(n) for n in manifest["extra"] if n not in extra]
        raise FileFormatError(f"{folder}: 'extra' names tensors that the file does not hold: {', '.join(lost)}")
    shapes = manifest["base"].get("layers", {})
    paths = [*shapes, *(p for d in deltas for p in d["layers"])]
    new_path = dict(zip(dict.fromkeys(paths), peft.rename_paths(dict.fromkeys(paths, 0), rename)))
    if rename is not None:
        tensors, extra = peft.rename_paths(tensors, rename), peft.rename_paths(extra, rename)
        deltas = [{**d, "layers": {new_path[p]: r for p, r in d["layers"].items()}} for d in deltas]
    filling.check_paths(access, model, new_path.values(), str(folder))
    for path, shape in shapes.items():
        have = tuple(access.weight(model, new_path[path]).shape)
        if list(have) != list(shape):
            raise ArgumentError(
                f"the delta in {folder} was trained on a base where {path} has shape {tuple(shape)}; here it has "
                f"{have}. A pruned base needs the delta trained on it."
            )
    deltas = [counted(access, model, d, positions, str(folder)) for d in deltas]
    notes = []
    here = _base_of(access, model, {p: new_path[p] for p in shapes})
    if here["fingerprint"] != manifest["base"].get("fingerprint"):
        message = f"the base under {folder} had other weights than this model; outputs may differ"
        if same_base:
            raise ArgumentError(message)
        logger.warning("%s", message)
        notes.append(message)
    values = _bundled(extra, manifest["base"], rename)
    return filling.finish(access, model, deltas, tensors, values, freeze, str(folder), tuple(notes))


def _bundled(extra: Mapping[str, Array], said: Mapping[str, Any], rename: Any) -> dict[str, BaseValue]:
    """A bundle's values for the base: each goes to the places that held one tensor where it was saved."""
    still = set(peft.rename_paths(dict.fromkeys(said.get("still", ())), rename if said.get("still") else None))
    shared = said.get("shared")
    owners = said.get("owners") or {}
    owners = peft.rename_paths(owners, rename) if owners else {}
    values = {}
    for name, value in extra.items():
        values[name] = BaseValue(
            value, trains=name not in still, own=shared is not None, group=name, owner=owners.get(name, "")
        )
    for name, others in (shared or {}).items():
        first, *rest = peft.rename_paths(dict.fromkeys([name, *others]), rename)
        values.update(dict.fromkeys(rest, values[first]))
    return values


def _renamed(deltas: list[Any], name: str | None) -> list[dict[str, Any]]:
    """The records, the only delta under another name if one is given; `file_name` keeps the old one."""
    for delta in deltas:
        if not isinstance(delta, dict) or not isinstance(delta.get("layers"), dict):
            raise FileFormatError("a record in the manifest is not a delta")
        delta_name(delta.get("name"))
    if name is not None:
        names = {d["name"] for d in deltas}
        if len(names) != 1:
            raise ArgumentError(f"name works for a bundle with one delta; this one holds {', '.join(sorted(names))}.")
        delta_name(name)
    return [{**d, "name": name or d["name"], "file_name": d["name"]} for d in deltas]
