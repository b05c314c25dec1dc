"""Judge models on held-out data: one pass a model, sums for each document, figures and intervals out of the sums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.calibration.record import keep_apart
from slimkit.core.compare import DENSE, TASKS, memory
from slimkit.core.compare.comparison import Comparison, ModelResult
from slimkit.core.compare.figures import FIGURES
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.compare.intervals import draws, figures_of
from slimkit.core.compare.onnxruns import BesideFiles, OnnxSource, is_onnx
from slimkit.core.compare.samples import SampleJudge
from slimkit.core.compare.scores import DenseAnswer, TokenScores, score
from slimkit.core.compare.speed import measure_speed
from slimkit.core.compare.windows import Protocol, Window, cut
from slimkit.core.errors import ArgumentError, ConfigError
from slimkit.core.jobs.factory import resolve
from slimkit.core.log import progress

Array = np.ndarray[Any, Any]
# The dense model's likeliest tokens that are kept where models are opened one after the other.
TOP_K = 256
# Tokens on which the work of one is counted.
WEIGHED = 32
# What is kept of the dense model for one window: log-probabilities, its likeliest tokens, the size of its vocabulary.
_Answer = tuple[DenseAnswer, Array, int]


@dataclass(frozen=True)
class JudgeOptions:
    """How models are compared.

    Args:
        task: "language" (next tokens), "encoder" (outputs) or "classifier" (outputs and labels).
        length: tokens a window of text.
        bos: whether each window begins with the beginning-of-sequence token.
        top_k: take the KL divergence over so many of the dense model's likeliest tokens and all others as one, which is
            never above the exact one, and hold one model at a time; None holds all and is exact; "auto" is exact where
            all are models already, and 256 where some are functions that make them.
        speed: measure prefill and decode speed.
        seed: of the bootstrap over documents.
    """

    task: str = "language"
    length: int = 512
    bos: bool = False
    top_k: int | str | None = "auto"
    speed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check.choice(self.task, TASKS, "task")
        check.integer(self.length, "length", 2)
        check.boolean(self.bos, "bos")
        check.boolean(self.speed, "speed")
        check.integer(self.seed, "seed", 0)
        if self.top_k is not None and self.top_k != "auto":
            check.integer(self.top_k, "top_k", 1)


def judge(
    framework: CompareFramework,
    dense: Any,
    candidates: Mapping[str, Any],
    dataset: Any,
    options: JudgeOptions,
    tokenizer: Any = None,
    metrics: Mapping[str, Callable[[Any, Any], float]] | None = None,
    calibrated: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Comparison:
    """Compare smaller models with a dense one.

    Args:
        framework: the framework the models live in.
        dense: a model, a function without arguments that makes one, or the path of an ONNX file.
        candidates: name -> model, function or path.
        dataset: documents for a language model, batches for an encoder, (batch, labels) pairs for a classifier.
        options: how.
        tokenizer: turns documents that are texts into tokens.
        metrics: name -> function of (model, dataset) that gives a number, beside the task's own figures.
        calibrated: (whose, record of a calibration set) of what models were fitted to, which must not judge them.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ArgumentError(f"candidates must be a mapping from names to models. Received: {candidates!r}")
    sources = {DENSE: dense, **{check.text(n, "a candidate's name"): c for n, c in candidates.items()}}
    sources = {name: OnnxSource(Path(s)) if is_onnx(s) else s for name, s in sources.items()}
    if any(isinstance(s, OnnxSource) for s in sources.values()):
        framework = BesideFiles(framework)
    if DENSE in candidates:
        raise ArgumentError(f"{DENSE!r} is the name of the model that the candidates are compared with")
    job: LanguageJudge | SampleJudge
    if options.task == "language":
        held = all(framework.held(source) for source in sources.values())
        keep = (0 if held else TOP_K) if options.top_k == "auto" else int(options.top_k or 0)
        job = LanguageJudge(framework, dataset, options, keep, tokenizer)
        if calibrated:
            job.data["calibrated on"] = keep_apart(calibrated, job.documents())
    else:
        job = SampleJudge(framework, dataset, options.task)
    figures: dict[str, dict[str, float | None]] = {}
    if isinstance(job, LanguageJudge) and job.keep == 0:
        models = {name: framework.open(source, name) for name, source in sources.items()}
        with ExitStack() as stack:
            for model in models.values():
                stack.enter_context(framework.evaluating(model))
            job.run_together(models)
        sources = models
    for name in list(sources):
        model, judged = framework.open(sources[name], name), job.done(name)
        if name == DENSE and isinstance(job, LanguageJudge):
            job.settle(model)
        with memory.Peak() as peak, framework.evaluating(model):
            if not judged:
                job.run(name, model)
            own = {n: float(f(model, dataset)) for n, f in (metrics or {}).items()}
            example, positions = job.weighed()
            weights = framework.figures(model, example)
        figures[name] = {
            **own,
            **weights,
            "macs": None if weights["macs"] is None else weights["macs"] / positions,
            "peak_bytes": None if judged else peak.n_bytes,
        }
        del model
    if options.speed:
        for name, found in measure_speed(framework, sources, job.example, job.positions, job.prompt).items():
            figures[name] |= found
    results = []
    counts = draws(job.n_documents, options.seed)
    for name in sources:
        found, intervals = job.result(name, counts)
        results.append(ModelResult(name, {**found, **figures[name]}, intervals))
    return Comparison(options.task, job.protocol, job.data, tuple(results), job.kl, options.seed)


def named_metrics(names: Iterable[str] | Mapping[str, Any] | None) -> dict[str, Callable[[Any, Any], float]]:
    """Metrics by "package.module:function", or functions under names of their own.

    Raises:
        ConfigError: a function cannot be found, or takes the name of a figure that there is.
    """
    if names is None:
        return {}
    given = names.items() if isinstance(names, Mapping) else [(n, n) for n in check.strings(names, "metrics")]
    found: dict[str, Callable[[Any, Any], float]] = {}
    for name, value in given:
        function = resolve(value, Path(), "metrics") if isinstance(value, str) else value
        check.function(function, f"metrics[{name!r}]")
        short = name.rpartition(":")[2]
        if short in FIGURES or short in found:
            raise ConfigError(f"metrics: {short!r} is the name of a figure that there is already")
        found[short] = function
    return found


@dataclass
class LanguageJudge:
    """Next tokens of held-out documents.

    Sums of each document, (documents, 6): tokens, loss, right tokens, bytes, KL, agreeing tokens.
    """

    framework: CompareFramework
    dataset: Any
    options: JudgeOptions
    keep: int
    tokenizer: Any = None
    windows: list[Window] = field(init=False)
    sums: dict[str, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        plan = Protocol(self.options.length, self.options.bos)
        self.windows = cut(self.dataset, plan, self.tokenizer)
        self.protocol = plan.sentence()
        self.kl = "exact" if self.keep == 0 else str(self.keep)
        numbers = {n: i for i, n in enumerate(dict.fromkeys(w.document for w in self.windows))}
        self._rows = [numbers[w.document] for w in self.windows]
        self.n_documents = len(numbers)
        longest = max(self.windows, key=lambda w: len(w.ids))
        self.prompt: Array | None = longest.ids
        self.example = self.framework.window(longest.ids)
        self.positions = len(longest.ids)
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(window.ids.tobytes() + b"|")
        self.data = {
            "documents": self.n_documents,
            "windows": len(self.windows),
            "predicted tokens": sum(len(w.ids) - 1 for w in self.windows),
            "sha256": digest.hexdigest(),
        }
        self._answers: list[_Answer] = []
        self._kl: dict[str, list[Array]] = {}

    def weighed(self) -> tuple[Any, int]:
        """What multiply-accumulates are counted on, and how many tokens it has: a few do, weights meet each alike."""
        assert self.prompt is not None
        few = self.prompt[:WEIGHED]
        return self.framework.window(few), len(few)

    def documents(self) -> list[Array]:
        """The tokens of each document."""
        parts: dict[int, list[Array]] = {}
        for window in self.windows:
            parts.setdefault(window.document, []).append(window.ids[int(self.options.bos) :])
        return [np.concatenate(ids) for ids in parts.values()]

    def done(self, name: str) -> bool:
        """Whether a model has been judged."""
        return name in self.sums

    def run(self, name: str, model: Any) -> None:
        """One pass of a model over every window; the dense model's answers are kept for those that follow."""
        for number, _ in enumerate(progress(self.windows, f"{name}: windows")):
            if name == DENSE:
                self._answers.append(self._judged(name, number, model, None))
            else:
                self._judged(name, number, model, self._answers[number])

    def run_together(self, models: Mapping[str, Any]) -> None:
        """All models window by window, so that the dense model's whole answer to one window is all that is kept."""
        for number, _ in enumerate(progress(self.windows, "windows")):
            answer = None
            for name, model in models.items():
                found = self._judged(name, number, model, answer)
                answer = found if name == DENSE else answer

    def _judged(self, name: str, number: int, model: Any, dense: _Answer | None) -> _Answer:
        row, window = self._rows[number], self.windows[number]
        logits, read = self.framework.logits(model, window.ids), self.framework.read(model, len(window.ids))
        expected = len(window.ids) if read == 1 else len(window.ids) - read
        if logits.ndim != 2 or len(logits) != expected:
            raise ArgumentError(
                f"{name} must give logits (1, {expected}, vocabulary) for {len(window.ids)} tokens. "
                f"Received, without the first axis: {logits.shape}"
            )
        ids = window.ids[read - 1 :]
        if dense is None:
            scores, answer = score(logits, ids, keep=self.keep)
            assert answer is not None
            found = (answer, scores.likeliest, logits.shape[-1])
        else:
            if dense[2] != logits.shape[-1]:
                raise ArgumentError(
                    f"{name} predicts {logits.shape[-1]} tokens and the dense model {dense[2]}: how far they are apart "
                    "is not defined"
                )
            if len(dense[1]) != len(ids) - 1:
                raise ArgumentError(f"{name} and the dense model must both have an encoder, or neither")
            scores, _ = score(logits, ids, dense[0])
            found = dense
            assert scores.kl is not None
            self._kl.setdefault(name, []).append(scores.kl)
        sums = self.sums.setdefault(name, np.zeros((self.n_documents, 6)))
        sums[row] += self._sums(window.n_bytes(read), scores, found[1])
        return found

    def _sums(self, known: int | None, scores: TokenScores, likeliest: Array) -> list[float]:
        kl = 0.0 if scores.kl is None else float(scores.kl.sum())
        n_bytes = float("nan") if known is None else float(known)
        agree = float((scores.likeliest == likeliest).sum())
        return [float(len(scores.loss)), float(scores.loss.sum()), float(scores.correct.sum()), n_bytes, kl, agree]

    def settle(self, model: Any) -> None:
        """Say how the dense model reads a window."""
        reads = [self.framework.read(model, len(w.ids)) for w in self.windows]
        self.data["predicted tokens"] = sum(len(w.ids) - read for w, read in zip(self.windows, reads))
        if any(read > 1 for read in reads):
            self.protocol += ", the encoder reads a window's first half and the decoder goes on"

    def result(self, name: str, counts: Array) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
        """Figures of a model, and intervals of their differences from the dense model's."""
        rules: dict[str, Callable[[Array], Array]] = {
            "perplexity": lambda s: np.exp(s[..., 1] / s[..., 0]),
            "accuracy": lambda s: s[..., 2] / s[..., 0],
        }
        if np.isfinite(self.sums[DENSE][:, 3]).all():
            rules["bits_per_byte"] = lambda s: s[..., 1] / s[..., 3] / np.log(2)
        if name != DENSE:
            rules["kl"] = lambda s: s[..., 4] / s[..., 0]
            rules["agreement"] = lambda s: s[..., 5] / s[..., 0]
        with np.errstate(over="ignore"):
            found, intervals = figures_of(rules, self.sums[name], self.sums[DENSE], counts, name != DENSE)
        if name != DENSE:
            found["kl_p99"] = float(np.quantile(np.concatenate(self._kl[name]), 0.99))
        return found, intervals


def names_of(sources: Sequence[str]) -> list[str]:
    """Short names of folders and files, told apart where their last parts are alike."""
    lasts = [s.rstrip("/").rpartition("/")[2] or s for s in sources]
    return [last if lasts.count(last) == 1 else source for last, source in zip(lasts, sources)]
