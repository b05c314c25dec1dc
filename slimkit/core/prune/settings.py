"""What a user may set on a pruner: importance, limits, alignment, budget, allocation and compensation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from slimkit.core import check
from slimkit.core.batch import dataset
from slimkit.core.files import PathLike
from slimkit.core.prune.criteria import CRITERIA, NEEDS, Criterion, OfRows
from slimkit.core.prune.forms import FORMS
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.latency import LatencyTable, table_of
from slimkit.core.prune.scoring import Scoring
from slimkit.core.prune.seconds import Seconds
from slimkit.core.showing import Shown

if TYPE_CHECKING:
    from typing_extensions import Self


BUDGETS = ("params", "macs", "kv_cache", "latency")
ALLOCATIONS = ("uniform", "global", "measured")


class PrunerSettings(Shown):
    """The setters of a pruner; each checks its argument and returns the pruner.

    Args:
        wing: the framework's side.
    """

    def __init__(self, wing: PruneFramework) -> None:
        self._wing = wing
        self._scoring = Scoring(wing)
        self._seconds = Seconds()
        self._node_ratio: float | None = None
        self._form: str | None = None
        self._parallel = 1
        self._rotate = False
        self._alignment = 16
        self._budget = "params"
        self._table: LatencyTable | None = None
        self._allocation: str | None = None
        self._repair: Any = None
        self._repair_set = False
        self._damping: float | None = None

    def _rows(self) -> Iterator[tuple[str, Any]]:
        yield "model", type(self._wing.model).__name__
        yield "importance", self._scoring.criterion.name
        yield "budget", self._budget
        yield "allocation", self._allocation
        yield "smallest share of a layer", self._node_ratio
        yield "widths in steps of", self._alignment
        yield "compensation", self._repair is not None

    def set_importance_evaluation_function(
        self,
        function: str | Criterion | type[Criterion] | Callable[[Any], Any] = "auto",
        *,
        calibration: Any = None,
        loss: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> Self:
        """Choose how channels are scored.

        Args:
            function: auto, output, l1, l2, bn_scale, taylor, hessian, activation, lamp or random; or a function that
                maps one output channel's weights (a tensor of the framework without the output axis, a copy) to a
                number; or a `Criterion` of your own. "auto", as unset, is "output" for a language model with
                calibration, whose cut is then repaired on the same data, and mean |w| for anything else.
            calibration: batches, for criteria that look at data; output wants several thousand tokens.
            loss: for taylor and hessian: (model outputs, batch) -> scalar loss; unset, the outputs' own `.loss`, or the
                mean squared output. With a loss, batches may be (inputs, labels): the model gets as many values of a
                tuple as its forward takes, the loss sees them all.
            seed: of "random".

        Returns:
            This pruner.

        Raises:
            ArgumentError: an unknown name, or calibration missing.
        """
        criterion = _criterion(function)
        if criterion.needs and calibration is None:
            check.wrong_value("calibration", f"a list of batches for the importance {criterion.name!r}", calibration)
        if calibration is not None:
            calibration = dataset(calibration, "calibration")
        if loss is not None:
            check.function(loss, "loss")
        self._scoring.forget()
        self._scoring.criterion, self._scoring.calibration, self._scoring.loss = criterion, calibration, loss
        self._scoring.seed = check.integer(seed, "seed")
        return self

    def set_node_reserved_ratio(self, ratio: float) -> Self:
        """Set the least share of its channels that each node keeps.

        Args:
            ratio: strictly between 0 and 1, and held to, whatever the ratio asked for. Unset it is 0.5, since a layer
                cut further seldom recovers, or 0.1 where the loss of each cut is known (allocation "measured"), and
                gives way where the ratio asked for cannot be reached with it.

        Returns:
            This pruner.
        """
        self._node_ratio = check.ratio(ratio, "ratio")
        return self

    def set_alignment(self, alignment: int) -> Self:
        """Set the number that kept widths are multiples of.

        Args:
            alignment: 16 unless set, the block size of Ascend's cube unit; 1 for none.

        Returns:
            This pruner.
        """
        self._alignment = check.positive(alignment, "alignment")
        return self

    def set_form(self, form: str) -> Self:
        """Choose which shapes may come out.

        Args:
            form: "config": only what the model's Hugging Face configuration can say, so that `from_pretrained` loads
                the result without slimkit; "padded": any number of heads and inner channels in each block, filled up
                with zeros to what the configuration can say, so that `from_pretrained` loads it as well: the ratio
                counts what stays, and `report()["padding"]` what the zeros cost; "any": any shape. Unset: "config" for
                a model with such a configuration, "any" for others.

        Returns:
            This pruner.
        """
        self._form = check.choice(form, FORMS, "form")
        return self

    def set_parallel(self, number: int) -> Self:
        """Keep numbers that so many devices divide among themselves (tensor parallelism).

        Args:
            number: devices; heads, key and value heads and inner widths keep multiples of it. Fewer key and value heads
                than devices stay whole, since devices then share them.

        Returns:
            This pruner.
        """
        self._parallel = check.positive(number, "number")
        return self

    def set_rotation(self, on: bool = True) -> Self:
        """Turn the hidden width onto its principal axes before it is cut, so that the last axes go instead of channels.

        For models whose residual stream is normalised by RMSNorm (Llama, Mistral, Qwen); the architecture stays what it
        is. The axes are found on the calibration data of the importance "output". A table of embeddings that the output
        layer shares is copied for it, since the last norm's scale is in one of the two: the configuration then says
        `tie_word_embeddings=False`, and the copy counts against the ratio asked for.

        Args:
            on: whether to.

        Returns:
            This pruner.

        Raises:
            ArgumentTypeError: no bool.
            UnsupportedError: at the first plan, where the model's stream cannot be turned, with the reason.
        """
        self._rotate = check.boolean(on, "on")
        self._begin_anew()
        return self

    def _begin_anew(self) -> None:
        """Forget what was found out about the model."""

    def set_budget(self, budget: str, table: LatencyTable | PathLike | None = None) -> Self:
        """Choose what the ratio counts.

        Args:
            budget: "params", "macs" for multiplications of one forward pass on the example, "kv_cache" for the keys and
                values that a decoder holds for each token (nothing else is cut then), or "latency" for milliseconds as
                a table foretells them.
            table: for "latency": what `measure_latency` returned, or the file that it wrote.

        Returns:
            This pruner.

        Raises:
            ArgumentError: "latency" without a table, or a table with another budget; at the first plan, "kv_cache" of a
                network without attention.
            FileFormatError: the file is no table.
        """
        check.choice(budget, BUDGETS, "budget")
        if (budget == "latency") != (table is not None):
            check.wrong_value("table", 'what measure_latency returned for "latency", and None otherwise', table)
        self._table = None if table is None else table_of(table)
        self._budget = budget
        return self

    def set_allocation(self, allocation: str) -> Self:
        """Choose how the budget is shared among the nodes.

        Args:
            allocation: "uniform": every node keeps the same share, which keeps repeated blocks equal; "global":
                the least important channels of the whole model go first; "measured": the widths whose losses, as the
                importance "output" foretells them, sum up to the least. Unset: measured with that importance, uniform
                with any other.

        Returns:
            This pruner.
        """
        self._allocation = check.choice(allocation, ALLOCATIONS, "allocation")
        return self

    def set_compensation(self, calibration: Any, damping: float | None = None) -> Self:
        """Repair the cut model from calibration data: each layer is refitted to its original's outputs.

        No labels are needed: the least-squares weights and biases answer the calibration inputs most nearly as the
        uncut layer did.

        Args:
            calibration: batches; some hundred samples do. None switches it off.
            damping: pull towards the cut weights, relative to the inputs' mean square; unset, each layer's is the one
                that serves best on an eighth of the data that the others were fitted without.

        Returns:
            This pruner.
        """
        if calibration is not None:
            calibration = dataset(calibration, "calibration")
        self._repair, self._repair_set = calibration, True
        self._damping = None if damping is None else check.number(damping, "damping", minimum=0)
        return self


def _criterion(function: Any) -> Criterion:
    if isinstance(function, type) and issubclass(function, Criterion):
        function = function()
    if isinstance(function, Criterion):
        check.choice(function.needs, NEEDS, f"{type(function).__name__}.needs")
        return function
    return OfRows(function) if callable(function) else CRITERIA[check.choice(function, CRITERIA, "function")]
