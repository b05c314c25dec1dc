"""What a configuration can say of a model's widths, found by asking it.

No list of model families: one field after another is given another value, a model is built from it without weights, and
the axes that changed are the axes it speaks of. Their widths and the fields make linear demands (an axis of heads times
head size must be the hidden size that the field says), and what may still be cut are the levers of `levers`.

Three kinds of field need a word of their own. The number of heads leaves no trace in shapes where code divides the
hidden size by it; the axes that hold heads say it. The size of a head never changes. A ratio (`mlp_ratio`)
speaks of a width relative to another one, and frees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from slimkit.core.prune.attributes import FOUR_TIMES, HEADS, HIDDEN, OTHER, RATIOS, WIDTHS, Field, parts_of
from slimkit.core.prune.expressions import Expr, linear_form, size_of
from slimkit.core.prune.levers import Lever, Row, solve_levers
from slimkit.core.prune.solve import View

Shapes = Mapping[str, tuple[int, ...]]
# field -> new value in, shapes of the model that the configuration then builds out; None: it builds none
Build = Callable[[Mapping[str, Field]], Shapes | None]
Axis = tuple[str, int]

# Head sizes, under every name: they stay what they are.
_HEAD_SIZE = re.compile(r"head_(dim|size)|(^|_)d_kv$|key_dim|kv_channels|rope")
_ELEMENT = re.compile(r"^(.*)\[(\d+)\]$")
# Words by which a field tells whose heads it counts, where a model has several towers.
_TOWERS = re.compile(r"encoder|decoder|text|vision|audio|qformer")


@dataclass
class Said:
    """What a configuration says.

    Args:
        fields: the fields as they are, with those that must be written down.
        numbers: field, or element "field[2]", -> value; those that may change.
        slopes: field -> axis -> change of its width by one of the value.
        ratios: ratio -> the axes that it speaks of.
        explicit: fields that are unset today, and the value that says the same.
        shapes: what the configuration builds today.
        together: field -> others of its value that must change with it, or another architecture is built.
        computed: tensors that no file holds: what is cut from them comes back otherwise, so that their widths stay.
    """

    fields: dict[str, Field]
    numbers: dict[str, int]
    slopes: dict[str, dict[Axis, Fraction]]
    ratios: dict[str, list[Axis]]
    explicit: dict[str, int]
    shapes: Shapes
    together: dict[str, list[str]] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)

    def with_values(self, values: Mapping[str, int | float]) -> dict[str, Field]:
        """Whole fields for new values of fields and elements."""
        out: dict[str, Field] = {}
        every = {n: v for name, v in values.items() for n in (name, *self.together.get(name, ()))}
        for name, value in every.items():
            found = _ELEMENT.match(name)
            if not found:
                out[name] = value
                continue
            held = out.setdefault(found[1], _listed(self.fields[found[1]]))
            assert isinstance(held, list)
            held[int(found[2])] = int(value)
        return out

    def changes(self, view: View, levers: list[Lever], steps: Mapping[str, int]) -> dict[str, tuple[Field, Field]]:
        """The fields to rewrite for so many steps of each lever, as (before, after)."""
        numbers = dict(self.numbers)
        counts = view.counts
        for lever in levers:
            counts.update(lever.counts(steps[lever.name]))
            for name, each in lever.says.items():
                if name in numbers:
                    numbers[name] -= int(each * (lever.size - steps[lever.name]))
        after = self.with_values({n: v for n, v in numbers.items() if v != self.numbers[n]})
        for ratio, axes in self.ratios.items():
            made = _ratio(self, ratio, axes, view, counts, numbers)
            if made != self.fields[ratio]:
                after[ratio] = made
        if after:
            # What was derived from other fields must say its value itself, now that these change.
            after.update({n: after.get(n, v) for n, v in self.explicit.items()})
        before: dict[str, Field] = {n: None if n in self.explicit else self.fields[n] for n in after}
        return {n: (before[n], new) for n, new in after.items() if new != before[n]}

    def speakers(self, axis: Axis) -> set[str]:
        """The fields that speak of an axis."""
        return {n for n, s in self.slopes.items() if axis in s} | {n for n, axes in self.ratios.items() if axis in axes}


def _listed(value: Field) -> list[int]:
    assert isinstance(value, list)
    return list(value)


def _ratio(
    said: Said, ratio: str, axes: list[Axis], view: View, counts: Mapping[str, int], numbers: Mapping[str, int]
) -> float:
    """The ratio that gives the new widths, exactly as code computes them: int(width * ratio)."""
    old = said.fields[ratio]
    assert isinstance(old, (int, float))
    pairs = []
    for path, axis in axes:
        made = size_of(view.axes[path][axis], counts)
        base: Fraction = Fraction(said.shapes[path][axis]) / Fraction(old)
        for name, slopes in said.slopes.items():
            if (path, axis) in slopes and name in said.numbers:
                base *= Fraction(numbers[name], said.numbers[name])
        pairs.append((made, base))
    made, base = pairs[0]
    value = made / float(base)
    if value == old:
        return old
    for _ in range(8):
        if all(int(int(b) * value) == m for m, b in pairs):
            break
        value = math.nextafter(value, math.inf)
    return value


def ask(view: View, fields: Mapping[str, Field], build: Build) -> Said | str:
    """Find out what a configuration says of a model's axes.

    Args:
        view: the coupling of the model.
        fields: the configuration's numbers, as `widths_of` gives them.
        build: builds a model of other values, without weights.

    Returns:
        What it says, or in one line why it can say nothing of this model; "" where it builds no models at all.
    """
    base = build({})
    if base is not None and not base:
        return ""
    if base is None:
        return "the configuration builds no model of this class"
    for path, exprs in view.axes.items():
        if path in base and tuple(base[path]) != tuple(size_of(e, view.counts) for e in exprs):
            return f"{path} is {list(view.coupling.graph.shapes[path])}, and the configuration says {list(base[path])}"
    missing = next((path for path in view.axes if path not in base), None)
    if missing is not None:
        return f"the configuration knows no {missing}"
    said = Said(dict(fields), {}, {}, {}, {}, shapes=base)
    for name, value in _unset(fields):
        doubled = build({name: 2 * value})
        if doubled is not None and _changed(view, base, doubled) and build({name: value}) == base:
            said.explicit[name] = value
            said.fields[name] = value
    counted = {e.field for e in view.coupling.experts}
    cuttable = {size_of(e, view.counts) for exprs in view.axes.values() for e in exprs if not isinstance(e, int)}
    alone: dict[tuple[str, int], list[str]] = {}
    for name, value in _numbers(said, counted):
        if value > 1 and any(size % value == 0 for size in cuttable):
            slopes = _slopes(said, view, name, value, build)
            if slopes is not None:
                said.numbers[name], said.slopes[name] = value, slopes
            else:
                alone.setdefault((name.rpartition(".")[0], value), []).append(name)
    for (_, value), (first, *others) in alone.items():
        said.together[first] = others
        slopes = _slopes(said, view, first, value, build) if others else None
        if slopes is not None:
            said.numbers[first], said.slopes[first] = value, slopes
    for name, number in fields.items():
        if isinstance(number, (int, float)) and RATIOS.search(name):
            other = build({**said.explicit, name: 2 * number})
            axes = _changed(view, base, other) if other is not None else {}
            if axes:
                said.ratios[name] = list(axes)
    return said


def _unset(fields: Mapping[str, Field]) -> Iterator[tuple[str, int]]:
    """Fields that are unset and mean something of others: four times the hidden size, or hidden size over heads."""
    known = {n: v for n, v in fields.items() if type(v) is int}
    for prefix in dict.fromkeys(n.rpartition(".")[0] for n in fields):
        here = {n.rpartition(".")[2]: v for n, v in known.items() if n.rpartition(".")[0] == prefix}
        hidden = next((v for n, v in here.items() if HIDDEN.search(n)), 0)
        heads = next((v for n, v in here.items() if HEADS.search(n) and "kv" not in n and "key" not in n), 0)
        for name, value in (*((n, 4 * hidden) for n in FOUR_TIMES), ("head_dim", hidden // heads if heads else 0)):
            full = f"{prefix}.{name}" if prefix else name
            # One that the configuration does not declare may be read by this library and not by others.
            if value > 1 and full in fields and fields[full] is None:
                yield full, value


def _numbers(said: Said, counted: Collection[str]) -> Iterator[tuple[str, int]]:
    for path, value in said.fields.items():
        name = path.rpartition(".")[2]
        # Positions are no widths, though "max_position_embeddings" holds the word.
        if path not in counted and (OTHER.search(name) or _HEAD_SIZE.search(name)):
            continue
        if type(value) is int:
            yield path, value
        elif isinstance(value, list) and WIDTHS.search(name):
            yield from ((f"{path}[{k}]", v) for k, v in enumerate(value))


def _slopes(said: Said, view: View, name: str, value: int, build: Build) -> dict[Axis, Fraction] | None:
    """By how much each axis grows with a field; None where no other value builds a model of the same parameters."""
    tries = [2 * value, value // 2 if value % 2 == 0 else 0, value + 1]
    for other in (v for v in tries if v):
        built = build({**said.explicit, **said.with_values({name: other})})
        if built is not None and built.keys() == said.shapes.keys():
            apart = other - value
            return {axis: Fraction(grown, apart) for axis, grown in _changed(view, said.shapes, built).items()}
    # A field that must fit another one (heads must divide the hidden size) leaves no trace by itself.
    return {} if HEADS.search(name.rpartition(".")[2].partition("[")[0]) else None


def _changed(view: View, base: Shapes, other: Shapes) -> dict[Axis, int]:
    return {
        (path, axis): new - old
        for path in view.axes
        for axis, (old, new) in enumerate(zip(base[path], other.get(path, base[path])))
        if new != old
    }


def levers_said(view: View, said: Said) -> list[Lever]:
    """The levers whose every position the configuration can say."""
    rows: dict[tuple[tuple[str, Fraction], ...], Row] = {}

    def demand(expr: Expr, told: Mapping[str, Fraction]) -> None:
        _, slopes = linear_form(expr, place)
        row: Row = {names[k]: Fraction(v) for k, v in slopes.items()}
        row.update({n: -v for n, v in told.items()})
        if row:
            rows[tuple(sorted(row.items()))] = row

    names = list(view.counts)
    place = {name: k for k, name in enumerate(names)}
    relative = {axis: ratio for ratio, axes in said.ratios.items() for axis in axes}
    for path, exprs in view.axes.items():
        for axis, expr in enumerate(exprs):
            if path in said.computed:
                demand(expr, {})
                continue
            ratio = relative.get((path, axis))
            if ratio is not None:
                demand(expr, {ratio: Fraction(said.shapes[path][axis])})
                continue
            demand(expr, {n: s[path, axis] for n, s in said.slopes.items() if (path, axis) in s})
    for name, value in said.numbers.items():
        if HEADS.search(name.rpartition(".")[2].partition("[")[0]):
            for expr in _heads(view, name, value):
                demand(expr, {name: Fraction(1)})
    return solve_levers(rows.values(), view.counts, [*said.numbers, *said.ratios])


def _heads(view: View, name: str, value: int) -> list[Expr]:
    """The factors of axes that a field of the number of heads speaks of."""
    kinds = {v.name: v.kind for v in view.variables}
    found: dict[str, tuple[Expr, list[str]]] = {}
    for path, exprs in view.axes.items():
        for expr in exprs:
            for part, label in parts_of(expr, kinds) if not isinstance(expr, int) else ():
                if label == "heads" and size_of(part, view.counts) == value:
                    found.setdefault(repr(part), (part, []))[1].append(path)
    words = set(_TOWERS.findall(name))
    near = [part for part, paths in found.values() if words and any(w in p for w in words for p in paths)]
    # A tower with a configuration of its own that did not run has no heads here.
    return near if near or (words and "." in name) else [part for part, _ in found.values()]
