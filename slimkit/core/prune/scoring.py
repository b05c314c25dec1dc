"""What the indices of a model are worth to a pruner: by which criterion, from which data, and until when."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.log import logger
from slimkit.core.prune.criteria import CRITERIA, Criterion, Evidence
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.importance import scores
from slimkit.core.prune.output import output_losses
from slimkit.core.prune.rotation import Rotation, principal_axes
from slimkit.core.prune.solve import Variable, View
from slimkit.core.prune.stream import Stream

Array = np.ndarray[Any, Any]

UNCALIBRATED = (
    "a language model is pruned without calibration data: weights alone do not tell what it can lose, and its answers "
    "are likely to be useless. Give a few dozen texts (calibration=, --calib)"
)


class Scoring:
    """The scores of one model's variables, kept as long as they hold.

    Args:
        wing: the framework's side.

    Attributes:
        criterion, calibration, loss, seed: what the user set.
        scores: variable -> (indices,), larger is more important; of the last `score`.
        losses: variable -> the losses that a cut of it foretells, where the criterion is "output".
    """

    def __init__(self, wing: PruneFramework) -> None:
        self._wing = wing
        self.criterion: Criterion = CRITERIA["auto"]
        self.calibration: Any = None
        self.loss: Callable[..., Any] | None = None
        self.seed = 0
        self.scores: dict[str, Array] = {}
        self.losses: dict[str, Array] = {}
        self.rotation: Rotation | None = None  # axes of the stream, as long as the same weights and data hold
        self._made_from: Any = None
        self._known: dict[Hashable, Array | None] = {}  # losses of the same weights, by what they were made of
        self._weights_seen: Any = None
        self._warned = False

    def forget(self) -> None:
        """The model or what was set is another: score anew."""
        self.anew()
        self._known.clear()

    def anew(self) -> None:
        """The model is traced anew, of the same weights: what data said of its layers is kept."""
        self._made_from, self.rotation = None, None

    def look(self, paths: Iterable[str]) -> None:
        """Forget scores of weights that were trained since the last look; what data said of the same weights is kept.

        Args:
            paths: the parameters.
        """
        seen: Any = object()
        if self.criterion.needs or self.calibration is not None:
            values = {p: self._wing.read(p) for p in paths}
            seen = {p: None if v is None else float(v.sum(dtype=np.float64)) for p, v in values.items()}
        if seen != self._weights_seen:
            self.forget()
        self._weights_seen = seen

    def suited(self, language_model: bool) -> Criterion:
        """The criterion that was asked for, or the one that suits the model and what is known of it."""
        if self.criterion is not CRITERIA["auto"]:
            return self.criterion
        if not language_model:
            return CRITERIA["l1"]
        if self.calibration is None:
            if not self._warned:
                logger.warning("%s", UNCALIBRATED)
            self._warned = True
            return CRITERIA["l1"]
        return CRITERIA["output"]

    def score(
        self, view: View, criterion: Criterion, variables: Sequence[Variable], stream: Stream | None = None
    ) -> dict[str, Array]:
        """Score all variables of a view.

        Args:
            view: the coupling.
            criterion: by which.
            variables: those whose losses are wanted, where the criterion foretells losses.
            stream: one that is turned onto its principal axes before it is cut.
        """
        # Names are given in order, so that the same ones are of other layers where others stay whole.
        turned = stream and stream.variable(view)
        key = criterion, repr(view.axes), tuple(view.counts.items()), tuple(v.name for v in variables), turned
        if self._made_from == key:
            return self.scores
        shapes, need = view.coupling.graph.shapes, criterion.needs
        gradients: dict[str, Array] = {}
        activations: dict[str, Array] = {}
        if need in ("gradient", "square"):
            gradients = self._wing.gradients(self.calibration, self.loss, need == "square")
        elif need == "activation":
            activations = self._wing.activations(self.calibration, view.coupling.graph.layers)

        def read(path: str) -> Array:
            values = self._wing.read(path)
            return np.zeros(shapes[path], dtype=np.float32) if values is None else values

        if all(self._wing.read(v.places[0][0]) is None for v in view.variables[:1]):
            made = {v.name: np.ones(v.size) for v in view.variables}  # a model without values: counts only
        elif need == "signal":

            def signals(layers: Sequence[str]) -> Mapping[str, LayerSignal | ExpertSignal]:
                return self._wing.signals(self.calibration, layers, self.loss, self.seed)

            variables = [v for v in variables if v.name != turned]
            self.losses = output_losses(view, variables, signals, read, self._known)
            if stream and turned:
                self.rotation = self.rotation or principal_axes(stream, signals, read)
                self.losses[turned] = self.rotation.losses
            made = {v.name: self.losses.get(v.name, np.ones(v.size)) for v in view.variables}
        else:
            evidence = Evidence(read, self._wing.rows, gradients, activations)
            made = scores(view, criterion, evidence, self.seed)
        self.scores, self._made_from = made, key
        return made
