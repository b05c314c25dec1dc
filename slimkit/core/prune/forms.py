"""The form of a cut: which shapes may come out, so that something else than slimkit can load the model.

"config": only what the model's own configuration can say, so that its own `from_pretrained` loads it. "padded": any
shape inside a block, kept among zeros at the widest that the configuration says of all blocks. "any": any shape.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import UnsupportedError
from slimkit.core.log import logger
from slimkit.core.prune.attributes import HEADS, HIDDEN, Field, counts_heads_unseen, scope_sizes
from slimkit.core.prune.configured import Said, ask, levers_said
from slimkit.core.prune.expressions import Expr, linear_form
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.levers import Lever, free_levers
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.solve import Coupling, View

# form -> what it means, for help and messages
FORMS = {
    "config": "only cuts that the model's configuration can say: from_pretrained loads the result",
    "padded": "cuts of any shape inside a block, filled up with zeros to widths that the configuration can say: "
    "from_pretrained loads the result",
    "any": "cuts of any shape: slimkit's own commands and load_pruned load the result",
}


_FULL = ("hidden", "experts")  # kinds of width that zeros would not stand for


class CutForm:
    """The form that is asked of one model's cuts.

    Args:
        wanted: "config", "padded", "any", or None for "config" where the model has a configuration that can say
            something.
        wing: the framework's side.
        coupling: the model.

    Attributes:
        wanted: what was asked for.
        name: the form in force.
        because: why it is not the one a model with a configuration has, in one line; "" where it is.
        notes: what else the form demands, in words.

    Raises:
        UnsupportedError: the configuration can say no cut of this model, and a form that needs one was asked for.
    """

    def __init__(self, wanted: str | None, wing: PruneFramework, coupling: Coupling) -> None:
        self.wanted, self._wing, self.because = wanted, wing, ""
        self.notes: list[str] = []
        self._said: Said | None = None  # known in the form "config" alone
        self._held: set[str] = set()
        self.name = wanted or "config"
        if self.name == "any":
            return
        view, fields = coupling.view(), wing.config()
        found: Said | str = ask(view, fields, wing.configured) if fields else ""
        if isinstance(found, Said):
            found.computed = {p for p in wing.computed() & view.axes.keys() if not all(map(_fixed, view.axes[p]))}
            self.notes = [
                f"{path} is computed anew at loading: its width stays whole" for path in sorted(found.computed)
            ]
        if found == "" and wanted is None:
            self.name = "any"
            return
        found = found or "it has no configuration of Hugging Face's"
        if self.name == "config" and isinstance(found, Said) and view.variables and not levers_said(view, found):
            found = f"no field of {type(wing.model).__name__}'s configuration speaks of a width that can be cut"
        if isinstance(found, Said):
            self._said = found
            return
        self.because = found
        if wanted is not None:
            raise UnsupportedError(f"form {wanted!r} is not possible for this model: {found}. Only form 'any' is")
        logger.warning("only form 'any' is possible, which from_pretrained will not load: %s", found)
        self.name = "any"

    def levers(self, view: View) -> list[Lever]:
        """What the allocation may turn."""
        if self._said is None:
            return free_levers(view)
        told = self._told(view)
        if self.name == "config":
            return told
        # What a norm or a mean goes over, or a router chooses among, cannot hold zeros: it is cut as the configuration
        # says, or not at all.
        outer = {v.name for v in view.variables if v.kind in _FULL}
        inner = [x for x in free_levers(view) if x.name not in outer]
        place = {name: k for k, name in enumerate(view.counts)}
        return sorted([*(x for x in told if x.members.keys() <= outer), *inner], key=lambda x: place[x.name])

    def _told(self, view: View) -> list[Lever]:
        """The levers that the configuration can say."""
        assert self._said is not None
        return [x for x in levers_said(view, self._said) if not self._held & x.members.keys()]

    def held_at(self, view: View, counts: Mapping[str, int]) -> dict[str, int]:
        """How many indices the model holds of each variable: what is kept of it, and zeros where widths must agree."""
        if self.name != "padded":
            return dict(counts)
        steps = self._uniform(view, counts)
        held = view.counts | {v.name: counts[v.name] for v in view.variables if v.kind in _FULL}
        for lever in self._told(view):
            held.update(lever.counts(steps[lever.name]))
        return held

    def _uniform(self, view: View, counts: Mapping[str, int]) -> dict[str, int]:
        """Of each lever that the configuration says the fewest steps that hold all of its members' counts."""
        told = self._told(view)
        steps = {x.name: max(-(-counts[n] // each) for n, each in x.members.items()) for x in told}
        for name, places in self.beside_whole(told, [x.name for x in told if steps[x.name] < x.size]).items():
            steps[name] = min(k for k in places if k >= steps[name])  # zeros make up for it
        return steps

    def fields(
        self, view: View, levers: list[Lever], steps: Mapping[str, int], counts: Mapping[str, int]
    ) -> dict[str, tuple[Field, Field]] | None:
        """Fields of the configuration to rewrite, as (before, after); None in a form that promises nothing of them.

        Args:
            view: the coupling.
            levers: what was turned.
            steps: where each stands.
            counts: what is kept of each variable.
        """
        if self._said is None:
            return None
        if self.name == "padded":
            levers, steps = self._told(view), self._uniform(view, counts)
        return self._said.changes(view, levers, steps)

    def settled(
        self,
        view: View,
        levers: Sequence[Lever],
        steps: Mapping[str, int],
        least: Mapping[str, int],
        most: Mapping[str, int],
    ) -> dict[str, int]:
        """Levers that must stand elsewhere, with those they must fit: a hidden size that its number of heads divides
        today is divided by it afterwards, as configurations are checked for.

        Args:
            view: the coupling.
            levers: what was turned.
            steps: where each stands.
            least: the smallest step of each.
            most: where a lever must not stand beyond, if anywhere.

        Returns:
            Lever -> where it is to stand; empty where all is well.
        """
        if self._said is None:
            return {}
        if self.name == "padded":
            return self._settled_padded(view, levers, steps, least, most)
        return self._settled(levers, steps, least, most)

    def _settled_padded(
        self,
        view: View,
        levers: Sequence[Lever],
        steps: Mapping[str, int],
        least: Mapping[str, int],
        most: Mapping[str, int],
    ) -> dict[str, int]:
        """The same where heads are padded: their widest stays where it is, and the hidden width fits it."""
        counts = view.counts
        for lever in levers:
            counts.update(lever.counts(steps[lever.name]))
        told, stands = self._told(view), self._uniform(view, counts)
        limits = {x.name: most[x.name] for x in told if x in levers and x.name in most}
        found = self._settled(told, stands, {x.name: least.get(x.name, 1) for x in told}, limits)
        of = {name: x for x in told if x.name in found for name in x.members}
        fixed = {}
        for lever in levers:
            said = of.get(lever.name)
            if said is not None and said in levers:
                fixed[lever.name] = found[said.name]
            elif said is not None:
                fixed[lever.name] = lever.size if found[said.name] > stands[said.name] else steps[lever.name]
        return fixed

    def _settled(
        self, levers: Sequence[Lever], steps: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int]
    ) -> dict[str, int]:
        assert self._said is not None
        numbers, by_field = self._said.numbers, {name: x for x in levers for name in x.says}
        fixed: dict[str, int] = {}

        def after(name: str, stands: int | None = None) -> int:
            lever = by_field.get(name)
            if lever is None:
                return numbers[name]
            gone = lever.size - (steps[lever.name] if stands is None else stands)
            return numbers[name] - int(lever.says[name] * gone)

        for hidden, heads in self._divisors(levers):
            if hidden not in by_field:
                continue
            lever = by_field[hidden]
            common = math.lcm(1, *map(after, heads))
            if after(hidden) % common == 0:
                continue
            places = range(least[lever.name], most.get(lever.name, lever.size) + 1, least[lever.name])
            fits = [k for k in places if after(hidden, k) % common == 0]
            others = {by_field[n].name: by_field[n] for n in heads if n in by_field}
            if fits:
                fixed[lever.name] = min(fits, key=lambda k: abs(k - steps[lever.name]))
                fixed.update({name: steps[name] for name in others})
            else:
                fixed.update({x.name: most.get(x.name, x.size) for x in (lever, *others.values())})
        return fixed

    def _divisors(self, levers: Sequence[Lever]) -> Iterator[tuple[str, list[str]]]:
        """Each field of a hidden size, and those of numbers of heads that divide it today and move without it."""
        assert self._said is not None
        numbers, says = self._said.numbers, {name: x.says for x in levers for name in x.says}
        for hidden in [n for n in numbers if HIDDEN.search(n.rpartition(".")[2])]:
            inside = hidden.rpartition(".")[0]
            yield hidden, [
                n for n in numbers
                if HEADS.search(n.rpartition(".")[2]) and n.rpartition(".")[0] == inside
                and numbers[hidden] % numbers[n] == 0 and n not in says.get(hidden, ())
            ]  # fmt: skip

    def beside_whole(self, levers: Sequence[Lever], cut: Collection[str] = ()) -> dict[str, list[int]]:
        """Where levers of heads may stand beside a hidden size that stays whole and that they must divide.

        Args:
            levers: what may be turned.
            cut: levers that do not stay whole; beside those nothing is told.

        Returns:
            Lever -> its steps, rising; one that may stand anywhere is left out.
        """
        found: dict[str, list[int]] = {}
        if self._said is None:
            return found
        for hidden, heads in self._divisors(levers):
            if not self._said.slopes[hidden] or any(hidden in x.says for x in levers if x.name in cut):
                continue
            for lever in levers:
                if any(HIDDEN.search(n.rpartition(".")[2]) for n in lever.says):
                    continue  # heads that move with a hidden size
                for name in (n for n in heads if n in lever.says):
                    size, least, each = self._said.numbers[hidden], self._said.numbers[name], lever.says[name]
                    places = found.get(lever.name, range(1, lever.size + 1))
                    found[lever.name] = [k for k in places if size % (least - int(each * (lever.size - k))) == 0]
        return found

    def contradicts(self, view: View, plan: PrunePlan) -> bool:
        """Whether the configuration, rewritten, builds other shapes than the plan leaves; what it then cannot say stays
        whole from now on."""
        if self._said is None or not plan.keep:
            return False
        built = self._wing.configured({name: new for name, (_, new) in plan.config.items()})
        levers, moved = self._told(view), set(plan.keep)
        fields: set[str] = set()
        for path, shape in {**plan.shapes, **plan.sizes()}.items():
            for axis, (here, there) in enumerate(zip(shape, (built or {}).get(path, ()))):
                if here != there:
                    logger.debug("%s:%d is %d, the configuration says %d", path, axis, here, there)
                    fields |= self._said.speakers((path, axis))
        if built is not None and not fields:
            return False
        held = {v for x in levers if fields & x.says.keys() for v in x.members} & moved
        # Where nothing tells which of them is to blame, nothing that moved can be said.
        self._held |= held or moved
        return True


def _fixed(expr: Expr) -> bool:
    return isinstance(expr, int)


def parallel_steps(view: View, levers: Sequence[Lever], number: int) -> list[int]:
    """The multiples of each lever's steps that so many devices divide among themselves.

    Heads, key and value heads and inner widths divide, those of each expert too; the hidden width is held by every
    device, and so are the experts, each in part. Where there are fewer
    key and value heads than devices, each is held by several, and none of them is cut.

    Args:
        view: the coupling.
        levers: what may be turned.
        number: devices.

    Returns:
        One number a lever.

    Raises:
        ArgumentError: a width holds fewer indices than devices; the layers are named.
    """
    known = {v.name: v for v in view.variables}
    out = []
    for lever in levers:
        step = 1
        for name, each in lever.members.items():
            variable = known[name]
            if number == 1 or variable.kind in ("hidden", "experts"):
                continue
            if variable.kind == "heads" and variable.size < number and number % variable.size == 0:
                step = lever.size
            elif variable.size < number:
                what = "heads" if variable.kind == "heads" else "channels"
                check.wrong_value(
                    "parallel", f"at most {variable.size}: {', '.join(variable.layers[:3])} has no more {what}", number
                )
            else:
                step = math.lcm(step, number // math.gcd(number, each))
        if step > lever.size:
            check.wrong_value(
                "parallel", f"a number that divides what {', '.join(known[lever.name].layers[:3])} is tied to", number
            )
        out.append(step)
    return out


def vocabulary_notes(fields: Mapping[str, Field], number: int) -> list[str]:
    """What to say of vocabularies that so many devices do not divide: they are never cut.

    Example:
        >>> vocabulary_notes({"vocab_size": 100}, 8)
        ['8 devices do not divide vocab_size 100, which is never cut: what serves the model must pad it']
    """
    return [
        f"{number} devices do not divide {name} {value}, which is never cut: what serves the model must pad it"
        for name, value in fields.items()
        if name.rpartition(".")[2] == "vocab_size" and isinstance(value, int) and value % number
    ]


def steps_of_rows(view: View, levers: Sequence[Lever], rows: Mapping[str, int]) -> list[int]:
    """The multiples of each lever's steps that keep the last axes of some parameters at what they must be multiples of.

    Args:
        view: the coupling.
        levers: what may be turned.
        rows: parameter -> what its last axis is a multiple of.

    Returns:
        One number a lever; a lever without room for it stays whole.
    """
    place = {name: k for k, name in enumerate(view.counts)}
    known = {path: multiple for path, multiple in rows.items() if path in view.axes}
    slopes = [(multiple, linear_form(view.axes[path][-1], place)[1]) for path, multiple in known.items()]
    out = []
    for lever in levers:
        step = 1
        for multiple, by_place in slopes:
            grown = sum(each * by_place.get(place[name], 0) for name, each in lever.members.items())
            step = math.lcm(step, multiple // math.gcd(multiple, grown))
        out.append(step if lever.size % step == 0 else lever.size)
    return out


def multiples_of(view: View, levers: Sequence[Lever], parallel: int, rows: Mapping[str, int]) -> dict[str, int]:
    """Lever -> what its steps must be multiples of, whatever the alignment: for devices, and for rows of parameters."""
    found = {}
    for lever, n, m in zip(levers, parallel_steps(view, levers, parallel), steps_of_rows(view, levers, rows)):
        both = math.lcm(n, m)
        found[lever.name] = both if both in (n, m) or lever.size % both == 0 else lever.size
    return found


def told_heads(wing: PruneFramework, view: View, desc: dict[str, Any], held: Mapping[str, int]) -> None:
    """Let attributes of numbers of heads that no code of their module met say what the configuration gives, in the plan
    in place: those that only the making of a model reads, as XLM's own beside its layers'.

    Args:
        wing: the framework's side.
        view: the coupling.
        desc: the plan.
        held: variable -> indices that the cut model has.
    """
    sizes = scope_sizes(view, held)
    silent = {
        module: found
        for module, numbers in wing.integers().items()
        if (found := [n for n, old in numbers.items() if counts_heads_unseen(n, old, sizes.get(module, {}))])
    }
    config = {field: (old, new) for field, (old, new) in desc["config"].items()}
    for module, numbers in wing.heads_told(config, silent).items() if silent else ():
        for name, change in numbers.items():
            desc["attributes"].setdefault(module, {}).setdefault(name, list(change))
