"""The pruner of both wings: analysis, plan, cut and report; a wing only traces, reads and cuts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError, PlanError
from slimkit.core.files import PathLike, as_path, atomic_file
from slimkit.core.log import logger
from slimkit.core.match import demand, match
from slimkit.core.prune.allocate import Account, Allocation, allocate
from slimkit.core.prune.attributes import config_changes, new_values, scope_sizes
from slimkit.core.prune.criteria import CRITERIA, Criterion
from slimkit.core.prune.draw import picture
from slimkit.core.prune.expressions import Index
from slimkit.core.prune.forms import CutForm, parallel_steps
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.importance import best
from slimkit.core.prune.knapsack import measured
from slimkit.core.prune.levers import Lever, joined_losses, joined_scores, lever_matrix
from slimkit.core.prune.masks import desc_of_masks, is_masks
from slimkit.core.prune.narrowing import Narrowing, alike_levers
from slimkit.core.prune.plan import PrunePlan, make_desc
from slimkit.core.prune.record import record_plan, whole_desc
from slimkit.core.prune.reporting import allocated, coupled
from slimkit.core.prune.serving import serves
from slimkit.core.prune.settings import PrunerSettings
from slimkit.core.prune.solve import Coupling, Variable, View
from slimkit.core.showing import Report

_ROUNDS = 200
_LEAST, _LEAST_MEASURED = 0.5, 0.1
UNREPAIRED = (
    "the plan was made with a repair on calibration data, and a plan holds no weights: the replayed cut is not "
    "repaired. Load the weights of the model that was (save_pruned keeps them with the plan)"
)
if TYPE_CHECKING:
    from typing_extensions import Self

Array = np.ndarray[Any, Any]


class PrunerBase(PrunerSettings):
    """Structural pruning of one model.

    Args:
        wing: the framework's side.
    """

    def __init__(self, wing: PruneFramework) -> None:
        super().__init__(wing)
        self._narrowing: Narrowing | None = None
        self._made: dict[str, Any] = {}  # what this plan's settings came to
        self._report: dict[str, Any] = {}
        self._was_cut = False
        self._cut_form: CutForm | None = None
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
        self._narrowing, self._report, self._cut_form = None, {}, None
        self._scoring.forget()
        return self

    @property
    def is_language_model(self) -> bool:
        """Whether the model has a table of embeddings and attention, so that only data tells what it can lose."""
        return self._solved().is_language_model

    def analysis(
        self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Plan a cut; the model is untouched.

        Args:
            reserved_ratio: share of the parameters (or multiplications) to keep, in (0, 1].
            un_prune_list: layers whose outputs stay whole: numbers (Conv and Linear layers in the order they run,
                negatives from the end) or names; [0, -1] unless given, and none in the form "config", whose numbers
                speak of all layers. The model's inputs and outputs stay whole in any case.

        Returns:
            (parameters left, exactly; the plan as plain data for `prune_by_desc`).

        Raises:
            ArgumentError: a ratio or layer out of range.
            GraphError: the model could not be traced.
        """
        check.ratio(reserved_ratio, "reserved_ratio", one=True)
        narrowing = self._begun()
        narrowing.begin()
        form = self._form_begun()
        if un_prune_list is None:
            un_prune_list = [0, -1] if narrowing.coupling.graph.layers and form.name == "any" else []
        whole = self._layers(un_prune_list)
        self._scoring.look(self._solved().graph.shapes)
        # Each round ties or pins something, or tries another of a few numbers; after many, the rest is not worth it.
        for rounds in count():
            view = narrowing.coupling.view(whole)
            allocation, account = self._allocate(view, reserved_ratio)
            desc = self._describe(view, allocation, reserved_ratio, whole)
            if not form.contradicts(view, PrunePlan(desc)) and self._rehearse(view, desc):
                break
            if rounds == _ROUNDS:
                narrowing.keep_everything(f"its code contradicted {rounds} plans")
        left = Account(view).count(np.array([allocation.keep[n] for n in view.counts], dtype=np.int64))
        self._report = allocated(view, allocation, account, left, reserved_ratio, self._budget)
        self._report["form"] = {"name": form.name, "because": form.because}
        desc["made"]["left_params"] = left
        return left, Report("plan", desc)

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
        data = self._repair
        if not self._repair_set and self._made["importance"] == "output":
            data = self._scoring.calibration
        if data is None:
            self._cut(PrunePlan(desc))
            return desc
        desc["made"]["repaired"] = True
        plan = PrunePlan(desc)
        dense = self._wing.snapshot()
        undo = self._cut(plan)
        try:
            self._report["compensation"] = self._wing.compensate(dense, plan, layers, data, self._damping)
        except BaseException:
            undo()
            raise
        return desc

    def prune_by_desc(self, desc: dict[str, Any], *, weights_follow: bool = False) -> Any:
        """Replay a plan on a fresh model of the same make, in place; weights that a repair changed are not in a plan.

        Args:
            desc: what `prune` or `analysis` returned, possibly after a trip through JSON; or a desc of msModelSlim's,
                {layer: {"input" or "output": [number kept, mask]}}, which is proven on the example where one was given.
            weights_follow: the pruned model's weights are loaded next, so that nobody need be warned of a repair.

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
                error = self._wing.error_of(PrunePlan(desc))
                if error:
                    raise PlanError(f"the masks of desc do not fit one another in this model: {error}")
        self._cut(PrunePlan(desc))
        made = desc.get("made", {})
        if not weights_follow and any(step.get("repaired") for step in made.get("steps", [made])):
            logger.warning("%s", UNREPAIRED)
        return self._wing.model

    def whole_desc(self) -> dict[str, Any]:
        """The plan of everything that was cut from this model so far, by this pruner and others.

        Returns:
            What `prune` returned after one pruning, and `merge_desc` of all plans after several.

        Raises:
            PlanError: nothing was pruned from this model.
        """
        return whole_desc(self._wing.model)

    def report(self) -> Report:
        """What the last analysis or cut found: sizes, what stays whole and why, operators without a rule, notes.

        Of a cut model that carries a configuration, `from_config` says whether a model built from it has the cut
        shapes, so that its own `from_pretrained` loads it: {"loads": bool, "because": the first difference}. `serves`
        holds the limits that transformers, vLLM and vLLM-Ascend state against it, each with its source. `form` says
        which form the cut has, and why a model with a configuration has not the form "config".
        """
        if not self._report:
            self._report = coupled(self._solved().view())
        if self._was_cut and "from_config" not in self._report:
            mismatch = self._wing.config_mismatch()
            if mismatch is not None:
                self._report["from_config"] = {"loads": not mismatch, "because": mismatch}
                kind = type(self._wing.model).__name__
                self._report["serves"] = serves(kind, self._wing.config(), mismatch, self._parallel)
        return Report("pruning", self._report)

    def draw(self, path: PathLike | None = None) -> str:
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

    def _begun(self) -> Narrowing:
        if self._narrowing is None:
            coupling = Coupling(self._wing.trace())
            if self._wing.one_head_size:
                coupling.keep_head_sizes()
            self._narrowing = Narrowing(coupling)
        return self._narrowing

    def _solved(self) -> Coupling:
        return self._begun().coupling

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

    def _form_begun(self) -> CutForm:
        if self._cut_form is None or self._cut_form.wanted != self._form:
            self._cut_form = CutForm(self._form, self._wing, self._solved())
        return self._cut_form

    def _allocate(self, view: View, ratio: float) -> tuple[Allocation, Account]:
        account = Account(view, self._budget)
        full = np.array(list(view.counts.values()), dtype=np.int64)
        target = ratio * account.count(full)
        criterion = self._scoring.suited(self.is_language_model)
        allocation = self._allocation or ("measured" if criterion is CRITERIA["output"] else "uniform")
        if allocation == "measured" and criterion is not CRITERIA["output"]:
            raise ArgumentError(
                'allocation "measured" needs the importance "output" and calibration data, for only these foretell the '
                f"loss of a cut. Received: the importance {criterion.name!r}"
            )
        self._made = {"importance": criterion.name, "allocation": allocation}
        self._levers = self._form_begun().levers(view)
        multiples = dict(zip((x.name for x in self._levers), parallel_steps(view, self._levers, self._parallel)))
        fixed: dict[str, int] = {}
        while True:
            # Levers that had to be put elsewhere stay there, and the others make up for it.
            free = [x for x in self._levers if x.name not in fixed]
            offsets, matrix = lever_matrix(account.names, view.counts, self._levers, fixed)
            musts = [multiples[x.name] for x in free]
            joined = account.joined([x.name for x in free], offsets, matrix, musts)
            sizes = [x.size // m * m for x, m in zip(free, musts)]
            found = self._turned(view, joined, free, sizes, target, criterion, allocation)
            if fixed:
                break
            steps = joined.steps(self._alignment, np.array(sizes, dtype=np.int64)).tolist()
            fixed = self._form_begun().settled(self._levers, found.keep, dict(zip(joined.names, steps)))
            if not fixed:
                break
        self._steps = {**found.keep, **fixed}
        counts = offsets + matrix @ np.array([found.keep[n] for n in joined.names], dtype=np.int64)
        held = {v for x in self._levers if x.name in found.held_back for v in x.members}
        found.keep = dict(zip(account.names, counts.tolist()))
        found.held_back = [n for n in account.names if n in held]
        return found, account

    def _turned(
        self,
        view: View,
        account: Account,
        levers: list[Lever],
        sizes: list[int],
        target: float,
        criterion: Criterion,
        allocation: str,
    ) -> Allocation:
        """Where each lever is to stand, by the scores or losses of what it cuts."""
        least = _LEAST_MEASURED if allocation == "measured" else _LEAST
        self._made["node_reserved_ratio"] = self._node_ratio or least
        least = self._node_ratio or account.floor_for(sizes, least, self._alignment, target)
        limits, level = (target, least, self._alignment), self._begun().level
        labels = alike_levers(view, levers)
        if allocation == "measured":
            self._scoring.score(view, criterion, self._open(view, account, levers, sizes, *limits))
            losses = joined_losses(levers, sizes, self._scoring.losses)
            return measured(account, sizes, *limits, losses, labels if level else None)
        scores = self._scoring.score(view, criterion, view.variables)
        chunks = None
        if allocation == "global":
            comparable = criterion.comparable
            chunks = {n: s if comparable else s / max(s.mean(), 1e-30) for n, s in scores.items()}
            chunks = {x.name: joined_scores(x, chunks)[x.size - size :] for x, size in zip(levers, sizes)}
        return allocate(account, sizes, *limits, chunks, labels, level=level, gives_way=self._node_ratio is None)

    @staticmethod
    def _open(
        view: View, account: Account, levers: list[Lever], sizes: list[int], target: float, least: float, alignment: int
    ) -> list[Variable]:
        """The variables that a measured cut may touch: the hidden width only where all else would not do, since every
        layer of the model reads it."""
        hidden = {v.name for v in view.variables if v.kind == "hidden"}
        stays = [bool(hidden & x.members.keys()) for x in levers]
        floors = account.floors(sizes, least, alignment)
        counts = [size if whole else int(f) for size, whole, f in zip(sizes, stays, floors)]
        if account.count(np.array(counts, dtype=np.int64)) > target:
            return view.variables
        inner = {v for x, whole in zip(levers, stays) if not whole for v in x.members}
        return [v for v in view.variables if v.name in inner]

    def _describe(self, view: View, allocation: Allocation, ratio: float, whole: list[str]) -> dict[str, Any]:
        keep: dict[str, Index] = {n: best(self._scoring.scores[n], k) for n, k in allocation.keep.items()}
        integers, fields = self._wing.integers(), self._wing.config()
        sizes = scope_sizes(view, allocation.keep) if integers or fields else {}
        candidates = {
            module: {name: new_values(name, old, sizes.get(module, {})) for name, old in numbers.items()}
            for module, numbers in integers.items()
        }
        chosen = self._begun().choose(candidates)
        attributes = {
            module: changed
            for module, numbers in integers.items()
            if (changed := {n: (old, new) for n, old in numbers.items() if (new := chosen[module][n]) != old})
        }
        form = self._form_begun()
        config = form.fields(view, self._levers, self._steps)
        if config is None:
            config = config_changes(fields, view, allocation.keep, sizes)
        made = {
            "framework": self._wing.framework,
            "reserved_ratio": ratio,
            "budget": self._budget,
            **self._made,
            "form": form.name,
            "parallel": self._parallel,
            "alignment": self._alignment,
            "un_prune": whole,
        }
        return make_desc(view, keep, attributes, config, made)

    def _rehearse(self, view: View, desc: dict[str, Any]) -> bool:
        """Try the plan on the framework's side; where the model's code contradicts it, narrow what the next may do."""
        plan = PrunePlan(desc)
        if not plan.keep:
            return True
        found = self._wing.rehearse(plan, view)
        if found.contradiction is None:
            for module, changes in found.attributes.items():
                desc["attributes"].setdefault(module, {}).update({name: list(pair) for name, pair in changes.items()})
            return True

        def works(names: Collection[str]) -> bool:
            variables = {
                name: v if name in names else {**v, "keep": list(range(v["size"]))}
                for name, v in desc["variables"].items()
            }
            part = PrunePlan({**desc, "variables": variables})
            return self._wing.rehearse(part, view).contradiction is None

        self._begun().narrow(found.contradiction, view, view.counts | plan.counts, works)
        return False

    def _cut(self, plan: PrunePlan) -> Callable[[], None]:
        names = plan.match(self._wing.shapes())
        take_back = self._wing.cut(plan, names)
        forget = record_plan(self._wing.model, dict(plan.desc))
        # Everything known about the model was about the uncut one.
        self._narrowing, self._cut_form = None, None
        self._scoring.forget()
        shapes, buffers = self._wing.shapes(), self._wing.buffers()
        left = sum(int(np.prod(s)) for p, s in shapes.items() if p not in buffers)
        self._report = {**self._report, "left_params": left}
        for told in ("from_config", "serves"):
            self._report.pop(told, None)
        self._was_cut = True

        def undo() -> None:
            take_back()
            forget()
            self._report, self._was_cut = {}, False

        return undo
