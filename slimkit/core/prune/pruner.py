"""The pruner of both wings: analysis, plan, cut and report; a wing only traces, reads and cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slimkit.core import check
from slimkit.core.errors import PlanError
from slimkit.core.files import as_path, atomic_file
from slimkit.core.log import logger
from slimkit.core.match import demand, match
from slimkit.core.prune.allocate import Account, Allocation, allocate
from slimkit.core.prune.attributes import config_changes, new_values, scope_sizes
from slimkit.core.prune.criteria import Evidence
from slimkit.core.prune.dims import Dim
from slimkit.core.prune.draw import picture
from slimkit.core.prune.forms import CutForm, parallel_steps
from slimkit.core.prune.framework import PruneFramework, RepairFramework
from slimkit.core.prune.graph import Node
from slimkit.core.prune.importance import best, scores
from slimkit.core.prune.levers import Lever, free_levers, joined_scores, lever_matrix
from slimkit.core.prune.masks import desc_of_masks, is_masks
from slimkit.core.prune.plan import PrunePlan, make_desc
from slimkit.core.prune.record import record_plan, whole_desc
from slimkit.core.prune.rehearsal import ANOTHER, COPIES, LAYOUT, differences
from slimkit.core.prune.settings import PrunerSettings
from slimkit.core.prune.solve import WRITTEN, Coupling, Index, View

_ROUNDS = 200
if TYPE_CHECKING:
    from typing_extensions import Self

Changes = dict[str, dict[str, tuple[int, int]]]
Array = np.ndarray[Any, Any]


def _alike(view: View, levers: Sequence[Lever]) -> list[tuple[int, str, int, int]]:
    """A label for each lever, the same for those of repeated blocks."""
    known = {v.name: v for v in view.variables}
    return [(x.size, known[x.name].kind, len(known[x.name].places), len(x.members)) for x in levers]


def _uneven(view: View, counts: Mapping[str, int]) -> bool:
    """Whether alike variables keep unequal numbers."""
    alike = _alike(view, free_levers(view))
    kept = {(label, counts[v.name]) for label, v in zip(alike, view.variables)}
    return len(kept) > len({label for label, _ in kept})


def _touched(view: View, nodes: Sequence[Node]) -> Iterator[Dim]:
    """The axes of some operators of which something is pruned."""
    for node in nodes:
        for number in (*node.outputs, *node.inputs):
            for dim in view.coupling.relations.dims[number] if number is not None else ():
                if not isinstance(view.expression(dim), int):
                    yield dim


class PrunerBase(PrunerSettings):
    """Structural pruning of one model.

    Args:
        wing: the framework's side.
    """

    def __init__(self, wing: PruneFramework) -> None:
        super().__init__(wing)
        self._coupling: Coupling | None = None
        self._scores: dict[str, Array] = {}
        self._weights_seen: Any = None
        self._report: dict[str, Any] = {}
        self._was_cut = False
        # Attributes that may say one of several numbers: how many, which one is tried, how often a module was retried.
        self._doubts: dict[str, dict[str, int]] = {}
        self._choices: dict[tuple[str, str], int] = {}
        self._tried: dict[str, int] = {}
        # Whether alike blocks must keep equal widths, since one number of a configuration speaks of them all.
        self._level = False
        self._cut_form: CutForm | None = None
        self._cut_form_of: str | None = None
        self._levers: list[Lever] = []
        self._steps: dict[str, int] = {}

    def set_examples(self, inputs: Sequence[Any]) -> Self:
        """Trace further examples, so that what only they read is coupled as well: optional arguments, labels, lengths.

        Args:
            inputs: a list of examples, each as the constructor takes one (a tensor, a tuple of arguments, a dict of
                keyword arguments); they count beside the constructor's.

        Returns:
            This pruner.

        Raises:
            ArgumentTypeError: no list or tuple.
            ArgumentError: an empty list.
            UnsupportedError: the framework traces one example only.
        """
        if not isinstance(inputs, (list, tuple)):
            check.wrong_type("inputs", "a list of examples", inputs)
        if not inputs:
            check.wrong_value("inputs", "a list of at least one example", inputs)
        self._wing.show(inputs)
        self._coupling, self._scored, self._report, self._cut_form = None, None, {}, None
        return self

    def analysis(
        self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Plan a cut; the model is untouched.

        Args:
            reserved_ratio: share of the parameters (or multiplications) to keep, in (0, 1].
            un_prune_list: layers whose outputs stay whole: numbers (Conv and Linear layers in the order they run,
            negatives
                from the end) or names; [0, -1] unless given.

        Returns:
            (parameters left, exactly; the plan as plain data for `prune_by_desc`).

        Raises:
            ArgumentError: a ratio or layer out of range.
            GraphError: the model could not be traced.
        """
        check.ratio(reserved_ratio, "reserved_ratio", one=True)
        coupling = self._solved()
        self._choices, self._tried, self._level = {}, {}, False
        if self._cut_form is None or self._cut_form_of != self._form:
            self._cut_form, self._cut_form_of = CutForm(self._form, self._wing, coupling), self._form
        if un_prune_list is None:
            # One number of a configuration speaks of the first layer too; inputs and outputs stay whole in any case.
            un_prune_list = [0, -1] if coupling.graph.layers and self._cut_form.name == "any" else []
        whole = self._layers(un_prune_list)
        self._forget_old_scores()
        # Each round ties or pins something, or tries another of a few numbers; after many, the rest is not worth it.
        for rounds in count():
            view = self._solved().view(whole)
            allocation, account = self._allocate(view, reserved_ratio)
            desc = self._describe(view, allocation, reserved_ratio, whole)
            plan = PrunePlan(desc)
            if not self._cut_form.contradicts(view, plan) and self._rehearse(view, plan, allocation.keep):
                break
            if rounds == _ROUNDS:
                self._keep_everything(view, f"its code contradicted {rounds} plans")
        left = Account(view).count(np.array([allocation.keep[n] for n in view.counts], dtype=np.int64))
        self._fill_report(view, allocation, account, left, reserved_ratio)
        desc["made"]["left_params"] = left
        return left, desc

    def prune(self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None) -> dict[str, Any]:
        """Plan a cut and make it, in place; arguments as in `analysis`.

        Returns:
            The plan as plain data; `prune_by_desc` replays it on a fresh model.

        Raises:
            ArgumentError: a ratio or layer out of range.
            GraphError: the model could not be traced.
        """
        _, desc = self.analysis(reserved_ratio, un_prune_list)
        layers = self._solved().graph.layers
        if self._repair is None:
            self._cut(PrunePlan(desc))
            return desc
        wing, plan = cast(RepairFramework, self._wing), PrunePlan(desc)
        dense = wing.snapshot()
        undo = self._cut(plan)
        try:
            self._report["compensation"] = wing.compensate(dense, plan, layers, self._repair, self._damping)
        except BaseException:
            undo()
            raise
        return desc

    def prune_by_desc(self, desc: dict[str, Any]) -> Any:
        """Replay a plan on a fresh model of the same make, in place.

        Args:
            desc: what `prune` or `analysis` returned, possibly after a trip through JSON; or a desc of msModelSlim's,
                {layer: {"input" or "output": [number kept, mask]}}, which is proven on the example where one was given.

        Returns:
            The pruned model.

        Raises:
            PlanError: the plan was made for another model; the message names the first mismatch.
        """
        if is_masks(desc):
            desc = desc_of_masks(desc, self._wing.shapes(), self._wing.framework)
            if self._wing.has_example:
                # Masks say nothing of what belongs together: whether they do is found out before anything is cut.
                self._solved()
                _, error, _ = self._wing.rehearse(PrunePlan(desc))
                if error:
                    raise PlanError(f"the masks of desc do not fit one another in this model: {error}")
        self._cut(PrunePlan(desc))
        return self._wing.model

    def whole_desc(self) -> dict[str, Any]:
        """The plan of everything that was cut from this model so far, by this pruner and others.

        Returns:
            What `prune` returned after one pruning, and `merge_desc` of all plans after several.

        Raises:
            PlanError: nothing was pruned from this model.
        """
        return whole_desc(self._wing.model)

    def report(self) -> dict[str, Any]:
        """What the last analysis or cut found: sizes, what stays whole and why, operators without a rule, notes.

        Of a cut model that carries a configuration, `from_config` says whether a model built from it has the cut
        shapes, so that its own `from_pretrained` loads it: {"loads": bool, "because": the first difference}.
        """
        if not self._report:
            coupling = self._solved()
            view = coupling.view()
            self._report = self._common(view)
        if self._was_cut and "from_config" not in self._report:
            mismatch = self._wing.config_mismatch()
            if mismatch is not None:
                self._report["from_config"] = {"loads": not mismatch, "because": mismatch}
        return dict(self._report)

    def draw(self, path: Any = None) -> str:
        """Draw the coupling: one row a group, its width before and after the last analysis, and the layers it ties.

        Args:
            path: a file to write, .svg or .html; None writes none.

        Returns:
            The SVG text.
        """
        text = picture(self.report())
        if path is not None:
            target = as_path(path, "path")
            head = "" if target.suffix != ".html" else "<!doctype html><meta charset=utf-8><title>Pruning</title>"
            with atomic_file(target, "w") as handle:
                handle.write(head + text)
        return text

    # Inside ----------------------------------------------------------------------------------------------------

    def _solved(self) -> Coupling:
        if self._coupling is None:
            self._coupling = Coupling(self._wing.trace())
        return self._coupling

    def _layers(self, wanted: Sequence[int | str]) -> list[str]:
        layers = self._solved().graph.layers
        if isinstance(wanted, (str, bytes)) or not isinstance(wanted, (list, tuple)):
            check.wrong_type("un_prune_list", "a list of ints or names", wanted)
        out: list[str] = []
        for item in wanted:
            if isinstance(item, str):
                named = [*layers, *(p for p in self._solved().graph.further if p not in layers)]
                found = match(named, [item], whole_modules=True)
                demand(found, named, "un_prune_list")
                out.extend(found.names)
                continue
            if not layers:
                check.wrong_value("un_prune_list", "empty: no Conv or Linear layer ran in this model", item)
            check.integer(item, "un_prune_list", -len(layers), len(layers) - 1)
            out.append(layers[item])
        return out

    def _allocate(self, view: View, ratio: float) -> tuple[Allocation, Account]:
        assert self._cut_form is not None
        account = Account(view, self._budget)
        full = np.array(list(view.counts.values()), dtype=np.int64)
        target = ratio * account.count(full)
        self._scores = self._score(view)
        self._levers = self._cut_form.levers(view)
        chunks = None
        if self._allocation == "global":
            comparable = {
                n: s if self._criterion.comparable else s / max(s.mean(), 1e-30) for n, s in self._scores.items()
            }
            chunks = {x.name: joined_scores(x, comparable) for x in self._levers}
        names = [x.name for x in self._levers]
        offsets, matrix = lever_matrix(account.names, view.counts, self._levers)
        found = allocate(
            account.joined(names, offsets, matrix), [x.size for x in self._levers], target, self._node_ratio,
            self._alignment, chunks, _alike(view, self._levers), level=self._level,
            multiples=parallel_steps(view, self._levers, self._parallel),
        )  # fmt: skip
        self._steps = found.keep
        counts = offsets + matrix @ np.array([found.keep[n] for n in names], dtype=np.int64)
        held = {v for x in self._levers if x.name in found.held_back for v in x.members}
        found.keep = dict(zip(account.names, counts.tolist()))
        found.held_back = [n for n in account.names if n in held]
        return found, account

    def _forget_old_scores(self) -> None:
        """Weights may have been trained since the last analysis; what data said of the same weights is kept."""
        seen: Any = object()
        if self._criterion.needs:
            values = {p: self._wing.read(p) for p in self._solved().graph.shapes}
            seen = {p: None if v is None else float(v.sum(dtype=np.float64)) for p, v in values.items()}
        if seen != self._weights_seen:
            self._scored = None
        self._weights_seen = seen

    def _score(self, view: View) -> dict[str, Array]:
        key = tuple((v.name, v.size, len(v.places)) for v in view.variables)
        if self._scored == key:
            return self._scores
        shapes, need = view.coupling.graph.shapes, self._criterion.needs
        gradients: dict[str, Array] = {}
        activations: dict[str, Array] = {}
        if need in ("gradient", "square"):
            gradients = self._wing.gradients(self._calibration, self._loss, need == "square")
        elif need == "activation":
            activations = self._wing.activations(self._calibration, view.coupling.graph.layers)

        def read(path: str) -> Array:
            values = self._wing.read(path)
            return np.zeros(shapes[path], dtype=np.float32) if values is None else values

        if all(self._wing.read(v.places[0][0]) is None for v in view.variables[:1]):
            made = {v.name: np.ones(v.size) for v in view.variables}  # a model without values: counts only
        else:
            evidence = Evidence(read, self._wing.rows, gradients, activations)
            made = scores(view, self._criterion, evidence, self._seed)
        self._scored = key
        return made

    def _describe(self, view: View, allocation: Allocation, ratio: float, whole: list[str]) -> dict[str, Any]:
        keep: dict[str, Index] = {n: best(self._scores[n], k) for n, k in allocation.keep.items()}
        integers, fields = self._wing.integers(), self._wing.config()
        sizes = scope_sizes(view, allocation.keep) if integers or fields else {}
        self._doubts = {}
        attributes: Changes = {}
        for module, numbers in integers.items():
            for name, old in numbers.items():
                choices = new_values(name, old, sizes.get(module, {}))
                if len(choices) > 1:
                    self._doubts.setdefault(module, {})[name] = len(choices)
                new = choices[self._choices.get((module, name), 0) % len(choices)]
                if new != old:
                    attributes.setdefault(module, {})[name] = (old, new)
        assert self._cut_form is not None
        config = self._cut_form.fields(view, self._levers, self._steps)
        if config is None:
            config = config_changes(fields, view, allocation.keep, sizes)
        made = {
            "framework": self._wing.framework,
            "reserved_ratio": ratio,
            "budget": self._budget,
            "importance": self._criterion.name,
            "allocation": self._allocation,
            "form": self._cut_form.name,
            "parallel": self._parallel,
            "alignment": self._alignment,
            "node_reserved_ratio": self._node_ratio,
            "un_prune": whole,
        }
        return make_desc(view, keep, attributes, config, made)

    def _rehearse(self, view: View, plan: PrunePlan, counts: Mapping[str, int]) -> bool:
        """Run the cut model on shapes alone and compare; pin what the model's code contradicts."""
        if not plan.keep:
            return True
        other, error, remade = self._wing.rehearse(plan)
        found = differences(view, other, counts, COPIES, error, remade)
        if found:
            # How a tensor lies in memory decides whether torch copies or views it; only the mathematics must agree.
            plain = differences(view, other, counts, LAYOUT, error, remade)
            if plain is None or found[1] == ANOTHER or len(other.nodes) > len(view.coupling.graph.nodes):
                found = plain
        if found and found[1] == ANOTHER and self._wing.branches and not error:
            # The cut changed the values that the model's own code branches on: it ran, and that must do.
            return True
        return found is None or self._pin(view, counts, *found)

    def _pin(self, view: View, counts: Mapping[str, int], place: int, what: str) -> bool:
        """Give in to the model's code: tie, try another attribute, or keep whole what an operator touches."""
        coupling = view.coupling
        node = coupling.graph.nodes[place]
        reason = f"{WRITTEN} {node.scope or 'the model'}"
        logger.debug("%s (%s at %s)", reason, what, node.op)
        if coupling.tie(place) or self._try_another(node.scope) or coupling.tie_widths(place):
            return False
        if not self._level and _uneven(view, counts):
            self._level = True
            return False
        untied = coupling.untied(place)
        if untied:
            self._coupling = untied
            return False
        # Where nothing is left at the operator itself: everything its module touches, then the modules around it.
        if any(coupling.pin(dim, reason) for dim in _touched(view, [node])):
            return False
        parts = node.scope.split(".") if node.scope else []
        for scope in (".".join(parts[:k]) for k in range(len(parts), -1, -1)):
            inside = [
                n for n in coupling.graph.nodes if not scope or n.scope == scope or n.scope.startswith(scope + ".")
            ]
            if sum(coupling.pin(dim, reason) for dim in _touched(view, inside)):
                self._keep_whole(f"all that {scope or 'the model'} touches stays whole: {what} in {node.op}")
                return False
        return self._keep_everything(view, f"{what} in {node.op} of {node.scope or 'the model'}")

    def _keep_everything(self, view: View, what: str) -> bool:
        """The last resort: pin every variable, so that the next plan cuts nothing."""
        relations = view.coupling.relations
        for dims in relations.params.values():
            for dim in dims:
                view.coupling.pin(dim, f"{WRITTEN} the model")
        self._keep_whole(f"nothing is pruned, since no plan runs: {what}")
        return False

    def _keep_whole(self, note: str) -> None:
        logger.warning("%s", note)
        self._solved().graph.notes.append(note)

    def _try_another(self, scope: str) -> bool:
        """Let the doubtful attributes of a module say the next combination of what they may; False when all were
        tried."""
        doubts = self._doubts.get(scope, {})
        combination = self._tried.get(scope, 0) + 1
        if not doubts or combination >= min(64, int(np.prod(list(doubts.values())))):
            for name in doubts:
                self._choices.pop((scope, name), None)
            return False
        self._tried[scope] = combination
        for name, number in doubts.items():
            self._choices[scope, name] = combination % number
            combination //= number
        return True

    def _cut(self, plan: PrunePlan) -> Callable[[], None]:
        names = plan.match(self._wing.shapes())
        take_back = self._wing.cut(plan, names)
        forget = record_plan(self._wing.model, dict(plan.desc))
        # Everything known about the model was about the uncut one.
        self._coupling, self._scored, self._cut_form = None, None, None
        shapes, buffers = self._wing.shapes(), self._wing.buffers()
        left = sum(int(np.prod(s)) for p, s in shapes.items() if p not in buffers)
        self._report = {**self._report, "left_params": left}
        self._report.pop("from_config", None)
        self._was_cut = True

        def undo() -> None:
            take_back()
            forget()
            self._report, self._was_cut = {}, False

        return undo

    def _common(self, view: View) -> dict[str, Any]:
        graph = view.coupling.graph
        return {
            "params": sum(int(np.prod(s)) for p, s in graph.shapes.items() if p not in graph.buffers),
            "variables": {
                v.name: {
                    "size": v.size,
                    "kind": v.kind,
                    "layers": list(v.layers),
                    "axes": [f"{p}:{a}" for p, a, _ in v.places],
                }
                for v in view.variables
            },
            "whole": {reason: list(places) for reason, places in view.whole.items()},
            "without_rule": [f"{name} in {scope or 'the model'}" for name, scope in view.coupling.relations.opaque],
            "notes": list(dict.fromkeys(graph.notes)),
        }

    def _fill_report(self, view: View, allocation: Allocation, account: Account, left: int, ratio: float) -> None:
        self._report = self._common(view)
        before = account.count(np.array(list(view.counts.values()), dtype=np.int64))
        for name, entry in self._report["variables"].items():
            entry["keep"] = allocation.keep[name]
        self._report.update(
            asked=ratio,
            budget=self._budget,
            reached=allocation.total / before if before else 1.0,
            left_params=left,
            held_back=[
                {"variable": n, "layers": self._report["variables"][n]["layers"], "keeps": allocation.keep[n]}
                for n in allocation.held_back
            ],
        )
        missed = allocation.total > allocation.target * 1.02
        if allocation.total < allocation.target * 0.98:
            wide = "the widths that alignment and heads allow lie too far apart to come nearer"
            self._report["notes"].append(f"asked to keep {ratio:.3f}, keeps {self._report['reached']:.3f}: {wide}")
            logger.warning(
                "asked to keep %.3f of the %s, keeps %.3f: %s", ratio, self._budget, self._report["reached"], wide
            )
        if missed and not allocation.held_back:
            self._report["notes"].append("nothing more can be pruned: every other axis stays whole")
        if missed:
            logger.warning(
                "asked to keep %.3f of the %s, reached %.3f; report() says what holds it back",
                ratio,
                self._budget,
                self._report["reached"],
            )
