"""PEFT's files of MiSS and SHiRA: what they say, and how such deltas are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta import miss, shira
from slimkit.core.delta.bundle import compare_keys
from slimkit.core.delta.miss import MissSpec
from slimkit.core.delta.peft import ROOT
from slimkit.core.delta.peft_write import BaseFacts, write_layers
from slimkit.core.delta.shira import ShiraSpec
from slimkit.core.delta.spec import Site
from slimkit.core.errors import FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]
Found = dict[str, dict[str, Array]]


def read_miss(config: Mapping[str, Any], path: str, parts: Mapping[str, Array]) -> MissSpec:
    """One layer's MiSS; `init_weights` says what the matrix means."""
    block, form = parts["block"], config.get("init_weights", True)
    if form == "bat" or block.ndim != 2:
        raise UnsupportedError(f"{path}: init_weights={form!r} of MiSS changes the weight by itself, and is not read.")
    rank, width = block.shape
    said = check.positive(config.get("r", 64), "r")
    if said != rank:
        hint = "; it looks transposed" if width == said else ""
        raise FileFormatError(f"{path}: miss_block has {rank} rows, its configuration says r={said}{hint}.")
    repeat = check.positive(config.get("mini_r", 1), "mini_r") if form == "mini" else 0
    if repeat and repeat != width:
        raise FileFormatError(f"{path}: miss_block has {width} columns, its configuration says mini_r={repeat}.")
    return MissSpec(rank, repeat, float(config.get("miss_dropout") or 0.0))


def read_shira(config: Mapping[str, Any], path: str, parts: Mapping[str, Array]) -> ShiraSpec:
    """One layer's SHiRA; its indices are still pairs (see `flat_index`)."""
    compare_keys({f"{path} {p}": 0 for p in parts}, {f"{path} {p}": 0 for p in ("values", "index")}, "the file")
    count = len(parts["values"])
    if parts["index"].shape != (2, count):
        raise FileFormatError(f"{path}: shira_indices has shape {parts['index'].shape}, for {count} values.")
    seed = config.get("random_seed")
    return ShiraSpec(
        check.positive(config.get("r", 32), "r"), "random", 0 if seed is None else check.integer(seed, "seed"), count
    )


def flat_index(parts: dict[str, Array], spec: ShiraSpec, path: str, shape: tuple[int, ...]) -> None:
    """Turn rows and columns into flat indices in rising order, in place, the values with them.

    Raises:
        FileFormatError: there are not as many as the rank says, or one lies outside the layer.
    """
    pairs = parts["index"].astype(np.int64)
    if spec.count != spec.rank * sum(shape):
        raise FileFormatError(f"{path}: {spec.count} entries, where r={spec.rank} means {spec.rank * sum(shape)}.")
    if (pairs != parts["index"]).any() or (pairs < 0).any() or (pairs >= np.array(shape)[:, None]).any():
        raise FileFormatError(f"{path}: shira_indices names entries that a layer of shape {shape} does not have.")
    flat = pairs[0] * shape[1] + pairs[1]
    order = np.argsort(flat, kind="stable")
    parts["index"], parts["values"] = flat[order].astype(np.int32), parts["values"][order]


def write_miss(
    folder: files.PathLike,
    layers: Mapping[str, tuple[MissSpec, Mapping[str, Array]]],
    sites: Mapping[str, Site],
    facts: BaseFacts,
    about: Mapping[str, Any],
) -> None:
    """Write a MiSS as PEFT's two files; `layers` is path -> (options, tensors by slimkit's names below a layer).

    Raises:
        UnsupportedError: layers differ where PEFT has one word for all.
    """
    spec = _same(layers, "miss", MissSpec.to_dict)
    config = {
        "peft_type": "MISS",
        "r": spec.rank,
        "miss_dropout": spec.dropout,
        "mini_r": spec.repeat or 1,
        "init_weights": "mini" if spec.repeat else True,
    }
    arrays = {f"{ROOT}{p}.miss_block": parts[miss.PART] for p, (_, parts) in layers.items()}
    write_layers(folder, layers, arrays, sites, facts, about, config, biases={"lora_only": "MiSS_only"})


def write_shira(
    folder: files.PathLike,
    layers: Mapping[str, tuple[ShiraSpec, Mapping[str, Array]]],
    sites: Mapping[str, Site],
    facts: BaseFacts,
    about: Mapping[str, Any],
) -> None:
    """Write a SHiRA as PEFT's two files; the arguments are those of `write_miss`.

    Raises:
        UnsupportedError: ranks differ, or a sparse layer has fewer entries than its rank says.
    """
    rank = _same(layers, "shira", lambda s: {"rank": s.rank}).rank
    arrays = {}
    for path, (spec, parts) in layers.items():
        outputs, inputs = sites[path].shape
        if spec.count != rank * (outputs + inputs):
            raise UnsupportedError(
                f"PEFT's shira of r={rank} has {rank * (outputs + inputs)} entries on {path}; this one has "
                f"{spec.count}. Save with format='slimkit'."
            )
        arrays[f"{ROOT}{path}.shira_weight"] = parts[shira.VALUES]
        arrays[f"{ROOT}{path}.shira_indices"] = np.stack(np.divmod(parts[shira.INDEX], inputs)).astype(np.int32)
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    write_layers(folder, layers, arrays, sites, facts, about, config)


def _same(layers: Mapping[str, tuple[Any, Any]], kind: str, words: Any) -> Any:
    specs = [spec for spec, _ in layers.values()]
    for name, value in words(specs[0]).items():
        if any(words(s)[name] != value for s in specs):
            raise UnsupportedError(f"PEFT takes {name} of {kind} for all layers alike; save with format='slimkit'.")
    return specs[0]
