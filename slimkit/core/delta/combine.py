"""Combining named LoRAs of a model into one more: the steps that both wings share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta import filling, held_base, inject, owned
from slimkit.core.delta import spec as rules
from slimkit.core.delta.drawn import drawing
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.merges import MAJORITIES, METHODS, combined
from slimkit.core.delta.spec import DeltaReport, LoraSpec, key
from slimkit.core.delta.tensors import wide
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]


def combine(
    access: DeltaStorage,
    model: Any,
    names: Any,
    name: Any,
    *,
    method: Any,
    rank: Any,
    density: Any,
    majority: Any,
    seed: Any,
) -> DeltaReport:
    """Make one more LoRA of several, in place; see `combine_delta` of the wings.

    Everything is decided and computed before the model is touched.
    """
    rules.delta_name(name)
    merge = METHODS[check.choice(method, METHODS, "method")]
    check.choice(majority, MAJORITIES, "majority")
    check.integer(seed, "seed", minimum=0)
    if rank is not None:
        check.positive(rank, "rank")
        if merge.on != "product":
            raise ArgumentError(f"rank goes with the methods that end in 'svd'. Received: method={method!r}")
    if merge.keep:
        if density is None:
            check.wrong_value("density", f"the share of entries that method={method!r} keeps, in (0, 1]", density)
        check.ratio(density, "density", one=True)
    elif density is not None:
        raise ArgumentError(f"density goes with methods that drop entries. Received: method={method!r}")
    layers = access.layers(model)
    weights = rules.weights_of(names, sorted({n for layer in layers.values() for n in layer.delta_specs}))
    acting = inject.active_weights(access, model)
    for one in owned.owned(access, model):
        both = [n for n in weights if n in one.owners]
        if both:
            raise UnsupportedError(
                f"{both[0]!r} has values of its own for {one.path}, which no method combines; combine deltas without."
            )
    chosen = {p: x for p, x in layers.items() if any(n in x.delta_specs for n in weights)}
    made: dict[str, tuple[LoraSpec, Array, Array]] = {}
    for path, layer in chosen.items():
        here = {n: w for n, w in weights.items() if n in layer.delta_specs}
        rng = drawing(seed, path)
        made[path] = _one(access, path, layer, here, method, rank, 1.0 if density is None else density, majority, rng)
    specs = {path: spec for path, (spec, _, _) in made.items()}
    parts = {path: {"a": a, "b": b} for path, (_, a, b) in made.items()}
    report = filling.put_made(access, model, name, specs, parts, freeze=False)
    inject.activate(access, model, name)
    stopped = ", ".join(map(repr, acting))
    notes: tuple[str, ...] = (
        f"made by {method} of {', '.join(f'{w:g} {n}' for n, w in weights.items())}; it does not train",
    )
    notes += (f"{stopped} no longer act; set_delta chooses again",) if stopped else ()
    for note in notes:
        logger.info("%s", note)
    return DeltaReport("lora", name, report.layers, notes=notes)


def _one(
    access: DeltaStorage,
    path: str,
    layer: Any,
    weights: Mapping[str, float],
    method: str,
    rank: int | None,
    density: float,
    majority: str,
    rng: np.random.Generator,
) -> tuple[LoraSpec, Array, Array]:
    """The new LoRA of one layer: its options, a and b."""
    if layer.delta_kind != "lora":
        raise UnsupportedError(f"{path} carries {layer.delta_kind!r}; only LoRAs can be combined.")
    merge = METHODS[method]
    specs: dict[str, LoraSpec] = {n: layer.delta_specs[n] for n in weights}
    for name, spec in specs.items():
        what = next((w for w, there in (("dora", spec.dora), ("lora_bias", spec.bias)) if there), "")
        what = what or ("a compressed delta" if spec.rest else "")
        what = what or ("a module that reads its weights itself" if spec.parameters else "")
        what = what or ("init='pissa' by the factors" if spec.init == "pissa" and merge.on == "factors" else "")
        if what:
            raise UnsupportedError(f"{path}: {name!r} cannot be combined by method={method!r}: {what}.")
    if len({spec.keep_zeros for spec in specs.values()}) > 1:
        raise UnsupportedError(f"{path}: {', '.join(specs)}: one keeps the zeros of the base and another does not.")
    pairs = []
    for name, spec in specs.items():
        tensors = layer.delta_tensors(name)
        parts = {p: access.value(tensors[key("lora", p, name)]) for p in ("a", "b")}
        a, b = wide(parts["a"]), wide(parts["b"])
        if spec.init == "pissa":  # what it took out of the base is part of it, see LoraLayer
            a0, b0 = (access.value(tensors[key("lora", p, name)]) for p in ("a0", "b0"))
            a, b = np.concatenate([a, wide(a0)], 0), np.concatenate([b, -wide(b0)], 1)
        pairs.append((a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)))
        shapes, dtype = (parts["a"].shape[1:], parts["b"].shape[2:]), parts["a"].dtype
    ranks = {n: a.shape[0] for n, (a, _) in zip(specs, pairs)}
    if merge.on == "factors" and len(set(ranks.values())) > 1:
        raise ArgumentError(
            f"{path}: method={method!r} adds a to a and b to b, so the ranks must be equal. Received: {ranks}; "
            f"{'cat' if method == 'linear' else method + '_svd'!r} takes any."
        )
    smaller = min(pairs[0][0].shape[1], pairs[0][1].shape[0])
    scales = [specs[n].scaling * w for n, w in weights.items()]
    kept = min(max(ranks.values()) if rank is None else rank, smaller)  # more would be zeros
    a, b = combined(pairs, scales, method, rank=kept, density=density, majority=majority, rng=rng)
    zeros, held = next(iter(specs.values())).keep_zeros, held_base.kind_of(layer)
    spec = LoraSpec(rank=len(a), alpha=float(len(a)), keep_zeros=zeros, base_dtype=held)
    a, b = a.reshape(len(a), *shapes[0]), b.reshape(*b.shape, *shapes[1])
    return spec, np.ascontiguousarray(a.astype(dtype)), np.ascontiguousarray(b.astype(dtype))
