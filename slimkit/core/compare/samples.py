"""Encoders and classifiers, sample by sample.

Encoder     cosine of each sample's output to the dense model's; Spearman's rank correlation of all pairs' cosines
            (Cer et al. 2017, SemEval STS: similarities are judged by their order)
Classifier  accuracy, agreement with the dense model, expected calibration error over 15 bins (Guo et al. 2017, sec. 2)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from slimkit.core.batch import dataset as check_dataset
from slimkit.core.compare import DENSE
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.compare.intervals import figures_of
from slimkit.core.compare.scores import log_softmax
from slimkit.core.errors import ArgumentError

Array = np.ndarray[Any, Any]
BINS = 15
# Samples whose pairs are compared: 1,000 have half a million pairs.
PAIRED = 1000


class SampleJudge:
    """Outputs, and labels for a classifier, of held-out batches.

    Args:
        framework: of the models.
        dataset: batches; (batch, labels) pairs for a classifier.
        task: "encoder" or "classifier".
    """

    kl = "exact"
    prompt = None

    def __init__(self, framework: CompareFramework, dataset: Any, task: str) -> None:
        self._framework, self._task = framework, task
        self._batches = list(check_dataset(dataset))
        if not self._batches:
            raise ArgumentError("dataset must hold a batch. Received: none")
        self._labels: Array | None = None
        if task == "classifier":
            for number, pair in enumerate(self._batches):
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise ArgumentError(f"dataset[{number}] must be a pair (batch, labels) for a classifier")
            self._labels = np.concatenate([np.asarray(labels).reshape(-1) for _, labels in self._batches])
            self._batches = [batch for batch, _ in self._batches]
        self.example = self._batches[0]
        self.protocol = "each sample once, in batches as given, padding left out of averages"
        self.outputs: dict[str, Array] = {}
        self.positions = 1
        self.n_documents = 0
        self.data: dict[str, Any] = {}

    def done(self, name: str) -> bool:
        """Whether a model has been judged."""
        return name in self.outputs

    def weighed(self) -> tuple[Any, int]:
        """What multiply-accumulates are counted on, and how many samples it has."""
        return self.example, self.positions

    def run(self, name: str, model: Any) -> None:
        """One pass of a model over every batch."""
        outputs = np.concatenate([np.asarray(self._framework.outputs(model, b)) for b in self._batches])
        if name == DENSE:
            self.n_documents = len(outputs)
            self.positions = max(1, len(outputs) // len(self._batches))
            digest = hashlib.sha256(np.ascontiguousarray(outputs).tobytes()).hexdigest()
            self.data = {"samples": self.n_documents, "sha256 of dense outputs": digest}
            if self._labels is not None and len(self._labels) != len(outputs):
                raise ArgumentError(f"dataset holds {len(self._labels)} labels for {len(outputs)} samples")
        elif len(outputs) != self.n_documents:
            raise ArgumentError(f"{name} gives {len(outputs)} outputs where the dense model gives {self.n_documents}")
        elif self._task == "classifier" and outputs.shape != self.outputs[DENSE].shape:
            raise ArgumentError(f"{name} gives outputs {outputs.shape}, the dense model {self.outputs[DENSE].shape}")
        self.outputs[name] = outputs.reshape(len(outputs), -1).astype(np.float64)

    def result(self, name: str, counts: Array) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
        """Figures of a model, and intervals of their differences from the dense model's."""
        mine, dense = self.outputs[name], self.outputs[DENSE]
        ones = np.ones(len(mine))
        mean: Callable[[int], Callable[[Array], Array]] = lambda column: lambda s: s[..., column] / s[..., 0]
        if self._task == "encoder":
            if name == DENSE:
                return {}, {}
            found: dict[str, float | None] = {"spearman": spearman(mine, dense)}
            intervals: dict[str, tuple[float, float]] = {}
            if mine.shape == dense.shape:
                sums = np.stack([ones, _cosines(mine, dense)], -1)
                own, intervals = figures_of({"cosine": mean(1)}, sums, sums, counts, True)
                found = {**own, **found}
            return found, intervals
        assert self._labels is not None
        right = mine.argmax(-1) == self._labels
        agree = mine.argmax(-1) == dense.argmax(-1)
        rules = {"accuracy": mean(1)} | ({} if name == DENSE else {"agreement": mean(2)})
        base = np.stack([ones, dense.argmax(-1) == self._labels, ones], -1)
        sums = np.stack([ones, right, agree], -1)
        own, intervals = figures_of(rules, sums, base, counts, name != DENSE)
        return {**own, "calibration_error": calibration_error(mine, right)}, intervals


def _cosines(a: Array, b: Array) -> Array:
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(scale, 1e-30)


def spearman(a: Array, b: Array) -> float | None:
    """Rank correlation of two models' cosines between pairs of samples; None with fewer than three samples.

    Args:
        a, b: (samples, width) outputs; widths may differ.

    Example:
        >>> x = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.2]])
        >>> round(spearman(x, 3 * x), 9)
        1.0
    """
    from scipy.stats import spearmanr

    n = min(len(a), PAIRED)
    if n < 3:
        return None
    above = np.triu_indices(n, 1)
    pairs = []
    for x in (a[:n], b[:n]):
        unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
        pairs.append((unit @ unit.T)[above])
    found = float(spearmanr(*pairs).statistic)
    return found if found == found else None


def calibration_error(logits: Array, right: Array) -> float:
    """Expected calibration error: how far confidence is from accuracy, weighted over bins of confidence.

    Args:
        logits: (samples, classes).
        right: (samples,) whether the likeliest class is the right one.

    Example:
        >>> calibration_error(np.array([[50.0, 0.0], [0.0, 50.0]]), np.array([True, True]))
        0.0
    """
    confidence = np.exp(log_softmax(logits).max(-1))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    total = 0.0
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            total += abs(float(right[inside].mean()) - float(confidence[inside].mean())) * float(inside.mean())
    return round(total, 12)
