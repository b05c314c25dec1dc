"""Hugging Face PEFT's adapter files put on a model, and a model's delta written as such, in either framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.delta import base as base_values
from slimkit.core.delta import filling, inject, owned, peft, peft_targets, peft_write
from slimkit.core.delta.base import BaseValue
from slimkit.core.delta.bundle import compare_keys
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.ia3 import PART
from slimkit.core.delta.layered import SPECS, spec_of_record
from slimkit.core.delta.named import part_names
from slimkit.core.delta.peft_held import slug
from slimkit.core.delta.peft_lora import FAMILY, Adapter, read_lora, taken_out
from slimkit.core.delta.peft_summed import flat_index, write_miss, write_shira
from slimkit.core.delta.peft_write import BaseFacts
from slimkit.core.delta.positions import positions_for
from slimkit.core.delta.spec import PREFIX, DeltaReport, key
from slimkit.core.delta.tensors import wide
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]


def load(
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
    owner = [] if tables else [{"name": name}]
    return replace(report, notes=report.notes + filling.fill_base(access, model, places, owner, freeze))


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
    layers, base, here = access.sites(model), access.neutral(model), peft.renamer(rename)
    adapter = read_lora(config, tensors, lambda path: layers.get(here(path)))
    new = dict(zip(adapter.layers, peft.rename_paths(adapter.layers, rename)))
    adapter.layers = {new[p]: spec for p, spec in adapter.layers.items()}
    adapter.parts = {new[p]: parts for p, parts in adapter.parts.items()}
    adapter.takes_out = {new[p]: start for p, start in adapter.takes_out.items()}
    if adapter.base:
        adapter.base = peft.rename_paths(adapter.base, rename)
    if adapter.rows:
        adapter.rows = peft.rename_paths(adapter.rows, rename)
    filling.check_paths(access, model, adapter.layers, where)
    if adapter.layers:
        found = [*adapter.layers, *(n.split()[0] for n in adapter.notes)]
        adapter.notes += peft_targets.refuse_lacking(config, layers, found, rename, where)
    trainable = [n for n, t in base.items() if access.may_train(t)]
    peft_targets.refuse_headless(config, trainable, layers, adapter.base, where)
    peft_targets.refuse_rowless(config, adapter.rows, where)
    for path, start in adapter.takes_out.items():
        weight = access.value(access.weight(model, path))
        if layers[path].kind not in peft_targets.LINEAR:
            raise UnsupportedError(f"init_lora_weights={start!r} on {path}, a {layers[path].type_name}, is not read.")
        a, b = taken_out(start, wide(weight.T if layers[path].kind == "conv1d" else weight), adapter.layers[path])
        adapter.parts[path] |= {"a0": a, "b0": b}
    if adapter.kind == "shira":
        for path, parts in adapter.parts.items():
            flat_index(parts, adapter.layers[path], path, layers[path].shape)
    if config["peft_type"] == "VERA":
        for path, parts in adapter.parts.items():
            parts["a"] = np.ascontiguousarray(parts["a"][:, : layers[path].shape[1]])
    values = {**adapter.base, **_rows(access, model, base, adapter, name, where)}
    deltas = [adapter.record(name)] if adapter.layers else []
    return filling.finish(access, model, deltas, adapter.tensors(name), values, freeze, where, tuple(adapter.notes))


def _rows(
    access: DeltaStorage, model: Any, base: Mapping[str, Any], adapter: Adapter, name: str, where: str
) -> dict[str, BaseValue]:
    """Trained token rows as whole tables of the delta; the first holder of a shared one writes into what all hold."""
    values = {}
    paths, owner = filling.paths_of(access, model), name if adapter.layers else ""
    # Another delta's rows may be live in a table: this one's go onto the base's.
    aside = {one.path: one.record["aside"].get(owned.BASE) for one in owned.owned(access, model)}
    first = {n: names[0] for names in base_values.common(base) for n in names}
    for path, (indices, rows) in adapter.rows.items():
        name = f"{path}.weight"
        compare_keys({n: 0 for n in (name,) if n in base}, {name: 0}, "the base model")
        standing = aside.get(paths.get(id(base[name]), ""))
        table = access.value(base[name] if standing is None else standing[0]).copy()
        if table.ndim != 2 or rows.shape[1:] != table.shape[1:] or max(indices, default=0) >= len(table):
            raise FileFormatError(
                f"{where}: rows {tuple(rows.shape)} for tokens up to {max(indices, default=0)} do not fit {name}, "
                f"which has shape {tuple(table.shape)}."
            )
        table[indices] = rows.astype(table.dtype)
        values[name] = BaseValue(table, trains=False, own=first[name] != name, owner=owner)
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
        parts = [list(x.delta_tensors("").values()) for p, x in access.layers(model).items() if p in report.layers]
        layers = [x for p, x in access.layers(model).items() if p in report.layers]
        form = 1 if kind == "prompt" else access.prefix_form(model, layers)
        if kind == "prompt":
            flat, notes = peft.read_rows(tensors, tokens, int(parts[0][0].shape[1]), config, where)
            values: list[Any] = [(flat,)]
        elif form == 2:
            values, notes = peft.read_cached(tensors, tokens, int(parts[0][0].shape[1]), len(parts), config, where)
        else:
            flat = peft.read_prompt(tensors, (tokens, sum(int(t.shape[1]) for pair in parts for t in pair)), where)
            values, notes = peft.split_prefix(flat, len(parts)), ()
        for pair, pieces in zip(parts, values):
            for tensor, value in zip(pair, pieces):
                access.fill(tensor, value)
    except Exception:
        inject.remove(access, model, options["name"])
        raise
    return replace(report, notes=report.notes + tuple(notes))


def _prompt_rows(access: DeltaStorage, model: Any, delta: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
    """A prefix or prompt as PEFT's one tensor, and what PEFT's configuration says of it."""
    layers = [x for p, x in access.layers(model).items() if p in delta["layers"]]
    config = getattr(model, "config", None)
    if delta["kind"] == "prompt":
        (table,) = layers[0].delta_tensors("").values()
        rows, form = access.value(table), 1
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
        form, count = access.prefix_form(model, layers), len(layers)
        if form == 2:
            pairs = peft.cached_pairs(pairs)
            count = len(pairs)
        rows = np.concatenate([part for pair in pairs for part in pair], 1)
        width = rows.shape[1] // (2 * count)
        about = {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "encoder_hidden_size": width,
            "num_attention_heads": layers[0].prefix_heads,
            "num_layers": count,
        }
    return rows, {
        **about,
        "num_virtual_tokens": rows.shape[0],
        "num_transformer_submodules": form,
        "inference_mode": True,
    }


Collected = tuple[list[dict[str, Any]], dict[str, Array], list[str], dict[str, Any]]


def write(access: DeltaStorage, model: Any, folder: Path, collected: Collected) -> None:
    """Write one delta as PEFT's files.

    Args:
        access: the wing.
        model: the model.
        folder: where.
        collected: records, tensors, names of trained base tensors and facts of the base, as a bundle holds them.
    """
    deltas, tensors, extra, base = collected
    whole = {n: t for n, t in access.neutral(model).items() if PREFIX not in n}
    for kind, words in (("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING")):
        tables = access.tables(model, kind) if not deltas else []
        if len(tables) == 1:
            rows = access.value(tables[0])
            config = {"peft_type": words, "num_virtual_tokens": rows.shape[0], "num_transformer_submodules": 1}
            config.update(access.table_facts(model, kind), inference_mode=True)
            nothing = BaseFacts(lambda n: access.value(whole[n]), list(whole), ())
            peft_write.write_prompt(folder, rows, nothing, access.about(model), config)
            return
    if not deltas:
        raise UnsupportedError(
            "PEFT's files hold values of the base beside a delta alone, and there is no delta here; save with "
            "format='slimkit'."
        )
    if len(deltas) != 1 or deltas[0]["kind"] not in peft.KINDS.values():
        kinds = ", ".join(f"{d['kind']} {d['name']!r}" for d in deltas) or "none"
        raise ArgumentError(
            f"PEFT's files hold one delta of {', '.join(dict.fromkeys(peft.KINDS.values()))}; choose it by names. "
            f"Here: {kinds}"
        )
    delta = deltas[0]
    about = access.about(model)
    still = set(base.get("still", ()))

    # The values of a tied table are the delta's in each of its places, also while another delta's are live.
    tied = {m: n for n, others in base["shared"].items() if n in tensors for m in others}

    def value(name: str) -> Array:
        name = tied.get(name, name)
        path, _, last = name.rpartition(".")
        if name in tensors:
            return tensors[name]
        # While deltas are merged, the weight as it was.
        return access.value(access.weight(model, path) if last == "weight" and path in delta["layers"] else whole[name])

    facts = BaseFacts(
        value=value,
        names=list(whole),
        parameters={n for n, t in whole.items() if access.may_train(t)},
        trained=[n for n in extra if n not in still and n in whole],
        held=[n for n in extra if n in still and n in whole],
        shared=base["shared"],
    )
    if delta["kind"] not in SPECS:
        rows, config = _prompt_rows(access, model, delta)
        peft_write.write_prompt(folder, rows, facts, about, config)
        return
    specs = {p: spec_of_record(delta["kind"], r) for p, r in delta["layers"].items()}
    if any(getattr(spec, "rest", "") for spec in specs.values()):
        raise UnsupportedError("PEFT's files have no place for a compressed delta; save it with format='slimkit'.")
    if delta["kind"] == "ia3":
        ia3s = {p: (spec, tensors[f"{p}.{PART}"]) for p, spec in specs.items()}
        peft_write.write_ia3(folder, ia3s, access.sites(model), facts, about)
        return
    if delta["kind"] != "lora":
        below = {p: {n[len(p) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{p}.{PREFIX}")} for p in specs}
        layers = {p: (spec, below[p]) for p, spec in specs.items()}
        write: Any = write_miss if delta["kind"] == "miss" else write_shira
        write(folder, layers, access.sites(model), facts, about)
        return
    by_path: dict[str, dict[str, Array]] = {p: {} for p in specs}
    for path, spelled in by_path.items():
        halves = [f"{half}_{slug(p)}" for p in specs[path].parameters for half in "ab"]
        for part in halves or part_names(specs[path]):
            found = tensors.get(f"{path}.{key('lora', part, delta['name'])}")
            if found is not None:
                spelled[part] = found
    peft_write.write_lora(folder, specs, by_path, access.sites(model), facts, about)
