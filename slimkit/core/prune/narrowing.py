"""What to do about a model's code that does not go along with a cut: tie, try other numbers, or keep whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from slimkit.core.log import logger
from slimkit.core.prune.dims import Dim, find, leaves
from slimkit.core.prune.graph import Node, within
from slimkit.core.prune.levers import Lever
from slimkit.core.prune.rehearsal import Contradiction
from slimkit.core.prune.solve import WRITTEN, Coupling, View

# Combinations of doubtful numbers that one module is tried with.
_COMBINATIONS = 64
Works = Callable[[Collection[str]], bool]


class Narrowing:
    """Narrows a coupling, one step a call, until a model's code goes along with its cuts.

    A step is the first of these that changes anything (before all, experts stay that their own layer's code cannot do
    without, as where it sorts them into groups):

    1. what is known to be wrong stays whole: the axes that came out with another size, or what the layer reads at
       which the code stopped;
    2. what the code takes for granted is tied: equal parts of a split, another number for an attribute that may speak
       of several widths, heads that are folded back into the width that comes in, alike blocks of equal widths;
    3. what may be wrong stays whole: axes of the shape that failed, what the operator touches, what the class touches
       (of several variables those that are to blame, by trying), then what the modules around it touch;
    4. nothing is cut.

    Args:
        coupling: of a traced model; changed in place, and replaced where a tie is given up.

    Attributes:
        coupling: the coupling so far.
        level: whether alike blocks must keep equal widths, since one number of the code speaks of them all.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.begin()

    def begin(self) -> None:
        """Forget what was tried for an earlier ratio; what was tied or pinned stays."""
        self.level = False
        # Attributes that may say one of several numbers: how many, which one is tried, how often a module was retried.
        self._doubts: dict[str, dict[str, int]] = {}
        self._choices: dict[tuple[str, str], int] = {}
        self._tried: dict[str, int] = {}

    def choose(self, candidates: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, dict[str, int]]:
        """What the next plan writes where a module's attribute may say one of several numbers.

        Args:
            candidates: module -> attribute -> the numbers it may say, the likeliest first.

        Returns:
            Module -> attribute -> one of them.
        """
        several = {m: {name: len(c) for name, c in here.items() if len(c) > 1} for m, here in candidates.items()}
        self._doubts = {module: here for module, here in several.items() if here}
        return {
            m: {name: c[self._choices.get((m, name), 0) % len(c)] for name, c in here.items()}
            for m, here in candidates.items()
        }

    def narrow(self, found: Contradiction, view: View, counts: Mapping[str, int], works: Works) -> None:
        """Take the next step.

        Args:
            found: what the code made otherwise than planned.
            view: the variables that were cut.
            counts: what each of them kept.
            works: whether the code goes along when only some of them are cut, by name; it runs or compiles the model.
        """
        why = f"{WRITTEN} {found.where}"
        logger.debug("%s (%s)", why, found.what)
        if not (
            self._pin_experts(found, view, counts, why)
            or self._pin_axes(found.axes, why)
            or self._pin_blamed(found.reads, view, why, works)
            or self._tie(found)
            or self._make_level(view, counts)
            or self._give_up_tie(found.operator)
            or self._pin_axes(found.near, why)
            or self._pin_operator(found.operator, view, why)
            or self._pin_blamed([self._values(some) for some in found.instances], view, why, works)
            or self._pin_around(found, view, why)
        ):
            self.keep_everything(f"{found.what} in {found.where}")

    def keep_everything(self, what: str) -> None:
        """The last resort: pin every variable, so that the next plan cuts nothing."""
        for dims in self.coupling.relations.params.values():
            for dim in dims:
                self.coupling.pin(dim, f"{WRITTEN} the model")
        self._note(f"nothing is pruned, since no plan runs: {what}")

    def _pin_experts(self, found: Contradiction, view: View, counts: Mapping[str, int], why: str) -> bool:
        cut = {v.layers[0] for v in view.variables if v.kind == "experts" and counts[v.name] < v.size}
        hit = [e.module for e in self.coupling.experts if any(within(scope, e.scope) for scope in found.scopes)]
        dims = self.coupling.expert_dims
        return sum(self.coupling.pin(dims[module], why) for module in hit if module in cut) > 0

    def _tie(self, found: Contradiction) -> bool:
        """Demand what the code takes for granted, or let it say another number."""
        coupling, place = self.coupling, found.operator
        if place is not None and coupling.tie(place):
            return True
        if any(self._try_another(scope) for scope in found.scopes):
            return True
        if place is not None and coupling.tie_widths(place):
            return True
        if found.instances and coupling.tie_given(found.where, found.instances):
            note = (
                f"{found.where} folds its heads back into the width it is given: that width is pruned a head at a time"
            )
            coupling.graph.notes.append(note)
            return True
        return False

    def _try_another(self, scope: str) -> bool:
        """Let the doubtful attributes of a module say the next combination of what they may; False when all were
        tried."""
        doubts = self._doubts.get(scope, {})
        combination = self._tried.get(scope, 0) + 1
        if not doubts or combination >= min(_COMBINATIONS, math.prod(doubts.values())):
            for name in doubts:
                self._choices.pop((scope, name), None)
            return False
        self._tried[scope] = combination
        for name, number in doubts.items():
            self._choices[scope, name] = combination % number
            combination //= number
        return True

    def _make_level(self, view: View, counts: Mapping[str, int]) -> bool:
        """Where alike blocks keep unequal numbers: let them keep equal ones."""
        kept = {(label, counts[v.name]) for label, v in zip(alike(view), view.variables)}
        if self.level or len(kept) == len({label for label, _ in kept}):
            return False
        self.level = True
        return True

    def _give_up_tie(self, place: int | None) -> bool:
        untied = None if place is None else self.coupling.untied(place)
        self.coupling = untied or self.coupling
        return untied is not None

    def _pin_axes(self, axes: Iterable[tuple[int, int]], why: str) -> bool:
        dims = self.coupling.relations.dims
        return sum(self.coupling.pin(dims[number][axis], why) for number, axis in axes) > 0

    def _pin_operator(self, place: int | None, view: View, why: str) -> bool:
        """The first axis of what an operator reads and makes of which something is pruned."""
        nodes = [] if place is None else [self.coupling.graph.nodes[place]]
        return any(self.coupling.pin(dim, why) for dim in self._touched(view, nodes))

    def _pin_blamed(self, places: Iterable[Iterable[int]], view: View, why: str, works: Works) -> bool:
        """Of the variables that some values have, for each place by itself those that are to blame."""
        dims, changed = self.coupling.relations.dims, False
        for values in places:
            found = dict.fromkeys(leaf for n in values for d in dims[n] for leaf in map(find, leaves(d)))
            named = {leaf: e for leaf in found if isinstance(e := view.expression(leaf), str)}
            blamed = to_blame(sorted(set(named.values())), works)
            for leaf, name in named.items():
                changed |= name in blamed and self.coupling.pin(leaf, why)
        return changed

    def _pin_around(self, found: Contradiction, view: View, why: str) -> bool:
        """Everything that the modules touch whose code it is, then the modules around them."""
        scopes = set(found.scopes)
        while scopes:
            inside = [
                n
                for n in self.coupling.graph.nodes
                if any(not s or n.scope == s or n.scope.startswith(s + ".") for s in scopes)
            ]
            if sum(self.coupling.pin(dim, why) for dim in self._touched(view, inside)):
                names = ", ".join(sorted(scopes)) if "" not in scopes else "the model"
                self._note(f"all that {names} touches stays whole: {found.what}")
                return True
            scopes = {s.rpartition(".")[0] for s in scopes if s}
        return False

    def _values(self, places: Iterable[int]) -> list[int]:
        """The numbers of what some operators read and make."""
        nodes = [self.coupling.graph.nodes[place] for place in places]
        return sorted({n for node in nodes for n in (*node.inputs, *node.outputs) if n is not None})

    def _touched(self, view: View, nodes: Iterable[Node]) -> Iterator[Dim]:
        """The axes of some operators of which something is pruned."""
        for node in nodes:
            for number in (*node.outputs, *node.inputs):
                for dim in self.coupling.relations.dims[number] if number is not None else ():
                    if not isinstance(view.expression(dim), int):
                        yield dim

    def _note(self, note: str) -> None:
        logger.warning("%s", note)
        self.coupling.graph.notes.append(note)


def alike(view: View) -> list[tuple[int, str, int]]:
    """A label for each variable, the same for those of repeated blocks."""
    return [(v.size, v.kind, len(v.places)) for v in view.variables]


def alike_levers(view: View, levers: Iterable[Lever]) -> list[tuple[int, int, tuple[int, str, int]]]:
    """The same for levers."""
    labels = dict(zip(view.counts, alike(view)))
    return [(x.size, len(x.members), labels[x.name]) for x in levers]


def to_blame(names: list[str], works: Works, budget: int = 8) -> set[str]:
    """Which of several variables cannot be cut, by halving: too many rather than too few where proofs run out.

    Args:
        names: the variables, all of which together fail.
        works: whether a cut of only some of them goes along.
        budget: calls of `works`.

    Example:
        >>> sorted(to_blame(["a", "b", "c", "d"], lambda some: "c" not in some))
        ['c']
    """
    left = [budget]

    def search(some: list[str]) -> set[str]:
        if len(some) < 2:
            return set(some)
        halves = some[: len(some) // 2], some[len(some) // 2 :]
        found: set[str] = set()
        for half in halves:
            if left[0] == 0:
                return set(some)
            left[0] -= 1
            if not works(half):
                found |= search(half)
        return found or set(some)

    return search(names)
