"""Recipes of language models: a folder instead of a factory, calibration text, and held-out text that judges stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core.calibration.apart import refuse_seen
from slimkit.core.calibration.documents import Encoder
from slimkit.core.calibration.reading import TextReader
from slimkit.core.compare import DENSE
from slimkit.core.compare.comparison import Comparison
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.compare.intervals import draws
from slimkit.core.compare.judge import TOP_K, JudgeOptions, LanguageJudge, judge, named_metrics
from slimkit.core.errors import ArgumentError, ConfigError
from slimkit.core.jobs.calibrating import text_set, weighted
from slimkit.core.jobs.framework import JobFramework, Opened
from slimkit.core.jobs.options import CompareOptions, EvaluateOptions
from slimkit.core.jobs.sources import ModelPlace, read_documents
from slimkit.core.lazy import library

if TYPE_CHECKING:
    from slimkit.core.run.recipe import Recipe

Array = np.ndarray[Any, Any]
# The figures of a model on held-out text, after each stage.
SHOWN = ("perplexity", "kl", "agreement")


def model_folder(recipe: Recipe, folder: Path) -> Path | None:
    """The Hugging Face folder that a recipe names as its model; None where a factory makes it."""
    named = recipe.model
    if not isinstance(named, str) or ":" in named:
        return None
    place = folder / named
    if not (place / "config.json").is_file():
        raise ConfigError(
            f"model: must be file.py:function, package.module:function or a Hugging Face folder (with config.json). "
            f"Received: {named!r}"
        )
    return place


def prepared(recipe: Recipe, folder: Path, face: JobFramework, data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with what its text adds: calibration windows, held-out documents, an example of a folder's model.

    Args:
        recipe, folder: of the run.
        face: the framework.
        data: what the data factory returned; empty where there is none.

    Raises:
        ConfigError: text without a tokenizer, no such file, or calibration and held-out text are mixed.
    """
    found = dict(data)
    place = model_folder(recipe, folder)
    if place is not None and "example" not in found:
        found["example"] = face.own_example(face.open(ModelPlace(place)), 64, recipe.seed)
    record = None
    if recipe.calibrate is not None:
        if "calibration" in found:
            raise ConfigError("calibrate: the data factory returns calibration batches as well; give one of them")
        asked = recipe.calibrate
        files = [str(folder / name) for name in asked.files]
        wanted = weighted(
            files, asked.text_key, asked.samples, asked.length, asked.batch_size, recipe.seed, "calibrate"
        )
        assert wanted is not None
        found["calibration"] = text_set(_reader(recipe, folder, face, "calibrate"), wanted, _no_own_text)
        record = found["calibration"].record
    if recipe.evaluate is not None:
        found["held_out"] = _held_out(recipe, folder, face, recipe.evaluate, found)
        if record is not None:
            try:
                refuse_seen(record, found["held_out"], "evaluate")
            except ArgumentError as error:
                raise ConfigError(str(error)) from None
    return found


def _no_own_text(n: int, length: int, start: int | None) -> Sequence[Any]:
    raise ConfigError("calibrate.text: self is for commands; name the file that own_text wrote")


def _reader(recipe: Recipe, folder: Path, face: JobFramework, key: str) -> TextReader:
    place = model_folder(recipe, folder)
    if place is not None and recipe.tokenizer is None:
        return face.reader(Opened(None, ModelPlace(place), place))
    if recipe.tokenizer is None:
        raise ConfigError(f"{key}.text: needs tokenizer: FOLDER, where a factory makes the model")
    try:
        tokenizer = library("transformers", "hf").AutoTokenizer.from_pretrained(str(folder / recipe.tokenizer))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"tokenizer: {recipe.tokenizer!r} holds none that can be read: {reason}") from None

    def make(ids: Array, mask: Array) -> Any:
        return face.tensors({"input_ids": ids, "attention_mask": mask})

    causal = getattr(tokenizer, "cls_token_id", None) is None
    return TextReader(tokenizer, int(min(tokenizer.model_max_length, 1 << 30)), causal, make)


def tokenizer_of(recipe: Recipe, folder: Path, face: JobFramework, key: str) -> Any:
    """The tokenizer that a recipe names, or that lies beside its model; ConfigError where there is none.

    Args:
        recipe: the recipe.
        folder: its folder.
        face: the framework.
        key: what wants it, for messages.
    """
    return _reader(recipe, folder, face, key).tokenizer


def _held_out(
    recipe: Recipe, folder: Path, face: JobFramework, asked: EvaluateOptions, data: Mapping[str, Any]
) -> list[Array]:
    """The held-out documents as rows of token numbers."""
    if asked.data is not None:
        if asked.data not in data:
            raise ConfigError(f"evaluate.data: the data has no key {asked.data!r}. Its keys: {sorted(data)}")
        documents, tokenizer = list(data[asked.data]), None
    else:
        assert asked.text is not None
        documents = read_documents(folder / asked.text, asked.text_key)
        tokenizer = tokenizer_of(recipe, folder, face, "evaluate")
    # From all over the file; the same ones whatever the recipe's seed.
    chosen = sorted(np.random.default_rng(0).permutation(len(documents))[: asked.documents].tolist())
    encode = Encoder(tokenizer, special=False)
    most = None if asked.windows is None else asked.windows * (asked.length - asked.bos)
    return [encode(documents[at], f"evaluate: document {at}")[:most] for at in chosen]


class Evaluation:
    """Held-out text that a recipe's stages are judged on; the dense model runs over it once.

    Args:
        framework: of the models.
        documents: rows of token numbers.
        options: how they are cut.
        tokenizer: for the beginning-of-sequence token.
    """

    def __init__(
        self, framework: CompareFramework, documents: Sequence[Array], options: EvaluateOptions, tokenizer: Any = None
    ) -> None:
        self.documents = list(documents)
        self._framework, self._tokenizer = framework, tokenizer
        self._options = JudgeOptions(length=options.length, bos=options.bos, speed=False)
        self._dense: LanguageJudge | None = None
        self._stages = 0

    def figures(self, model: Any, dense: Callable[[], Any] | None) -> dict[str, float]:
        """Figures of a model; `dense` makes the one that it is compared with, None before there is one."""
        if dense is None:
            job = self._judged(model)
            name = DENSE
        else:
            self._dense = job = self._dense or self._judged(dense())
            self._stages += 1
            name = f"stage {self._stages}"
            with self._framework.evaluating(model):
                job.run(name, model)
        found, _ = job.result(name, draws(job.n_documents, 0, n=2))
        return {key: value for key in SHOWN if (value := found.get(key)) is not None}

    def _judged(self, model: Any) -> LanguageJudge:
        job = LanguageJudge(self._framework, self.documents, self._options, TOP_K, self._tokenizer)
        with self._framework.evaluating(model):
            job.run(DENSE, model)
        return job


def evaluation(recipe: Recipe, folder: Path, face: JobFramework, data: Mapping[str, Any]) -> Evaluation | None:
    """What judges the stages of a recipe; None where it names no held-out text."""
    if recipe.evaluate is None:
        return None
    tokenizer = None
    if recipe.evaluate.bos:
        tokenizer = tokenizer_of(recipe, folder, face, "evaluate")
    return Evaluation(face.judging(), data["held_out"], recipe.evaluate, tokenizer)


def compared(
    face: JobFramework,
    dense: Callable[[], Any],
    candidates: Mapping[str, Any],
    options: CompareOptions,
    recipe: Recipe,
    data: Mapping[str, Any],
    key: str,
    seed: int,
) -> Comparison:
    """The models of a run, judged against the dense one.

    Args:
        face: the framework.
        dense: makes the dense model.
        candidates: name -> model, or a function that makes it.
        options: of the stage.
        recipe, data: of the run.
        key: the stage's place in the recipe, for messages.
        seed: of the bootstrap.
    """
    if "held_out" not in data:
        raise ConfigError(
            f"{key}: needs held-out data: evaluate: {{text: FILE}} for a language model, or the key held_out of the "
            "data factory (batches, for a classifier (batch, labels) pairs)"
        )
    built = replace(options.build(), seed=seed)
    if options.task == "language" and recipe.evaluate is not None:
        for name in ("length", "bos"):
            if name in options.changed() and getattr(options, name) != getattr(recipe.evaluate, name):
                raise ConfigError(f"{key}.{name}: differs from evaluate.{name}; say it there")
        built = replace(built, length=recipe.evaluate.length, bos=recipe.evaluate.bos)
    return judge(face.judging(), dense, candidates, data["held_out"], built, None, named_metrics(options.metrics))
