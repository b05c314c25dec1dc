"""The coupling of a model: which variables can be pruned, and every parameter axis as an expression over them.

An axis of n indices is a dimension (`dims`): a variable d, a product a b (index i b + j: heads by head size), or a sum
a + b (a concatenation). Every operator of the graph demands equalities between its axes (`rules`), which unification
solves (union-find; a variable that must equal a product is split into its factors). What is left are free variables:

    y = linear(x, W)        W.0 = y.last, W.1 = x.last                     d1, d0
    y = x + z               x.a = z.a for each axis a                      the residual stream is one variable
    reshape(b, n, h s)      last = h s, a product                          heads h can go, their size s cannot

`Coupling` holds the solved equalities, and more that a rehearsal of the cut finds in the model's code (`tie`, `pin`).
`View` names what can be pruned: free, made by a layer, not excluded, one factor of each product. Own work; graphs of
such groups are in Fang et al. 2023, "DepGraph", and the unification is Robinson's (1965).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimkit.core.prune.dims import FIXED, FREE, PRODUCT, Dim, find, leaves, product, unify
from slimkit.core.prune.experts import KEPT_WHOLE, Experts, free_experts
from slimkit.core.prune.expressions import Expr, simplify
from slimkit.core.prune.graph import Graph, Node
from slimkit.core.prune.relations import SCALE, Relations, layer_of
from slimkit.core.prune.rules import relate

WRITTEN = "its size is written in the code of"
UNMADE = "no layer makes it"
RIVAL = "another factor of the same axis is pruned (heads, not their size)"


@dataclass
class Variable:
    """One prunable variable: a set of channels, heads or hidden features that live and die together.

    Args:
        name: "d0", "d1" ... in the order of the parameters.
        size: number of indices before pruning.
        places: (parameter, axis, role) of every axis that mentions it.
        kind: "heads", "hidden" (normalised or embedded features), "experts" or "width".
        layers: the Conv and Linear layers that make it.
    """

    name: str
    size: int
    places: list[tuple[str, int, str]] = field(default_factory=list)
    kind: str = "width"
    layers: list[str] = field(default_factory=list)


class Coupling:
    """What can be pruned together in one model; made once from a graph, looked at under several exclusions.

    Args:
        graph: a traced model.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tied: set[int] = set()
        self._given: set[str] = set()
        self.relations = relate(graph)
        self.pinned: dict[Dim, str] = {}
        self._history: list[tuple[str, Any, str]] = []
        self.experts: list[Experts] = []
        self.expert_dims: dict[str, Dim] = {}  # module that holds experts -> their axis

    def open_experts(self, found: Iterable[Experts]) -> None:
        """Let experts be variables."""
        self.experts = list(found)
        self.expert_dims = free_experts(self.relations, self.experts)

    @property
    def is_language_model(self) -> bool:
        """Whether a table of embeddings and attention are in it."""
        return bool(self.relations.scales) and "table" in self.relations.roles.values()

    def tie(self, place: int) -> bool:
        """Demand that a split's parts stay equal, since the code divides by their number; returns whether that was
        new."""
        node = self.graph.nodes[place]
        if place in self.tied or node.op != "split" or len(set(node.attrs["sizes"])) > 1:
            return False
        self.tied.add(place)
        self._history.append(("tie", place, ""))
        parts = [self.relations.dims[n][node.attrs["axis"]] for n in node.outputs]
        for part in parts[1:]:
            unify(parts[0], part)
        return True

    def tie_widths(self, place: int) -> bool:
        """Demand that what a reshape folds or unfolds equals the axes of its size in the same module, as its code takes
        for granted: `reshape(b, n, 3, heads, width // heads)` ties the width that comes in to its heads."""
        node, dims = self.graph.nodes[place], self.relations.dims
        if node.op not in ("reshape", "split") or -1 - place in self.tied:
            return False
        self.tied.add(-1 - place)
        near = [n for other in self.graph.nodes if other.scope == node.scope for n in (*other.inputs, *other.outputs)]
        before = dims[node.inputs[0]] if node.inputs[0] is not None else []
        folded = [d for d in before if self._open(d)]
        if node.op == "split":
            folded += [dims[n][node.attrs["axis"]] for n in node.outputs]
        for side in (dims[node.outputs[0]], before):
            lead = next((k for k, (a, b) in enumerate(zip(before, dims[node.outputs[0]])) if a.size != b.size), 0)
            last = len(side)
            # Axes i..j - 1 that the reshape may fold into one: behind the first whose size changes.
            runs = [(i, j) for i in range(lead, last) for j in range(last, i + 1, -1)]
            folded += [product(side[i:j]) for i, j in runs]
            # (..., heads, 3, size), of which heads * size is the width
            folded += [product([*side[i:k], *side[k + 1 : j]]) for i, j in runs for k in range(i + 1, j - 1)]
        done = False
        for dim in folded:
            for other in (d for n in near if n is not None for d in dims[n] if d.size == dim.size > 1):
                ends = find(dim), find(other)
                if ends[0] is not ends[1] and all(map(self._open, ends)) and not any(x.inner for x in ends):
                    before_tie = [*map(find, leaves(other)), *map(find, leaves(dim))]
                    unify(other, dim)
                    done = done or [*map(find, leaves(other)), *map(find, leaves(dim))] != before_tie
        self._history.append(("widths", place, ""))
        return done

    def tie_given(self, name: str, instances: Sequence[Sequence[int]]) -> bool:
        """Demand that the width which a class of modules is given equals what its own code hands on at the same width,
        index by index, as code takes for granted that folds heads back: `reshape(b, n, c)`.

        Args:
            name: of the class, which is asked once.
            instances: for each module the operators of its own code and of the layers it calls.

        Returns:
            Whether that was new.
        """
        if name in self._given:
            return False
        self._given.add(name)
        return sum(self._tie_given([self.graph.nodes[k] for k in places]) for places in instances) > 0

    def _tie_given(self, nodes: Sequence[Node]) -> bool:
        dims = self.relations.dims
        own = {number for node in nodes for number in node.outputs}
        given = {
            number: find(dims[number][-1])
            for node in nodes
            for number in node.inputs
            if number is not None and number not in own and self.graph.values[number].kind == "result" and dims[number]
        }
        changed = False
        for width in given.values():
            if width.kind == FIXED:
                continue
            for node in nodes:
                # Folding heads back is a reshape of its own, or merged into that of the layer that follows.
                number = node.inputs[0] if node.op == "linear" else node.outputs[0] if node.op == "reshape" else None
                other = find(dims[number][-1]) if number is not None and dims[number] else width
                if other.size == width.size and find(width) is not other and other.kind != FIXED:
                    unify(width, other)
                    changed = True
        return changed

    def untied(self, place: int) -> Coupling | None:
        """The same coupling without the last `tie_widths`, where that was the last that happened and was at this place:
        the operator fails as it did before, so that its size is a number in the code."""
        if not self._history or self._history[-1][:2] != ("widths", place):
            return None
        fresh = Coupling(self.graph)
        fresh.open_experts(self.experts)
        here = {id(d): (n, k) for n, dims in enumerate(self.relations.dims) for k, d in enumerate(dims)}
        if any(what == "pin" and id(which) not in here for what, which, _ in self._history):
            return None
        for what, which, reason in self._history[:-1]:
            if what == "pin":
                number, axis = here[id(which)]
                fresh.pin(fresh.relations.dims[number][axis], reason)
            else:
                (fresh.tie if what == "tie" else fresh.tie_widths)(which)
        fresh.tied |= self.tied
        return fresh

    def keep_head_sizes(self) -> None:
        """Keep the size of attention heads whole: values could not be cut without queries and keys, whose size the
        scale depends on, where code has one number for both."""
        for leaf in {x for dims in self.relations.dims for d in dims for x in map(find, leaves(d)) if x.inner}:
            self.pin(leaf, SCALE)

    def _open(self, dim: Dim) -> bool:
        """Whether something of an axis can still be pruned."""
        return any(x.kind == FREE and x not in self.pinned for x in map(find, leaves(dim)))

    def pin(self, dim: Dim, reason: str) -> bool:
        """Exclude every variable of an axis for good; returns whether that changed anything."""
        fresh = [d for d in map(find, leaves(dim)) if d.kind == FREE and d not in self.pinned]
        self.pinned.update(dict.fromkeys(fresh, reason))
        if fresh:
            self._history.append(("pin", dim, reason))
        return bool(fresh)

    def view(self, un_prune: Iterable[str] = (), experts: bool = True) -> View:
        """The coupling with some layers' outputs kept whole.

        Args:
            un_prune: paths of Conv and Linear layers, and of modules that hold experts.
            experts: whether experts may go.

        Returns:
            Variables and expressions in plain data.
        """
        excluded = dict(self.pinned)
        if not experts:
            excluded.update((find(dim), KEPT_WHOLE) for dim in self.expert_dims.values())
        wanted = set(un_prune)
        for path, dim in self.relations.outs:
            if layer_of(path) in wanted:
                for leaf in leaves(dim):
                    excluded.setdefault(find(leaf), "named in un_prune_list")
        return View(self, excluded)


class View:
    """A coupling in plain data: variables, expressions of all parameter axes, and why the rest stays whole.

    Args:
        coupling: the solved graph.
        excluded: variables that stay whole, with the reason.

    Attributes:
        variables: the prunable variables.
        axes: parameter -> one expression an axis.
        whole: reason -> the parameter axes that stay whole for it.
        costs: (scope, expressions whose sizes multiply to the node's multiplications).
    """

    def __init__(self, coupling: Coupling, excluded: dict[Dim, str]) -> None:
        self.coupling = coupling
        self._excluded = excluded
        self._names: dict[Dim, str] = {}
        self._compiled: dict[Dim, Expr] = {}
        relations = coupling.relations
        self._made = {x for dim in relations.made for x in map(find, leaves(dim))}
        self._one_factor_each(relations)
        self.variables: list[Variable] = []
        self.axes: dict[str, list[Expr]] = {}
        self.whole: dict[str, list[str]] = {}
        by_name: dict[str, Variable] = {}
        for path, shape in coupling.graph.shapes.items():
            dims = relations.params.get(path)
            if dims is None:
                self.axes[path] = list(shape)
                self.whole.setdefault("not used when the model ran", []).append(path)
                continue
            self.axes[path] = [self.expression(d) for d in dims]
            for axis, dim in enumerate(dims):
                # A vector without a role is a bias or a scale: a tracer may show Linear's bias as an addition.
                role = relations.roles.get((path, axis), "out" if axis == 0 and len(dims) > 1 else "other")
                for leaf in dict.fromkeys(map(find, leaves(dim))):
                    name = self._names.get(leaf)
                    if name is None:
                        why = leaf.reason or excluded.get(leaf, "") or ("" if leaf in self._made else UNMADE)
                        if leaf.size > 1 and why:
                            self.whole.setdefault(why, []).append(f"{path}:{axis}")
                        continue
                    if name not in by_name:
                        by_name[name] = Variable(name, leaf.size)
                        self.variables.append(by_name[name])
                    by_name[name].places.append((path, axis, role))
        self._describe(by_name, relations)
        self.costs = [(scope, [self.expression(d) for d in dims]) for scope, dims in relations.costs]
        self.groups = {scope: (attr, self.expression(d)) for scope, (attr, d) in relations.groups.items()}

    def _one_factor_each(self, relations: Relations) -> None:
        """In a flattened axis prune one factor only: heads rather than the size of a head, groups or channels in a
        group."""
        seen: set[Dim] = set()
        rivals: dict[Dim, set[Dim]] = {}

        def walk(dim: Dim) -> None:
            dim = find(dim)
            if dim in seen or not dim.parts:
                return
            seen.add(dim)
            for part in dim.parts:
                walk(part)
            if dim.kind != PRODUCT:
                return
            all_ = [
                (p, [x for x in map(find, leaves(p)) if self._free(x) or self._excluded.get(x) == RIVAL])
                for p in dim.parts
            ]
            for p, some in all_ if sum(bool(some) for _, some in all_) > 1 else ():
                others = {x for q, more in all_ if q is not p for x in more}
                for leaf in some:
                    rivals.setdefault(leaf, set()).update(others)
            open_ = [(p, [x for x in some if self._free(x)]) for p, some in all_]
            open_ = [(p, free) for p, free in open_ if free]
            if len(open_) < 2:
                return
            outside = [pair for pair in open_ if not all(x.inner for x in pair[1])] or open_
            first = outside[0]
            # A few groups are too coarse to choose from; their channels are not.
            best = first if find(first[0]).size >= 8 else max(outside, key=lambda pair: find(pair[0]).size)
            for part, free in open_:
                if part is not best[0]:
                    for leaf in free:
                        if leaf not in best[1]:
                            self._excluded[leaf] = RIVAL

        for dims in relations.params.values():
            for dim in dims:
                walk(dim)
        for leaf in sorted(rivals, key=lambda leaf: -leaf.size):
            # Given up for a factor that another axis then gave up in its turn (groups of 8 before groups of 4).
            if self._excluded.get(leaf) == RIVAL and not any(self._free(x) for x in rivals[leaf] - {leaf}):
                del self._excluded[leaf]
        for dims in relations.params.values():
            for dim in dims:
                for leaf in map(find, leaves(dim)):
                    if self._free(leaf) and leaf not in self._names:
                        self._names[leaf] = f"d{len(self._names)}"

    def _free(self, leaf: Dim) -> bool:
        return leaf in self._made and leaf.kind == FREE and not leaf.elastic and leaf not in self._excluded

    def expression(self, dim: Dim) -> Expr:
        """An axis in plain data."""
        dim = find(dim)
        found = self._compiled.get(dim)
        if found is None:
            if dim.parts:
                parts = [self.expression(p) for p in dim.parts]
                found = simplify("*" if dim.kind == PRODUCT else "+", parts)
            else:
                found = self._names.get(dim, dim.size)
            self._compiled[dim] = found
        return found

    def _describe(self, by_name: dict[str, Variable], relations: Relations) -> None:
        self._heads: set[Dim] = set()
        for dims in relations.params.values():
            for dim in dims:
                self._collect_heads(dim)
        makers: dict[str, list[str]] = {}
        for path, dim in relations.outs:
            for leaf in dict.fromkeys(map(find, leaves(dim))):
                if leaf in self._names:
                    makers.setdefault(self._names[leaf], []).append(layer_of(path))
        experts = set(map(find, self.coupling.expert_dims.values()))
        averaged = {x for dim in relations.averaged for x in map(find, leaves(dim))}
        for leaf, name in self._names.items():
            variable = by_name.get(name)
            if variable is None:
                continue
            variable.layers = list(dict.fromkeys(makers.get(name, [])))
            roles = {role for _, _, role in variable.places}
            if leaf in experts:
                variable.kind = "experts"
            elif leaf in self._heads:
                variable.kind = "heads"
            elif (
                roles & {"layer_norm", "table"}
                or leaf in averaged
                or any(relations.roles.get((path, 0)) == "table" for path, _, _ in variable.places)
            ):
                variable.kind = "hidden"

    def _collect_heads(self, dim: Dim) -> None:
        dim = find(dim)
        if dim.kind == PRODUCT and any(
            x.inner or x.reason == SCALE for p in dim.parts[1:] for x in map(find, leaves(p))
        ):
            self._heads.update(x for x in map(find, leaves(dim.parts[0])) if self._free(x))
        for part in dim.parts:
            self._collect_heads(part)

    @property
    def counts(self) -> dict[str, int]:
        """Indices of each variable before pruning."""
        return {v.name: v.size for v in self.variables}
