"""What cache.json says of a teacher cache, checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import FileFormatError

VERSION = 1


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a cache, finished or not.

    Raises:
        FileFormatError: there are none, or they are damaged.
    """
    facts = files.read_json(folder / "cache.json", "directory", limit_bytes=4 << 30)
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise FileFormatError(f"{folder} holds no teacher cache of version {VERSION}")
    if not _well_formed(facts):
        raise FileFormatError(f"{folder / 'cache.json'} is damaged: build the cache again in another folder")
    return facts


def _well_formed(facts: Mapping[str, Any]) -> bool:
    """Whether a cache's facts have the form in which `build` writes them."""
    shards, targets, widths = facts.get("shards"), facts.get("targets"), facts.get("widths")
    if not (isinstance(shards, list) and isinstance(targets, list) and isinstance(widths, list)):
        return False
    if not isinstance(facts.get("complete"), bool) or not {"teacher", "top_k", "dtype"} <= set(facts):
        return False
    heats = facts.get("temperatures")
    if "sampled" in facts and not (
        isinstance(heats, list) and len(heats) == len(targets) and all(_is_heat(heat) for heat in heats)
    ):
        return False
    if shards and (len(widths) != len(targets) or not all(type(w) is int and 0 < w < 2**31 for w in widths)):
        return False
    return all(isinstance(target, dict) and "logits" in target for target in targets) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("file"), str)
        and isinstance(shard.get("digest"), str)
        and isinstance(shard.get("keys"), list)
        and all(isinstance(rows, list) and all(map(_is_key, rows)) for rows in shard["keys"])
        for shard in shards
    )


def _is_heat(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_key(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 32 and set(text) <= set("0123456789abcdef")
