"""Which axes of a transformer's tensors share their channels, by names, layer kinds and the two sets of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimkit.core.errors import PlanError, UnsupportedError
from slimkit.core.weights.heads import Attention, Heads, config_size, measure, normed_role, told_heads
from slimkit.core.weights.projections import attention_path, attention_role, words_of

Shape = tuple[int, ...]

_LINEAR = ("linear", "linear_t")


@dataclass(frozen=True)
class SmallTensor:
    """One tensor of the small model: its shape and the kind of layer that owns it.

    Args:
        shape: the shape it must get.
        kind: "linear" (out, in), "linear_t" (in, out), "conv" (out, in, ...), "embedding" (row, column), "norm"
            or "other".
    """

    shape: Shape
    kind: str = "other"


@dataclass(frozen=True)
class Structure:
    """What a wing knows of the small model.

    Args:
        targets: name -> tensor, for all parameters and saved buffers.
        heads: module path -> its heads; "" for what the model's own config says.
        tied: groups of names that are one tensor.
        ignorable: names that the model computes itself, so that a file may hold them in vain.
        rotary: the model turns queries and keys by rotary position embeddings.
        computed: name -> shape of floating tensors that no saved file of the model holds.
    """

    targets: Mapping[str, SmallTensor]
    heads: Mapping[str, Heads] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    ignorable: frozenset[str] = frozenset()
    rotary: bool = False
    computed: Mapping[str, Shape] = field(default_factory=dict)


def computed_names(names: Iterable[str]) -> frozenset[str]:
    """Endings by which a file may name what a model computes itself ("embeddings.position_ids", "position_ids")."""
    endings = set()
    for name in names:
        words = name.split(".")
        # "attn.bias" may be a causal mask; a mere "bias" would excuse every bias of the file.
        endings.add(".".join(words[-2:]) if words[-1] in ("weight", "bias") else words[-1])
    return frozenset(endings)


@dataclass(frozen=True)
class AxisUse:
    """How one axis of one tensor uses a variable.

    Args:
        variable: key of a Width or an Attention in the plan.
        side: "producer", "consumer", "scale" or "value" for a Width; the role (query, out, ...) for an Attention.
        parts: how often the width lies one after the other on this axis (2 for a fused gate and up projection).
    """

    variable: str
    side: str
    parts: int = 1


@dataclass
class Width:
    """A dimension that several axes share."""

    source: int
    target: int
    uses: set[str] = field(default_factory=set)

    @property
    def coupled(self) -> bool:
        """Somebody writes it and somebody reads it, so that a choice of channels means the same to both."""
        return {"producer", "consumer"} <= self.uses


@dataclass
class WeightCoupling:
    """Every axis that must become shorter, with the variable it shares."""

    uses: dict[str, tuple[AxisUse | None, ...]]
    widths: dict[str, Width]
    attentions: dict[str, Attention]


@dataclass
class _Pair:
    """One tensor before and after."""

    name: str
    target: SmallTensor
    source: Shape

    @property
    def cut(self) -> list[int]:
        return [a for a, (s, t) in enumerate(zip(self.source, self.target.shape, strict=True)) if s != t]


def couple(
    structure: Structure,
    shapes: Mapping[str, Shape],
    head_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    fused_only: bool = False,
) -> WeightCoupling:
    """Find what is shared between the axes that must be cut.

    Args:
        structure: the small model.
        shapes: name in the model -> shape in the file, for every tensor that has one.
        head_size: width of one head in the file; None: ask `config`, then the model.
        config: config.json of the file's model, if there is one.
        fused_only: leave attention layers with separate matrices alone; their first rows are their first heads.

    Returns:
        A variable for every axis that differs; axes of equal length have none.

    Raises:
        PlanError: a shape that cannot come from the file's by cutting.
        UnsupportedError: heads cannot be found, or do not divide.
    """
    pairs = {}
    for name, shape in shapes.items():
        target = structure.targets[name]
        if len(shape) != len(target.shape) or any(s < t for s, t in zip(shape, target.shape, strict=True)):
            raise PlanError(
                f"{name}: the model wants shape {list(target.shape)}, the file has {list(shape)}; "
                "a tensor can be cut, not grown or reshaped."
            )
        pairs[name] = _Pair(name, target, shape)
    found = WeightCoupling({n: (None,) * len(p.source) for n, p in pairs.items()}, {}, {})
    roles = _attention_roles(pairs)
    for path in sorted({path for path, _ in roles.values()}):
        members = {n: role for n, (p, role) in roles.items() if p == path}
        if not fused_only or {"fused", "grouped"} & set(members.values()):
            _add_attention(found, path, members, pairs, structure, head_size, config or {})
    _share_position_bias(found, roles)
    if not fused_only and (unread := _unread_attention(pairs, roles)):
        raise UnsupportedError(
            f"{unread[0]!r} speaks of attention, and its layer's query, key and value were not found by their names, "
            'so its heads cannot be kept whole. AxisUse set_selection("first").'
        )
    _add_widths(found, pairs, roles)
    return found


def _attention_roles(pairs: Mapping[str, _Pair]) -> dict[str, tuple[str, str]]:
    """Name -> (attention layer, role) for every tensor of an attention layer."""
    roles: dict[str, tuple[str, str]] = {}
    for name, pair in pairs.items():
        words = words_of(name)
        role = attention_role(words[-1])
        if role is not None and (pair.target.kind in _LINEAR or words[-1] == name.rpartition(".")[2]):
            roles[name] = (attention_path(words), role)
    layers: dict[str, set[str]] = {}
    for path, role in roles.values():
        layers.setdefault(path, set()).add(role)
    whole = {p for p, r in layers.items() if r & {"fused", "grouped"} or {"query", "key", "value"} <= r}
    roles = {n: (p, r) for n, (p, r) in roles.items() if p in whole}
    for name, pair in pairs.items():
        if name in roles:
            continue
        words = name.split(".")
        inside = [p for p in (".".join(words[:i]) for i in range(len(words))) if p in whole]
        if inside and pair.target.kind in _LINEAR:
            roles[name] = (inside[-1], "out")
        elif inside:
            roles[name] = (inside[-1], pair.target.kind)
    return roles


def _add_attention(
    found: WeightCoupling,
    path: str,
    members: Mapping[str, str],
    pairs: Mapping[str, _Pair],
    structure: Structure,
    head_size: int | None,
    config: Mapping[str, Any],
) -> None:
    """Find the heads of one attention layer in the file and in the model, and note on which axes they lie.

    A query matrix is (heads * size, width) or, of kind "linear_t", (width, heads * size); a fused one has the rows of
    queries, keys and values, and an output matrix is (width, heads * size). Lengths are pairs: file, model.
    """
    rows: dict[str, tuple[int, int]] = {}  # role -> heads * size, of keys and values kv heads * size
    for name, role in members.items():
        if role in ("query", "key", "value", "fused", "grouped"):
            axis = _out_axis(pairs[name])  # the heads lie on what the projection makes
            rows.setdefault(role, (pairs[name].source[axis], pairs[name].target.shape[axis]))
        elif role == "out" and len(pairs[name].source) == 2:
            axis = 1 - _out_axis(pairs[name])  # and on what the output projection reads
            rows.setdefault("out", (pairs[name].source[axis], pairs[name].target.shape[axis]))
    if all(s == t for s, t in rows.values()):
        return
    layout = "fused" if "fused" in rows else "grouped" if "grouped" in rows else "separate"
    attention = measure(path, layout, rows, told_heads(path, structure.heads), head_size, config)
    size = (attention.source.size, attention.target.size)  # of one head
    # The query matrix became narrower on both sides alike: that says fewer heads, or narrower ones.
    inputs = {  # widths that queries are made from
        (pairs[n].source[1 - _out_axis(pairs[n])], pairs[n].target.shape[1 - _out_axis(pairs[n])])
        for n, role in members.items()
        if role in ("query", "fused", "grouped") and len(pairs[n].source) == 2
    }
    unknown = head_size is None and config_size(config, max(s for s, _ in rows.values())) is None
    if unknown and any(s != t for s, t in inputs) and attention.source.queries != attention.target.queries:
        raise UnsupportedError(
            f"attention layer {path!r}: {rows} rows may mean fewer heads or narrower ones. Keep the file's config.json "
            "beside it, or say how wide one head of the file is: PruneConfig.set_head_size(...)."
        )
    found.attentions[path] = attention
    heads = (attention.source.queries, attention.target.queries)
    for name, role in members.items():
        pair = pairs[name]
        uses = list(found.uses[name])
        for axis in pair.cut:
            lengths = (pair.source[axis], pair.target.shape[axis])
            if role in rows and role != "out" and axis == _out_axis(pair):
                uses[axis] = AxisUse(path, role)
            elif role == "out" and len(pair.source) == 2 and axis != _out_axis(pair) and lengths == rows["out"]:
                uses[axis] = AxisUse(path, "out")
            elif role == "norm" and lengths == size:
                attention.shared_dims = True
                uses[axis] = AxisUse(path, "dims")
            elif (
                role == "norm"
                and layout == "separate"
                and (row := normed_role(words_of(name)[-1]))
                and lengths == rows[row]
            ):
                uses[axis] = AxisUse(path, row)
            elif role in ("embedding", "other") and lengths == heads:
                uses[axis] = AxisUse(path, "heads")
        found.uses[name] = tuple(uses)


def _share_position_bias(found: WeightCoupling, roles: Mapping[str, tuple[str, str]]) -> None:
    """Tie the heads of a stack whose first layer alone owns a table with a column per head (T5), in place."""
    for name, (path, role) in roles.items():
        if role == "embedding" and any(use and use.side == "heads" for use in found.uses[name]):
            stack = [p for p in found.attentions if _without_numbers(p) == _without_numbers(path)]
            owners = {p for n, (p, r) in roles.items() if r == "embedding" and p in stack}
            for other in stack if owners == {path} else ():
                found.attentions[other].group = path


def _without_numbers(path: str) -> str:
    return ".".join("*" if word.isdigit() else word for word in path.split("."))


def _out_axis(pair: _Pair) -> int:
    return 1 if pair.target.kind == "linear_t" and len(pair.source) == 2 else 0


def _add_widths(found: WeightCoupling, pairs: Mapping[str, _Pair], roles: Mapping[str, tuple[str, str]]) -> None:
    free: list[tuple[_Pair, int, str]] = []
    for name, pair in pairs.items():
        for axis in pair.cut:
            if found.uses[name][axis] is None:
                free.append((pair, axis, _side(pair, axis)))
    # The model's own width: what embeddings and norms outside attention are wide. It is one for the whole model.
    wide = {
        (p.source[a], p.target.shape[a])
        for p, a, side in free
        if (p.target.kind == "embedding" and side == "producer") or (p.target.kind == "norm" and p.name not in roles)
    }
    groups: dict[tuple[str, int, int], list[tuple[_Pair, int, str, int]]] = {}
    consumed = Counter((_block(p.name), p.source[a], p.target.shape[a]) for p, a, side in free if side == "consumer")
    for pair, axis, side in free:
        s, t = pair.source[axis], pair.target.shape[axis]
        block, parts = _block(pair.name), 1
        if side == "rows":
            block = f"rows of {pair.name}"
        elif (s, t) in wide:
            block = "width"
        elif (
            side == "producer"
            and s % 2 == 0 == t % 2
            and (block, s, t) not in consumed
            and (block, s // 2, t // 2) in consumed
        ):
            s, t, parts = s // 2, t // 2, 2
        groups.setdefault((block, s, t), []).append((pair, axis, side, parts))
    # A dimension that some block only writes or only reads is shared between blocks: one for the whole model then.
    shared = {
        (s, t)
        for (_, s, t), members in groups.items()
        if not {"producer", "consumer"} <= {side for _, _, side, _ in members}
    }
    merged: dict[tuple[str, int, int], list[tuple[_Pair, int, str, int]]] = {}
    for (block, s, t), members in groups.items():
        own = block == "width" or block.startswith("rows of ") or (s, t) not in shared
        merged.setdefault((block if own else "model", s, t), []).extend(members)
    for (block, s, t), members in merged.items():
        for key, chosen in (_experts(block, members) if block not in ("width", "model") else {block: members}).items():
            variable = f"{key}:{s}->{t}"
            width = found.widths.setdefault(variable, Width(s, t))
            for pair, axis, side, parts in chosen:
                width.uses.add(side)
                uses = list(found.uses[pair.name])
                uses[axis] = AxisUse(variable, side, parts)
                found.uses[pair.name] = tuple(uses)


def _experts(block: str, members: list[Any]) -> dict[str, list[Any]]:
    """Members by the innermost numbered module they lie in, if each such module writes and reads the width itself."""
    inner: dict[str, list[Any]] = {}
    for member in members:
        inner.setdefault(_inner(member[0].name), []).append(member)
    if len(inner) > 1 and all({"producer", "consumer"} <= {m[2] for m in chosen} for chosen in inner.values()):
        return inner
    return {block: members}


def _block(name: str) -> str:
    """The path up to the first number ("encoder.layer.3.output.dense.weight" -> "encoder.layer.3"), or ""."""
    words = name.split(".")
    return next((".".join(words[: i + 1]) for i, w in enumerate(words) if w.isdigit()), "")


def _inner(name: str) -> str:
    """The path up to the last number that is not the layer's own."""
    words = words_of(name)
    return next((".".join(words[: i + 1]) for i in range(len(words) - 1, -1, -1) if words[i].isdigit()), "")


def _side(pair: _Pair, axis: int) -> str:
    """Who an axis is to its width: the layer that writes it, one that reads it, a scale on it, or a table's rows."""
    kind, rank = pair.target.kind, len(pair.source)
    if kind == "embedding":
        return "rows" if axis == 0 else "producer"
    if kind == "norm":
        return "value" if pair.name.endswith(("bias", "beta")) else "scale"
    if kind in ("linear", "linear_t", "conv"):
        return "producer" if axis == _out_axis(pair) or rank == 1 else "consumer"
    return "value"


def _unread_attention(pairs: Mapping[str, _Pair], roles: Mapping[str, Any]) -> list[str]:
    """Matrices that must be cut, whose names speak of attention, and which no known attention layer owns."""
    return [
        name
        for name, pair in pairs.items()
        if pair.cut and name not in roles and pair.target.kind in _LINEAR and len(pair.source) == 2
        if any("attn" in word or "attention" in word for word in name.lower().split("."))
    ]
