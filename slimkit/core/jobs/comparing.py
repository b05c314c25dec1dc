"""`slimkit compare`: models as the command line names them, judged on one text or data file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimkit.core.calibration.record import read_record
from slimkit.core.compare import DENSE
from slimkit.core.compare.comparison import Comparison, ModelResult
from slimkit.core.compare.judge import judge, named_metrics, names_of
from slimkit.core.compare.onnxruns import is_onnx
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import sources
from slimkit.core.jobs.framework import JobFramework
from slimkit.core.jobs.options import CompareOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace

# Files that hold weights; a folder's other files are not counted.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class JudgedModel:
    """A model that `compare` is given.

    Args:
        text: as it was written: FOLDER, FOLDER+DELTA, FILE.onnx, MODULE:FUNCTION or MODULE:FUNCTION=WEIGHTS.
        place: the model.
        delta: the folder of a delta to put on first.
    """

    text: str
    place: ModelPlace
    delta: Path | None = None

    @classmethod
    def parse(cls, text: str) -> JudgedModel:
        """Read one argument of the command.

        Raises:
            ConfigError, FileFormatError: it names no model.
        """
        if Path(text).exists():
            return cls(text, ModelPlace(Path(text)))
        base, plus, delta = text.partition("+")
        if plus and Path(base).exists():
            if not Path(delta).is_dir():
                raise ConfigError(f"{text!r}: there is no delta folder {delta!r}")
            return cls(text, ModelPlace(Path(base)), Path(delta))
        factory, equals, weights = text.partition("=")
        if ":" in factory:
            return cls(text, ModelPlace(Path(weights) if equals else None, factory))
        raise ConfigError(
            "a model must be a folder, FOLDER+DELTA, FILE.onnx, MODULE:FUNCTION or MODULE:FUNCTION=WEIGHTS. "
            f"Received: {text!r}, which does not exist"
        )

    def on_disk(self) -> float | None:
        """Bytes of the weight files; None for a factory's fresh network and for ONNX files, which tell their own."""
        if is_onnx(self.place.model):
            return None
        places = [p for p in (self.place.model, self.delta) if p is not None]
        files = [f for p in places for f in ([p] if p.is_file() else sorted(p.iterdir()))]
        return float(sum(f.stat().st_size for f in files if f.suffix in WEIGHTS)) if places else None

    def calibrations(self) -> list[tuple[str, dict[str, Any]]]:
        """What the model's folders say that it was calibrated on, each with the name of the model."""
        folders = [p for p in (self.place.model, self.delta) if p is not None and p.is_dir()]
        return [(self.text, record) for folder in folders for record in read_record(folder)]

    def opener(self, face: JobFramework) -> Callable[[], Any] | str:
        """A function that opens the model whenever it is called; of an ONNX file its path."""
        return str(self.place.model) if is_onnx(self.place.model) else lambda: face.open(self.place, self.delta).model


def compare(
    face: JobFramework,
    dense: str,
    candidates: Sequence[str],
    options: CompareOptions,
    *,
    text: DataPlace | None,
    data: str | None,
    seed: int,
) -> Comparison:
    """Judge models against a dense one.

    Args:
        face: the framework.
        dense, candidates: as the command line names them; see `JudgedModel`.
        options: of the job.
        text: held-out texts, read with the dense model's tokenizer.
        data: ``module:function`` that returns the dataset of `compare_models`.
        seed: of the bootstrap.

    Raises:
        ConfigError: neither or both of `text` and `data` are given, or a model cannot be opened.
    """
    if (text is None) == (data is None):
        raise ConfigError("give held-out data: --text FILE, or --data MODULE:FUNCTION, and not both")
    models = [JudgedModel.parse(one) for one in (dense, *candidates)]
    names = [DENSE, *names_of([m.text for m in models[1:]])]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name: {names[1:]}")
    metrics = named_metrics({name: sources.found(name, "--metric") for name in options.metrics or ()})
    dataset, tokenizer = _dataset(face, models[0], options, text, data)
    openers: dict[str, Any] = {name: model.opener(face) for name, model in zip(names, models)}
    found = judge(
        face.judging(),
        openers.pop(DENSE),
        openers,
        dataset,
        replace(options.build(), seed=seed),
        tokenizer,
        metrics,
        [known for model in models for known in model.calibrations()],
    )
    # What is compared is what is shipped: the files, not the memory that they take.
    results = [_with_bytes(result, model.on_disk()) for result, model in zip(found.results, models)]
    return replace(found, results=tuple(results))


def _dataset(
    face: JobFramework, dense: JudgedModel, options: CompareOptions, text: DataPlace | None, data: str | None
) -> tuple[Any, Any]:
    if data is not None:
        return sources.found(data, "--data")(), None
    assert text is not None
    if options.task == "classifier":
        raise ConfigError("--task classifier needs --data MODULE:FUNCTION, which returns (batch, labels) pairs")
    if is_onnx(dense.place.model):
        raise ConfigError("--text needs the tokenizer of a folder: give the dense model as a folder, or --data")
    opened = face.open(dense.place, dense.delta)  # for its tokenizer alone: it is let go before the judging begins
    if options.task == "language":
        return [row["text"] for row in text.rows()], face.tokenizer(opened)
    return face.text(opened, text), None


def _with_bytes(result: ModelResult, n_bytes: float | None) -> ModelResult:
    return result if n_bytes is None else replace(result, figures={**result.figures, "bytes": n_bytes})
