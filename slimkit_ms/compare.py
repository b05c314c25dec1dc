"""Judging MindSpore cells: what a smaller one lost of a dense one, on held-out data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from slimkit.core.calibration.record import records_of
from slimkit.core.compare.comparison import Comparison
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.compare.judge import JudgeOptions, judge, named_metrics
from slimkit_ms import bridge
from slimkit_ms.measurement import measure_model

import mindspore as ms
from mindspore import nn

__all__ = ["Comparison", "compare_models"]


def compare_models(
    dense: Any,
    candidates: Mapping[str, Any],
    dataset: Any,
    *,
    metrics: Iterable[str] | Mapping[str, Any] | None = None,
    length: int = 512,
    seed: int = 0,
    task: str = "language",
    tokenizer: Any = None,
    bos: bool = False,
    top_k: int | str | None = "auto",
    speed: bool = True,
    calibrated: Any = None,
) -> Comparison:
    """Compare smaller cells with a dense one on held-out data; the cells are left as they were.

    Language models are judged over fixed windows of tokens: perplexity, bits per byte, KL(dense || model), agreement of
    the likeliest token, next-token accuracy. Encoders by cosine and Spearman's correlation, classifiers by accuracy,
    agreement and expected calibration error. Parameters, bytes, MACs, speed and peak memory stand beside them, and each
    difference with its paired bootstrap interval over documents.

    Args:
        dense: the cell that was there before, a function without arguments that makes it, or an ONNX file's path.
        candidates: name -> smaller cell, function or path (judged in onnxruntime). One cell is held at a time where
            none is a cell already.
        dataset: a language model's documents: texts (with `tokenizer`) or rows of token numbers; batches for an
            encoder; (batch, labels) pairs for a classifier.
        metrics: further figures: ``"package.module:function"`` names, or name -> function, of (model, dataset).
        length: tokens a window; a document's last shorter window counts from two tokens on.
        seed: of the bootstrap.
        task: "language", "encoder" or "classifier".
        tokenizer: of transformers or alike, for texts; a fast one also gives bits per byte.
        bos: begin each window with the tokenizer's beginning-of-sequence token.
        top_k: take the KL divergence over so many of the dense model's likeliest tokens, and hold one model at a time;
            None is exact and holds all; "auto" is exact where all are cells already, and 256 otherwise.
        speed: also measure how many tokens or samples a second pass, all models in turn.
        calibrated: what the smaller models were calibrated on: a set of `calibration`, its record, or a list of them.
            Held-out text that windows were drawn from is refused.

    Returns:
        The comparison: prints as a table, ``comparison["name"].figures["perplexity"]``, ``.save(file)``,
        ``.broken(["perplexity > 1.05x"])``.

    Raises:
        ArgumentTypeError, ArgumentError: a model is none, the data does not fit the task, or it was calibrated on.

    Example:
        >>> dense = nn.SequentialCell(nn.Embedding(9, 4), nn.Dense(4, 9))
        >>> found = compare_models(dense, {"same": dense}, [[1, 2, 3, 4], [5, 6, 7]], speed=False)
        >>> found["same"].figures["kl"], found["same"].figures["agreement"]
        (0.0, 1.0)
    """
    options = JudgeOptions(task=task, length=length, bos=bos, top_k=top_k, speed=speed, seed=seed)
    known = [("calibrated", record) for record in records_of(calibrated)]
    return judge(MindSporeCompare(), dense, candidates, dataset, options, tokenizer, named_metrics(metrics), known)


class MindSporeCompare(CompareFramework):
    """MindSpore cells as `core/compare` sees them."""

    model_type, model_word, tensor_type = nn.Cell, "mindspore.nn.Cell", ms.Tensor

    def check(self, model: Any, name: str) -> nn.Cell:
        return bridge.check_model(model, name)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Cell) -> Iterator[None]:
        with bridge.evaluating(model), bridge.pynative():
            yield

    def window(self, ids: np.ndarray[Any, Any]) -> ms.Tensor:
        return ms.Tensor(ids[None].astype(np.int32))

    def outputs(self, model: nn.Cell, batch: Any) -> np.ndarray[Any, Any]:
        found = self.numbers(self.first(bridge.run(model, batch)))
        if found.ndim != 3:
            return found
        mask = bridge.call_of(batch)[1].get("attention_mask")
        if mask is None or tuple(mask.shape) != tuple(found.shape[:2]):
            return found.mean(1)
        weight = bridge.as_numpy(mask).astype(found.dtype)[..., None]
        return (found * weight).sum(1) / np.maximum(weight.sum(1), 1)

    def numbers(self, tensor: ms.Tensor) -> np.ndarray[Any, Any]:
        narrow = tensor if tensor.dtype in (ms.float32, ms.float64) else tensor.astype(ms.float32)
        return bridge.as_numpy(narrow)

    def measured(self, model: nn.Cell, example: Any) -> Any:
        return measure_model(model, _keywords(model, example), 0.0)

    def forward(self, model: nn.Cell, example: Any) -> None:
        self.first(self.called(model, example)).asnumpy()

    def called(self, model: nn.Cell, example: Any) -> Any:
        return bridge.run(model, _keywords(model, example))

    def decode(self, model: nn.Cell, ids: np.ndarray[Any, Any], n_tokens: int) -> bool:
        return False  # cells have no common way to hand a cache over


def _takes(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.construct).parameters)


def _keywords(model: nn.Cell, example: Any) -> Any:
    """A window of tokens by the name that models in the manner of transformers know it by."""
    named = isinstance(example, ms.Tensor) and "input_ids" in _takes(type(model))
    return {"input_ids": example} if named else example
