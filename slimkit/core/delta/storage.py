"""Saving the deltas of a model and putting them on another one, in either framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta import base as base_values
from slimkit.core.delta import inject, peft, peft_targets, peft_write
from slimkit.core.delta.base import HELD, BaseValue
from slimkit.core.delta.bundle import MANIFEST, compare_keys, compare_shapes, fingerprint, read_bundle, write_bundle
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.named import PARTS
from slimkit.core.delta.peft_lora import FAMILY, Adapter, read_lora, taken_out
from slimkit.core.delta.peft_write import BaseFacts
from slimkit.core.delta.positions import counted, positions_for
from slimkit.core.delta.spec import KINDS, PREFIX, DeltaReport, delta_name, key, spec_from_dict
from slimkit.core.delta.tensors import wide
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.freeze import report_of
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]


def collect(
    access: DeltaStorage, model: Any, names: Any = None
) -> tuple[list[dict[str, Any]], dict[str, Array], list[str], dict[str, Any]]:
    """Everything a bundle holds of a model: records of the deltas, tensors, names of trained base tensors, the base."""
    layers = access.layers(model)
    known = sorted({n for layer in layers.values() for n in layer.specs})
    wanted = known if names is None else check.strings([names] if isinstance(names, str) else names, "names")
    for name in wanted:
        check.choice(name, known, "names")
    tensors: dict[str, Array] = {}
    deltas = []
    for name in wanted:
        for kind in KINDS:
            chosen = {p: x for p, x in layers.items() if x.delta_kind == kind and name in x.specs}
            if not chosen:
                continue
            records = {}
            for path, layer in chosen.items():
                records[path] = layer.describe(name)
                for part, tensor in layer.parts(name).items():
                    tensors[f"{path}.{part}" if path else part] = access.value(tensor)
            deltas.append({"name": name, "kind": kind, "layers": records})
    # A delta layer built into the model by hand may hold parameters that no record speaks of: they travel by name.
    spoken = {f"{p}.{part}" if p else part for p, x in layers.items() for n in x.specs for part in x.parts(n)}
    every = access.neutral(model)
    held = set(getattr(model, HELD, ()))
    extra, still = {}, []
    for names_of_one in base_values.common({n: t for n, t in every.items() if n not in spoken}):
        first = names_of_one[0]
        trains = getattr(every[first], "requires_grad", False)
        if trains or held & set(names_of_one):
            extra[first] = access.value(every[first])
            still += [] if trains else [first]
    if not deltas and not extra:
        raise ArgumentError("the model carries no delta and nothing in it trains: there is nothing to save.")
    base = _base_of(access, model, {p: p for d in deltas for p in d["layers"]})
    base["shared"] = base_values.shared(every, extra)
    if still:
        base["still"] = sorted(still)
    return deltas, {**tensors, **extra}, sorted(extra), base


def _base_of(access: DeltaStorage, model: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    """Shapes and fingerprint of the weights under a delta, by the names on the left."""
    weights = {old: access.weight(model, new) for old, new in paths.items()}
    weights = {p: w for p, w in weights.items() if w is not None}
    return {
        "fingerprint": fingerprint({p: (tuple(w.shape), access.sample(w)) for p, w in weights.items()}),
        "layers": {p: list(w.shape) for p, w in weights.items()},
    }


def save(access: DeltaStorage, model: Any, directory: Any, names: Any = None) -> Path:
    """Write a model's deltas, and what else trains, as a slimkit bundle; see `save_delta` of the wings."""
    folder = files.as_path(directory, "directory")
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
        raise FileFormatError(f"directory must be an existing folder. Received: {str(folder)!r}")
    if name is not None:
        delta_name(name)
    check.boolean(freeze, "freeze")
    check.boolean(same_base, "same_base")
    files.settle(folder)
    if not (folder / MANIFEST).exists() and peft.is_adapter(folder):
        return _load_peft(access, model, folder, name or "default", freeze, rename, positions)
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
    _check_paths(access, model, new_path.values(), str(folder))
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
    return _finish(access, model, deltas, tensors, values, freeze, str(folder), tuple(notes))


def _bundled(extra: Mapping[str, Array], said: Mapping[str, Any], rename: Any) -> dict[str, BaseValue]:
    """A bundle's values for the base: each goes to the places that held one tensor where it was saved."""
    still = set(peft.rename_paths(dict.fromkeys(said.get("still", ())), rename if said.get("still") else None))
    shared = said.get("shared")
    values = {}
    for name, value in extra.items():
        values[name] = BaseValue(value, trains=name not in still, own=shared is not None, group=name)
    for name, others in (shared or {}).items():
        first, *rest = peft.rename_paths(dict.fromkeys([name, *others]), rename)
        values.update(dict.fromkeys(rest, values[first]))
    return values


def _check_paths(access: DeltaStorage, model: Any, paths: Iterable[str], where: str) -> None:
    sites = access.sites(model)
    for path in paths:
        if path not in sites and PREFIX not in path:
            raise ArgumentError(
                f"the delta in {where} was trained on a model with a layer {path!r}, which this model does not "
                f"have{check.near(path, list(sites))}. load_delta(..., rename=...) translates paths."
            )


def _finish(
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
    access.check_split(model, [p.names for p in places if p.split])
    described = put_on(access, model, deltas, tensors, freeze, where)
    notes += _fill_base(access, model, places)
    summary = report_of(access.parameters(model))
    kinds = ", ".join(dict.fromkeys(d["kind"] for d in deltas))
    named = ", ".join(dict.fromkeys(d["name"] for d in deltas))
    return DeltaReport(kinds, named, described, trainable=str(summary).splitlines()[0], notes=notes)


def _fill_base(access: DeltaStorage, model: Any, places: Iterable[base_values.Placement]) -> tuple[str, ...]:
    """Overwrite tensors of the base that came with a delta, in place, or give their places one of their own."""
    notes, held = [], set(getattr(model, HELD, ()))
    # A value for what stays in common goes in first: a tensor of one's own is made beside it, not from it.
    for place in sorted(places, key=lambda p: p.split):
        if place.split:
            access.split(model, place.names, place.value)
            notes.append(f"{' and '.join(place.names)} now hold a tensor of their own, as the file means it")
        tensor = access.neutral(model)[place.names[0]]
        if not place.split:
            access.fill(tensor, place.value)
        if not place.trains:
            held.update(place.names)
        elif access.may_train(tensor):
            tensor.requires_grad = True
    if held:
        setattr(model, HELD, sorted(held))
        notes.append(f"{len(held)} tensors of the base came with the file: {', '.join(sorted(held)[:5])}")
    return tuple(notes)


def _load_peft(
    access: DeltaStorage, model: Any, folder: Path, name: str, freeze: bool, rename: Any, positions: Any
) -> DeltaReport:
    """Put a Hugging Face PEFT adapter on a model, in place."""
    config, tensors = peft.read_files(folder)
    kind, where, sites = peft.KINDS[config["peft_type"]], str(folder), access.sites(model)
    if config["peft_type"] in FAMILY:
        return _load_peft_lora(access, model, config, tensors, name, freeze, rename, where)
    prompt, extra = peft.split_prompt(tensors)
    values = {n: BaseValue(v, own=True) for n, v in extra.items()}
    base = access.neutral(model)
    peft_targets.refuse_headless(config, [n for n, t in base.items() if access.may_train(t)], sites, values, where)
    places = base_values.place(base, values, where)
    access.check_split(model, [p.names for p in places if p.split])
    tables = access.tables(model, kind)
    if tables:
        # The model was built with a prefix or prompt of its own: the file's values go there.
        if len(tables) > 1:
            raise ArgumentError(f"the model holds {len(tables)} {kind} tables; the file has values for one.")
        access.fill(tables[0], peft.read_prompt(prompt, tuple(tables[0].shape), where))
        report = DeltaReport(kind, name, {})
    else:
        options = {"name": name, "freeze": freeze}
        if kind == "prefix":
            options["positions"] = positions_for(access, model, True, positions, where)
        report = _load_prompt(access, model, kind, config, prompt, options, where)
    return replace(report, notes=report.notes + _fill_base(access, model, places))


def _load_peft_lora(
    access: DeltaStorage,
    model: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    name: str,
    freeze: bool,
    rename: Any,
    where: str,
) -> DeltaReport:
    """Put an adapter of the LoRA family on a model, in place."""
    adapter = read_lora(config, tensors)
    layers, base = access.sites(model), access.neutral(model)
    new = dict(zip(adapter.layers, peft.rename_paths(adapter.layers, rename)))
    adapter.layers = {new[p]: spec for p, spec in adapter.layers.items()}
    adapter.parts = {new[p]: parts for p, parts in adapter.parts.items()}
    adapter.takes_out = {new[p]: start for p, start in adapter.takes_out.items()}
    if adapter.base:
        adapter.base = peft.rename_paths(adapter.base, rename)
    if adapter.rows:
        adapter.rows = peft.rename_paths(adapter.rows, rename)
    _check_paths(access, model, adapter.layers, where)
    if adapter.layers:
        found = [*adapter.layers, *(n.split()[0] for n in adapter.notes)]
        adapter.notes += peft_targets.refuse_lacking(config, layers, found, rename, where)
    trainable = [n for n, t in base.items() if access.may_train(t)]
    peft_targets.refuse_headless(config, trainable, layers, adapter.base, where)
    for path, start in adapter.takes_out.items():
        weight = access.value(access.weight(model, path))
        if layers[path].kind not in peft_targets.LINEAR:
            raise UnsupportedError(f"init_lora_weights={start!r} on {path}, a {layers[path].type_name}, is not read.")
        a, b = taken_out(start, wide(weight.T if layers[path].kind == "conv1d" else weight), adapter.layers[path])
        adapter.parts[path] |= {"a0": a, "b0": b}
    if config["peft_type"] == "VERA":
        for path, parts in adapter.parts.items():
            parts["a"] = np.ascontiguousarray(parts["a"][:, : layers[path].shape[1]])
    values = {**adapter.base, **_rows(access, base, adapter, where)}
    deltas = [adapter.record(name)] if adapter.layers else []
    return _finish(access, model, deltas, adapter.tensors(name), values, freeze, where, tuple(adapter.notes))


def _rows(access: DeltaStorage, base: Mapping[str, Any], adapter: Adapter, where: str) -> dict[str, BaseValue]:
    """Trained token rows as whole tables; the first holder of a shared table writes into what all hold."""
    values = {}
    first = {n: names[0] for names in base_values.common(base) for n in names}
    for path, (indices, rows) in adapter.rows.items():
        name = f"{path}.weight"
        compare_keys({n: 0 for n in (name,) if n in base}, {name: 0}, "the base model")
        table = access.value(base[name]).copy()
        if table.ndim != 2 or rows.shape[1:] != table.shape[1:] or max(indices, default=0) >= len(table):
            raise FileFormatError(
                f"{where}: rows {tuple(rows.shape)} for tokens up to {max(indices, default=0)} do not fit {name}, "
                f"which has shape {tuple(table.shape)}."
            )
        table[indices] = rows.astype(table.dtype)
        values[name] = BaseValue(table, trains=False, own=first[name] != name)
    named = [v for n, v in values.items() if first[n] == n]
    if named:  # tied tables are trained together: each file key repeats the same rows
        values = {n: replace(v, own=False) for n, v in values.items()} if len(values) > 1 else values
    return values


def _load_prompt(
    access: DeltaStorage,
    model: Any,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    options: Mapping[str, Any],
    where: str,
) -> DeltaReport:
    """Put a PEFT prefix or prompt on a model that was built without; on any error it comes off again."""
    tokens = int(config.get("num_virtual_tokens") or 0)
    if kind == "prompt":
        report = access.apply_kind(model, kind, None, num_virtual_tokens=tokens, **options)
    else:
        sizes = access.prefix_sizes(model, config)
        report = access.apply_kind(model, kind, None, prefix_token_num=tokens, sizes=sizes, **options)
    try:
        parts = [list(x.parts("").values()) for p, x in access.layers(model).items() if p in report.layers]
        flat = peft.read_prompt(tensors, (tokens, sum(int(t.shape[1]) for pair in parts for t in pair)), where)
        values = [(flat,)] if kind == "prompt" else peft.split_prefix(flat, len(parts))
        for pair, pieces in zip(parts, values):
            for tensor, value in zip(pair, pieces):
                access.fill(tensor, value)
    except Exception:
        inject.remove(access, model, options["name"])
        raise
    return report


def _prompt_rows(access: DeltaStorage, model: Any, delta: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
    """A prefix or prompt as PEFT's one tensor, and what PEFT's configuration says of it."""
    layers = [x for p, x in access.layers(model).items() if p in delta["layers"]]
    config = getattr(model, "config", None)
    if delta["kind"] == "prompt":
        (table,) = layers[0].parts("").values()
        rows = access.value(table)
        about = {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "token_dim": rows.shape[1],
            "num_attention_heads": getattr(config, "num_attention_heads", 1),
            "num_layers": getattr(config, "num_hidden_layers", 1),
        }
    else:
        pairs = access.prefix_rows(model, layers)
        if len({(x.prefix_heads, pair[0].shape) for x, pair in zip(layers, pairs)}) > 1:
            raise UnsupportedError("PEFT's prefix has the same shape in every layer; this one has not.")
        rows = np.concatenate([part for pair in pairs for part in pair], 1)
        width = rows.shape[1] // (2 * len(layers))
        about = {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "encoder_hidden_size": width,
            "num_attention_heads": layers[0].prefix_heads,
            "num_layers": len(layers),
        }
    return rows, {
        **about,
        "num_virtual_tokens": rows.shape[0],
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }


def save_peft(access: DeltaStorage, model: Any, directory: Any, names: Any = None) -> Path:
    """Write one delta as Hugging Face PEFT's files; see `save_delta` of the wings."""
    folder = files.as_path(directory, "directory")
    deltas, tensors, extra, base = collect(access, model, names)
    whole = {n: t for n, t in access.neutral(model).items() if PREFIX not in n}
    for kind, words in (("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING")):
        tables = access.tables(model, kind) if not deltas else []
        if len(tables) == 1:
            rows = access.value(tables[0])
            config = {"peft_type": words, "num_virtual_tokens": rows.shape[0], "num_transformer_submodules": 1}
            config.update(access.table_facts(model, kind), inference_mode=True)
            nothing = BaseFacts(lambda n: access.value(whole[n]), list(whole), ())
            peft_write.write_prompt(folder, rows, nothing, access.about(model), config)
            return folder
    if len(deltas) != 1 or deltas[0]["kind"] not in peft.KINDS.values():
        kinds = ", ".join(f"{d['kind']} {d['name']!r}" for d in deltas) or "none"
        raise ArgumentError(f"PEFT's files hold one delta of lora, prefix or prompt; choose it by names. Here: {kinds}")
    delta = deltas[0]
    about = access.about(model)
    still = set(base.get("still", ()))
    facts = BaseFacts(
        value=lambda n: access.value(whole[n]),
        names=list(whole),
        parameters={n for n, t in whole.items() if access.may_train(t)},
        trained=[n for n in extra if n not in still and n in whole],
        held=[n for n in extra if n in still and n in whole],
        shared=base["shared"],
    )
    if delta["kind"] != "lora":
        rows, config = _prompt_rows(access, model, delta)
        peft_write.write_prompt(folder, rows, facts, about, config)
        return folder
    specs = {p: spec_from_dict(r) for p, r in delta["layers"].items()}
    by_path: dict[str, dict[str, Array]] = {p: {} for p in specs}
    for path, spelled in by_path.items():
        for part in PARTS:
            value = tensors.get(f"{path}.{key('lora', part, delta['name'])}")
            if value is not None:
                spelled[part] = value
    peft_write.write_lora(folder, specs, by_path, access.sites(model), facts, about)
    return folder


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
                if path in delta["layers"] and layer.delta_kind == delta["kind"] and delta["name"] in layer.specs:
                    for part, tensor in layer.parts(delta["name"], delta["file_name"]).items():
                        wanted[f"{path}.{part}" if path else part] = tensor
        compare_keys(tensors, wanted, where)
        compare_shapes(tensors, {k: tuple(t.shape) for k, t in wanted.items()}, where)
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
        if layer is None or hasattr(layer, "revert") or layer.original is not None or delta["name"] not in layer.specs:
            continue
        if layer.delta_kind != delta["kind"]:
            raise ArgumentError(f"{path} was built as {layer.delta_kind!r}; the file holds {delta['kind']!r}.")
        own = layer.describe(delta["name"])
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
    if kind == "lora":
        specs = {p: spec_from_dict(r) for p, r in records.items()}
        return inject.apply_layers(access, model, kind, None, name=str(delta["name"]), freeze=freeze, specs=specs)
    options = dict(next(iter(records.values())))
    if options.pop("heads", None) is not None:
        options["sizes"] = {path: record["heads"] for path, record in records.items()}
    return access.apply_kind(model, kind, list(records), name=delta["name"], freeze=freeze, **options)


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
