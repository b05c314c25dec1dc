"""The pruner of both wings: analysis, plan, cut and report; a wing only traces, reads and cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import PlanError
from slimkit.core.files import PathLike, as_path, atomic_file
from slimkit.core.log import logger
from slimkit.core.prune.draw import picture
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.frontier import frontier_of
from slimkit.core.prune.masks import desc_of_masks, is_masks
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.planning import PrunerPlanning
from slimkit.core.prune.record import record_plan, whole_desc
from slimkit.core.prune.reporting import coupled
from slimkit.core.prune.rotation import turned_values
from slimkit.core.prune.serving import serves
from slimkit.core.showing import Report

UNREPAIRED = (
    "the plan was made with a repair on calibration data, and a plan holds no weights: the replayed cut is not "
    "repaired. Load the weights of the model that was (save_pruned keeps them with the plan)"
)
ROTATED = (
    "the plan cuts a hidden width that was turned onto its principal axes, and a plan holds no axes: replay it by the "
    "pruner that made it, or load the pruned model's weights (load_pruned; prune_by_desc(weights_follow=True))"
)
if TYPE_CHECKING:
    from typing_extensions import Self


class PrunerBase(PrunerPlanning):
    """Structural pruning of one model.

    Args:
        wing: the framework's side.
    """

    def __init__(self, wing: PruneFramework) -> None:
        super().__init__(wing)
        self._was_cut = False

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
        self._begin_anew()
        return self

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
        self._seconds.begin("trace")
        with self._seconds.stage("plan"):
            desc = self._planned(reserved_ratio, self._wanted_whole(un_prune_list))
        return desc["made"]["left_params"], Report("plan", desc)

    def prune(self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None) -> dict[str, Any]:
        """Plan a cut and make it, in place; arguments as in `analysis`.

        Returns:
            The plan as plain data; `prune_by_desc` replays it on a fresh model.

        Raises:
            ArgumentError: a ratio or layer out of range.
            GraphError: the model could not be traced.
        """
        _, desc = self.analysis(reserved_ratio, un_prune_list)
        data = self._repair_data(self._made["importance"] == "output")
        if data is None:
            self._cut(PrunePlan(desc))
            return desc
        desc["made"]["repaired"] = True
        self._cut_repaired(PrunePlan(desc), data)
        return desc

    def frontier(
        self,
        reserved_ratios: Sequence[float],
        un_prune_list: Sequence[int | str] | None = None,
        *,
        nested: bool = False,
    ) -> Report:
        """Plan a cut for each of several ratios from one pass of the calibration data; the model is untouched.

        Args:
            reserved_ratios: shares to keep, each as in `analysis`.
            un_prune_list: as in `analysis`.
            nested: what one plan drops, all harder ones drop too, so that no plan is quite the best of its size.

        Returns:
            {"points": one {"asked", "reached", "left_params", "foretold_loss", "widths", "plan"} a ratio, in their
            order; "nested"}. The foretold loss is None where no calibration tells it, the widths are layer -> [kept,
            before], the plan is for `prune_by_desc`.

        Raises:
            ArgumentError: no ratio, or one out of range.
            GraphError: the model could not be traced.
        """
        self._seconds.begin("trace")
        with self._seconds.stage("plan"):
            return Report("frontier", frontier_of(self, reserved_ratios, un_prune_list, nested))

    def prune_by_desc(self, desc: dict[str, Any], *, repair: bool = False, weights_follow: bool = False) -> Any:
        """Replay a plan on a fresh model of the same make, in place; weights that a repair changed are not in a plan.

        Args:
            desc: what `prune`, `analysis` or `frontier` returned, possibly after a trip through JSON; or a desc of
                msModelSlim's, {layer: {"input" or "output": [number kept, mask]}}, which is proven on the example where
                one was given.
            repair: repair the cut model on the calibration data that this pruner was given, as `prune` does.
            weights_follow: the pruned model's weights are loaded next, so that nobody need be warned of a repair.

        Returns:
            The pruned model.

        Raises:
            ArgumentError: a repair without data.
            PlanError: the plan was made for another model; the message names the first mismatch. Or it cuts a hidden
                width that was turned (`set_rotation`) by another pruner, and no weights follow.
        """
        if is_masks(desc):
            desc = desc_of_masks(desc, self._wing.shapes(), self._wing.framework)
            if self._wing.has_example:
                # Masks say nothing of what belongs together: whether they do is found out before anything is cut.
                self._solved()
                error = self._wing.error_of(PrunePlan(desc))
                if error:
                    raise PlanError(f"the masks of desc do not fit one another in this model: {error}")
        if repair:
            data = self._repair_data(True)
            if data is None:
                check.wrong_value("repair", "False without calibration data (set_compensation)", repair)
            self._cut_repaired(PrunePlan({**desc, "made": {**desc.get("made", {}), "repaired": True}}), data)
            return self._wing.model
        plan = PrunePlan(desc)
        self._cut(plan, weights_follow=weights_follow)
        if not weights_follow and any(step.get("repaired") for step in plan.steps):
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
        which form the cut has, and why a model with a configuration has not the form "config". `seconds` says how long
        each stage took: trace, score, plan, cut and repair.
        """
        if not self._report:
            self._report = coupled(self._solved().view())
        if self._was_cut and "from_config" not in self._report:
            mismatch = self._wing.config_mismatch()
            if mismatch is not None:
                self._report["from_config"] = {"loads": not mismatch, "because": mismatch}
                kind = type(self._wing.model).__name__
                self._report["serves"] = serves(kind, self._wing.config(), mismatch, self._parallel)
        seconds = {stage: round(took, 3) for stage, took in self._seconds.spent.items()}
        return Report("pruning", {**self._report, "seconds": seconds})

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

    def _repair_data(self, wanted: bool) -> Any:
        """The batches to repair on: those that were set, or else those of the importance where it is wanted."""
        return self._repair if self._repair_set or not wanted else self._scoring.calibration

    def _cut_repaired(self, plan: PrunePlan, data: Any) -> None:
        layers = self._solved().graph.layers
        turn_back = self._turn(plan)
        try:
            dense = self._wing.snapshot()
            undo = self._cut(plan, turned=True)
        except BaseException:
            turn_back()
            raise
        try:
            with self._seconds.stage("repair"):
                self._report["compensation"] = self._wing.compensate(dense, plan, layers, data, self._damping)
        except BaseException:
            undo()
            turn_back()
            raise

    def _turn(self, plan: PrunePlan, weights_follow: bool = False) -> Callable[[], None]:
        """Turn the model as a plan wants it, in place; returns a call that takes it back."""
        parted = plan.parted
        stream, rotation = self._stream, self._scoring.rotation
        if weights_follow or not any("rotated" in step for step in plan.steps):
            return self._wing.turn((), parted) if parted else lambda: None
        if stream is None or rotation is None:
            raise PlanError(ROTATED)
        kept = plan.indices[stream.table][1]
        assert kept is not None

        def read(path: str) -> Any:
            return self._wing.read(path)

        return self._wing.turn(turned_values(stream, rotation, kept, read), parted)

    def _cut(self, plan: PrunePlan, turned: bool = False, weights_follow: bool = False) -> Callable[[], None]:
        with self._seconds.stage("cut"):
            return self._cut_now(plan, turned, weights_follow)

    def _cut_now(self, plan: PrunePlan, turned: bool, weights_follow: bool) -> Callable[[], None]:
        turn_back: Callable[[], None] = (lambda: None) if turned else self._turn(plan, weights_follow)
        try:
            names = plan.match(self._wing.shapes())
            take_back = self._wing.cut(plan, names)
        except BaseException:
            turn_back()
            raise
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
            turn_back()
            self._report, self._was_cut = {}, False

        return undo
