"""Judging torch models: what a smaller one lost of a dense one, on held-out data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core.batch import as_call
from slimkit.core.calibration.halves import decoder_start, halves, has_encoder
from slimkit.core.calibration.record import records_of
from slimkit.core.compare.comparison import Comparison
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.compare.judge import JudgeOptions, judge, named_metrics
from slimkit.measurement import measure_model

import torch
from torch import nn

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
    """Compare smaller models with a dense one on held-out data; the models are left as they were.

    Language models are judged over fixed windows of tokens: perplexity, bits per byte, KL(dense || model), agreement of
    the likeliest token, next-token accuracy. Encoders by cosine and Spearman's correlation, classifiers by accuracy,
    agreement and expected calibration error. Parameters, bytes, MACs, speed and peak memory stand beside them, and each
    difference with its paired bootstrap interval over documents.

    Args:
        dense: the model that was there before, a function without arguments that makes it, or an ONNX file's path.
        candidates: name -> smaller model, function or path (judged in onnxruntime). One model is held at a time where
            none is a model already.
        dataset: a language model's documents: texts (with `tokenizer`) or rows of token numbers; batches for an
            encoder; (batch, labels) pairs for a classifier.
        metrics: further figures: ``"package.module:function"`` names, or name -> function, of (model, dataset).
        length: tokens a window; a document's last shorter window counts from two tokens on.
        seed: of the bootstrap.
        task: "language", "encoder" or "classifier".
        tokenizer: of transformers or alike, for texts; a fast one also gives bits per byte.
        bos: begin each window with the tokenizer's beginning-of-sequence token.
        top_k: take the KL divergence over so many of the dense model's likeliest tokens, and hold one model at a time;
            None is exact and holds all; "auto" is exact where all are models already, and 256 otherwise.
        speed: also measure prefill and decode speed, all models in turn.
        calibrated: what the smaller models were calibrated on: a set of `calibration`, its record, or a list of them.
            Held-out text that windows were drawn from is refused.

    Returns:
        The comparison: prints as a table, ``comparison["name"].figures["perplexity"]``, ``.save(file)``,
        ``.broken(["perplexity > 1.05x"])``.

    Raises:
        ArgumentTypeError, ArgumentError: a model is none, the data does not fit the task, or it was calibrated on.

    Example:
        >>> dense = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        >>> found = compare_models(dense, {"same": dense}, [[1, 2, 3, 4], [5, 6, 7]], speed=False)
        >>> found["same"].figures["kl"], found["same"].figures["agreement"]
        (0.0, 1.0)
    """
    options = JudgeOptions(task=task, length=length, bos=bos, top_k=top_k, speed=speed, seed=seed)
    known = [("calibrated", record) for record in records_of(calibrated)]
    return judge(TorchCompare(), dense, candidates, dataset, options, tokenizer, named_metrics(metrics), known)


class TorchCompare(CompareFramework):
    """Torch models as `core/compare` sees them."""

    model_type, model_word, tensor_type = nn.Module, "torch.nn.Module", torch.Tensor

    def check(self, model: Any, name: str) -> nn.Module:
        return bridge.check_model(model, name)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        with bridge.evaluating(model), torch.no_grad():
            yield

    def window(self, ids: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(ids[None])

    def outputs(self, model: nn.Module, batch: Any) -> np.ndarray[Any, Any]:
        found = self.first(bridge.run(model, batch))
        if found.ndim != 3:
            return self.numbers(found)
        mask = as_call(batch)[1].get("attention_mask")
        if mask is None or tuple(mask.shape) != tuple(found.shape[:2]):
            return self.numbers(found.mean(1))
        weight = mask.to(found.device, found.dtype)[..., None]
        return self.numbers((found * weight).sum(1) / weight.sum(1).clamp(min=1))

    def numbers(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        narrow = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        return narrow.detach().cpu().numpy()

    def measured(self, model: nn.Module, example: Any) -> Any:
        return measure_model(model, self._keywords(model, example), 0.0)

    def forward(self, model: nn.Module, example: Any) -> None:
        self.called(model, example)
        _wait(model)

    def decode(self, model: nn.Module, ids: np.ndarray[Any, Any], n_tokens: int) -> bool:
        if not _caches(type(model)) or has_encoder(model):
            return False
        token, past = self.window(ids).to(bridge.device_of(model)), None
        for _ in range(n_tokens):
            made = model(input_ids=token, past_key_values=past, use_cache=True)
            past = made.past_key_values
            if past is None:
                return False
            token = made.logits[:, -1:].argmax(-1)
        _wait(model)
        return True

    def read(self, model: nn.Module, n: int) -> int:
        return n // 2 if has_encoder(model) else 1

    def called(self, model: nn.Module, example: Any) -> Any:
        return bridge.run(model, self._keywords(model, example))

    def _keywords(self, model: nn.Module, example: Any) -> Any:
        """A window of tokens by the name that a model of transformers knows it by, without a cache to fill."""
        if isinstance(example, torch.Tensor) and "input_ids" in _takes(type(model)):
            found: dict[str, Any] = {"input_ids": example}
            if has_encoder(model):
                ids = example.numpy()
                parts = halves(ids, np.ones_like(ids), decoder_start(model.config))
                found = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
            if "use_cache" in _takes(type(model)):
                found["use_cache"] = False
            return found
        return example


def _takes(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _caches(kind: Any) -> bool:
    return {"input_ids", "past_key_values", "use_cache"} <= _takes(kind)


def _wait(model: nn.Module) -> None:
    if bridge.device_of(model).type != "cpu":
        torch.accelerator.synchronize()
