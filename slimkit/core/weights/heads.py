"""Attention heads: what a model says of them, how many there are before and after, which rows and columns they own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import UnsupportedError

Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Heads:
    """What a model says of an attention layer: query heads, key/value heads and the width of one."""

    queries: int
    keys: int | None = None
    size: int | None = None


@dataclass
class Attention:
    """One attention layer: heads and head width in the file (source) and in the model (target)."""

    path: str
    source: Heads
    target: Heads
    layout: str  # separate, fused or grouped
    shared_dims: bool = False  # a norm over the head's width ties the choice of all heads
    group: str = ""  # layers of one group keep the same heads; the layer's own path where it is alone


def heads_told_by(owner: Any) -> Heads | None:
    """The heads that a layer or a configuration object names in its attributes, under any of their usual names."""

    def first(*names: str) -> int | None:
        found = (getattr(owner, n, None) for n in names)
        return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    queries = first("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_q_heads")
    if queries is None:
        return None
    return Heads(
        queries,
        first("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"),
        first("head_dim", "attention_head_size", "head_size", "d_kv", "key_value_proj_dim"),
    )


def normed_role(word: str) -> str | None:
    """Whose rows a norm inside attention scales, by its name ("q_norm", "key_layernorm", "k_ln")."""
    word = word.lower()
    for part in ("layer", "norm", "rms", "ln", "_"):
        word = word.replace(part, "")
    return {"q": "query", "query": "query", "k": "key", "key": "key"}.get(word)


def measure(
    path: str,
    layout: str,
    rows: Mapping[str, tuple[int, int]],
    told: Heads | None,
    head_size: int | None,
    config: Mapping[str, Any],
) -> Attention:
    """Heads before and after, from row counts; every division must come out even."""

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"attention layer {path!r}: {why}. Say how wide one head of the file is: PruneConfig.set_head_size(...)."
        )

    if told is None and head_size is None:
        raise refuse("the model does not say its number of heads")
    queries = told.queries if told else None
    if layout == "separate":
        q, k = rows.get("query"), rows.get("key", rows.get("value"))
        if q is None or k is None:
            raise refuse("it has no query or no key")
        size = _even(q[1], queries, refuse) if queries else head_size or 0
        target = Heads(_even(q[1], size, refuse), _even(k[1], size, refuse), size)
        source_size = head_size or config_size(config, q[0]) or size
        source = Heads(_even(q[0], source_size, refuse), _even(k[0], source_size, refuse), source_size)
    else:
        total = rows[layout]
        keys = (told.keys or told.queries) if told else None
        if queries and keys:
            size = _even(total[1], queries + 2 * keys, refuse)
        else:
            size = head_size or 0
            queries = keys = _even(total[1], 3 * size, refuse)
        target = Heads(queries, keys, size)
        source_size = head_size or config_size(config, total[0] // 3 if queries == keys else None) or size
        count = _even(total[0], source_size, refuse)
        asked = config.get("num_key_value_heads")
        source_keys = asked if queries != keys and isinstance(asked, int) else _even(count, queries // keys + 2, refuse)
        source = Heads(count - 2 * source_keys, source_keys, source_size)
    for heads in (source, target):
        if not heads.keys or not heads.queries or heads.queries % heads.keys:
            raise refuse(f"{heads.queries} query heads do not share {heads.keys} key heads evenly")
    return Attention(path, source, target, layout, group=path)


def told_heads(path: str, heads: Mapping[str, Heads]) -> Heads | None:
    """What the model says of an attention layer: itself, a module inside it, else the nearest module around it."""
    inside = [p for p in heads if p == path or p.startswith(path + ".")]
    around = [p for p in heads if p == "" or path.startswith(p + ".")]
    if inside:
        return heads[min(inside, key=len)]
    return heads[max(around, key=len)] if around else None


def _even(length: int, size: int, refuse: Any) -> int:
    if size < 1 or length % size:
        raise refuse(f"{length} rows are no whole number of heads of width {size}")
    return length // size


def config_size(config: Mapping[str, Any], rows: int | None) -> int | None:
    """The head's width by a config.json, where it fits the number of query rows."""
    for key in ("head_dim", "d_kv", "attention_head_size"):
        size = config.get(key)
        if isinstance(size, int) and size > 0 and (rows is None or rows % size == 0):
            return size
    for key in ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads"):
        heads = config.get(key)
        if rows and isinstance(heads, int) and heads > 0 and rows % heads == 0:
            return rows // heads
    return None


def best(score: Array, count: int) -> Index:
    """Positions of the highest scores, ascending; of equal ones the earlier stays.

    Example:
        >>> best(np.array([1.0, 3.0, 3.0, 2.0]), 2)
        array([1, 2])
    """
    return np.sort(np.argsort(-score, kind="stable")[:count])


@dataclass
class Kept:
    """The heads that stay in one attention layer, and the channels that stay in each key/value group."""

    source: Heads
    layout: str
    queries: Index
    keys: Index
    inner_qk: Index  # (key heads of the file, channels kept)
    inner_vo: Index

    @classmethod
    def all(cls, attention: Attention) -> Kept:
        """Everything stays."""
        source = attention.source
        inner = np.tile(np.arange(source.size or 1), (source.keys or 1, 1))
        return cls(source, attention.layout, np.arange(source.queries), np.arange(source.keys or 1), inner, inner)

    def positions(self, role: str) -> Index:
        """Kept positions on an axis, in the order of the file."""
        if role in ("fused", "grouped"):
            return np.sort(np.concatenate([self.part(r) for r in ("query", "key", "value")]))
        if role == "heads":
            return self.queries
        if role == "dims":
            return self.inner_qk[0]
        return self.part(role)

    def part(self, role: str) -> Index:
        """Kept rows of query, key or value (on a fused axis if the layer has one), or columns of the output matrix."""
        size, share = self.source.size or 1, self.source.queries // (self.source.keys or 1)
        heads: Index = self.queries if role in ("query", "out") else self.keys
        group = heads // share if role in ("query", "out") else heads
        inner = (self.inner_qk if role in ("query", "key") else self.inner_vo)[group]
        slot = heads
        if role != "out" and self.layout == "grouped":
            within = heads % share if role == "query" else share + (role == "value")
            slot = group * (share + 2) + within
        elif role != "out" and self.layout == "fused":
            n_q, n_k = self.source.queries, self.source.keys or 1
            slot = heads + {"query": 0, "key": n_q, "value": n_q + n_k}[role]
        return (slot[:, None] * size + inner).reshape(-1)


def choose_heads(attention: Attention, scores: Mapping[str, Array] | None, rotary: bool) -> Kept:
    """The heads of one attention layer that stay; heads are kept or dropped whole, and a key head with its queries.

    Args:
        attention: heads before and after.
        scores: from `Scores.attention`; None keeps the first ones.
        rotary: a narrower head keeps evenly spaced pairs, whose frequencies are those of the narrow rotation.

    Raises:
        UnsupportedError: the model wants more queries per key head than the file has.
    """
    source, target = attention.source, attention.target
    n_k, share, want_share = (
        source.keys or 1,
        source.queries // (source.keys or 1),
        target.queries // (target.keys or 1),
    )
    if want_share > share or (target.keys or 1) > n_k:
        raise UnsupportedError(
            f"attention layer {attention.path!r}: {target.queries} query heads on {target.keys} key heads cannot be "
            f"cut out of {source.queries} on {n_k}."
        )
    size, want = source.size or 1, target.size or 1
    if scores is None:
        zero = np.zeros((source.queries, size))
        scores, even = {"value": zero, "query": zero}, False
    else:
        even = rotary
    # What a head brings to the output is measured already where "seen" is there, with its queries and keys at work.
    per_head = scores["seen"].sum(axis=1) if "seen" in scores else _normed(scores["value"]) + _normed(scores["query"])
    grouped = per_head.reshape(n_k, share)
    within = np.stack([best(row, want_share) for row in grouped])  # (n_k, want_share)
    keys = best(np.take_along_axis(grouped, within, axis=1).sum(axis=1), target.keys or 1)
    queries = (keys[:, None] * share + within[keys]).reshape(-1)
    dims: Callable[[Array, bool], Index] = lambda s, tied: _inner(s.reshape(n_k, share, size).sum(axis=1), want, tied)
    inner_qk = dims(scores["query"], attention.shared_dims)
    if even and want < size:
        half = np.arange(want // 2) * size // want
        inner_qk = np.tile(np.concatenate([half, half + size // 2]), (n_k, 1))
    return Kept(source, attention.layout, queries, keys, inner_qk, dims(scores.get("seen", scores["value"]), False))


def _normed(score: Array) -> Array:
    """One number per head, with mean 1 over the layer."""
    total = np.sqrt(np.sum(np.square(score), axis=1))
    return total / (float(total.mean()) or 1.0)


def _inner(score: Array, want: int, tied: bool) -> Index:
    if tied:
        return np.tile(best(score.sum(axis=0), want), (len(score), 1))
    return np.stack([best(row, want) for row in score])
