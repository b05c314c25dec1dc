"""The kinds whose options differ from layer to layer: how each layer's come about, and out of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from slimkit.core import check
from slimkit.core.delta import held_base, ia3, miss, shira, starts
from slimkit.core.delta import spec as rules
from slimkit.core.delta.ia3 import Ia3Spec
from slimkit.core.delta.miss import MissSpec
from slimkit.core.delta.shira import ShiraSpec
from slimkit.core.delta.spec import LoraSpec, Site

if TYPE_CHECKING:
    from slimkit.core.delta.framework import DeltaFramework

Specs = Mapping[str, Any]

# kind -> one layer's options
SPECS: dict[str, type] = {"lora": LoraSpec, "ia3": Ia3Spec, "miss": MissSpec, "shira": ShiraSpec}
_BY_LAYER: dict[str, Callable[..., Specs]] = {"ia3": ia3.by_layer, "miss": miss.by_layer, "shira": shira.by_layer}


def specs(kind: str, sites: Mapping[str, Site], paths: Sequence[str], options: Mapping[str, Any]) -> Specs | None:
    """Path -> options of each chosen layer; None for a kind whose layers are all alike.

    Example:
        >>> specs("shira", {"q": Site("linear", (8, 8))}, ["q"], {"rank": 2})["q"].rank
        2
    """
    return _BY_LAYER[kind](sites, paths, **options) if kind in _BY_LAYER else None


def spec_of_record(kind: str, value: Any) -> Any:
    """One layer's options from `to_dict`'s values; an unknown key is refused with the nearest known one.

    Example:
        >>> spec_of_record("lora", {"rank": 2}).rank
        2
    """
    check.instance(value, Mapping, "spec", "a mapping")
    known = [field.name for field in fields(SPECS[kind])]
    for name in value:
        check.choice(name, known, f"{kind} option")
    return SPECS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def loras(
    access: DeltaFramework, model: Any, sites: Mapping[str, Site], paths: Sequence[str], options: Mapping[str, Any]
) -> tuple[dict[str, LoraSpec], dict[str, Any], list[str]]:
    """Path -> LoRA of each chosen layer, path -> rows that a begins with where data says them, and what to tell."""
    sites = {**sites, **{p: replace(sites[p], zeros=access.keeps_zeros(access.module(model, p))) for p in paths}}
    plain = {name: value for name, value in options.items() if name not in ("calibration", "loss")}
    specs, loss = rules.lora_specs(sites, paths, **plain), options.get("loss")
    batches = starts.check_data(specs[paths[0]].init, options.get("calibration"), loss)
    specs = held_base.inherited(access, model, specs)
    held_base.check(access, model, sites, specs)
    notes = _told_of_zeros(sites, specs, options.get("keep_zeros"))
    begun, said = starts.work_out(access, model, sites, specs, batches, loss) if batches else ({}, [])
    return specs, begun, notes + said


def _told_of_zeros(sites: Mapping[str, Site], specs: Mapping[str, LoraSpec], asked: Any) -> list[str]:
    """A line where LoRAs keep the zeros of sparse layers without being asked, and one where they fill them."""
    kept = [p for p, spec in specs.items() if spec.keep_zeros]
    filled = [p for p, spec in specs.items() if sites[p].zeros and not spec.keep_zeros]
    notes = []
    if kept and asked is None:
        notes.append(
            f"{len(kept)} layers were made sparse: their deltas keep the zeros; keep_zeros=False lets them fill"
        )
    if filled:
        notes.append(f"{len(filled)} sparse layers get deltas that fill their zeros when merged: {filled[0]} ...")
    return notes
