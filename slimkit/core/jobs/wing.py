"""The single commands, alike in both frameworks: a model named on the command line in, files or figures out."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs import data as sources
from slimkit.core.jobs import folders, networks
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.jobs.training import AdaptAims, DistillAims, TrainingPlan
from slimkit.core.run.measurement import Measurement
from slimkit.core.run.stages import Stages
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.select import select


@dataclass
class Opened:
    """A model and where it came from.

    Args:
        model: in eval mode.
        place: what the user named.
        directory: the folder with its configuration and tokenizer, where it has one.
        desc: the plan that pruned it, where its folder says so.
        fresh: parameters that the files lack and that were drawn at random, as the command allowed.
    """

    model: Any
    place: ModelPlace
    directory: Path | None = None
    desc: dict[str, Any] | None = None
    fresh: tuple[str, ...] = ()

    @property
    def is_hf(self) -> bool:
        """Whether transformers made the model."""
        return self.place.factory is None


class Jobs(ABC):
    """A framework's side of the commands, but for what it alone knows."""

    # The package whose public names do the work.
    slim: Any
    # What `write` can write.
    formats: tuple[str, ...]
    # The framework's answers to recipes, many of which the commands ask for as well.
    stages: Stages
    # The type that the framework's cross entropy wants classes in.
    class_dtype: str

    # What a wing adds.

    @abstractmethod
    def open(self, place: ModelPlace, delta: Path | None = None) -> Opened:
        """Open the model, in eval mode, with a saved delta on it where one is given.

        Raises:
            ConfigError, FileFormatError: it cannot be opened, or the delta belongs to another one.
        """

    @abstractmethod
    def tensors(self, arrays: Any) -> Any:
        """NumPy arrays, alone or in a dict, as the framework's tensors."""

    @abstractmethod
    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        """An input that the model itself describes; None where it does not."""

    @abstractmethod
    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        """A text file as batches; ConfigError where the model has no tokenizer."""

    @abstractmethod
    def write_model(self, opened: Opened, folder: Path) -> str:
        """Write a model into an empty folder; "transformers", "slimkit" or "weights" says what reads it."""

    @abstractmethod
    def parameters(self, model: Any) -> int:
        """Numbers in all parameters, shared ones once."""

    @abstractmethod
    def layers(self, model: Any) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """The layers that can be sparse, and those that cannot with the reason."""

    @abstractmethod
    def figures(self, model: Any, inputs: Any) -> Measurement:
        """What a model weighs on one input."""

    @abstractmethod
    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write one file or folder of a format, proven where the format can be run."""

    @abstractmethod
    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        """The shapes of an example's tensors, by the names an exported file gives them."""

    @abstractmethod
    def seeded(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Draw the same values whenever the same command is given."""

    @abstractmethod
    def evaluating(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Eval mode without gradients, for a while."""

    @abstractmethod
    def train(
        self,
        model: Any,
        samples: Any,
        plan: TrainingPlan,
        loss: Callable[[Any, Any], Any],
        callbacks: list[Any],
        how: Mapping[str, Any],
    ) -> Any:
        """Train what wants a gradient with AdamW, in place; `how` is for `Trainer.train`; returns the trainer."""

    # The commands.

    def distill(
        self, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: DistillAims
    ) -> dict[str, Any]:
        """Train a student to answer like its teacher; with `out` None only say what would be done."""
        return networks.distill(self, place, data, out, plan, aims)

    def adapt(
        self, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: AdaptAims
    ) -> dict[str, Any]:
        """Train a delta on a frozen model and save it; with `out` None only say what would be done."""
        return networks.adapt(self, place, data, out, plan, aims)

    def prune(
        self,
        place: ModelPlace,
        out: Path | None,
        *,
        ratio: float,
        align: int,
        importance: str,
        budget: str,
        allocation: str,
        node_ratio: float,
        keep: Sequence[str] | None,
        example: str | None,
        calib: DataPlace | None,
        compensate: bool,
        seed: int,
    ) -> dict[str, Any]:
        """Prune a model's structure; with `out` None only plan it.

        Args:
            place: the model.
            out: folder of the pruned model; None leaves everything as it is.
            ratio: share of the parameters (or multiplications) to keep.
            align, importance, budget, allocation, node_ratio: settings of `Pruner`.
            keep: layers left whole, by number or name; None: the first and the last.
            example: one input: a shape, a file of arrays or a function; None: one that the model describes.
            calib: data for data-driven importances and for `compensate`.
            compensate: refit what remains on the calibration data.
            seed: of made-up examples and of random importance.

        Returns:
            parameters_before, parameters, kept, report, and with `out` written.
        """
        opened = self.open(place)
        if opened.desc is not None:
            raise ConfigError("--model is a pruned model already; prune the original to the ratio wanted")
        batches = self.batches(opened, calib)
        if compensate and batches is None:
            raise ConfigError("--compensate needs --calib DATA")
        before = self.parameters(opened.model)
        pruner = (
            self.slim.Pruner(opened.model, self.example(opened, example, seed=seed))
            .set_importance_evaluation_function(importance, calibration=batches, seed=seed)
            .set_node_reserved_ratio(node_ratio)
            .set_alignment(align)
            .set_budget(budget)
            .set_allocation(allocation)
        )
        if compensate:
            pruner.set_compensation(batches)
        whole = None if keep is None else [int(k) if k.lstrip("-").isdigit() else k for k in keep]
        if out is None:
            left, _ = pruner.analysis(ratio, whole)
            return {"parameters_before": before, "parameters": left, "kept": left / before, "report": pruner.report()}
        opened.desc = pruner.prune(ratio, whole)
        left = self.parameters(opened.model)
        facts = {"parameters_before": before, "parameters": left, "kept": left / before, "report": pruner.report()}
        with files.atomic_directory(out) as folder:
            facts["written"] = self.write_model(opened, folder)
            folders.write_report(folder, "prune", {"asked": ratio, **facts})
        return facts

    def sparsify(
        self, place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None, restart: bool
    ) -> dict[str, Any]:
        """Make a model sparse in memory, and write it.

        Args:
            place: the model.
            out: folder of the sparse model.
            cfg: what to do.
            calib: calibration data; "magnitude" needs none.
            restart: throw an unfinished run away, where a wing leaves one.

        Returns:
            The report of the sparsity room, with "written" and "resumable".
        """
        folders.unused(out)
        opened = self.open(place)
        report = self.slim.Compressor(opened.model, cfg).compress(self.needed(self.batches(opened, calib), cfg))
        with files.atomic_directory(out) as folder:
            written = self.write_model(opened, folder)
            files.write_json(folder / "sparse_report.json", report)
        return {**report, "written": written, "resumable": False}

    def plan_sparsify(
        self, place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None
    ) -> dict[str, Any]:
        """What `sparsify` would do: the layers, the zeros, the data; writes nothing."""
        folders.unused(out)
        opened = self.open(place)
        found = self.layers(opened.model)
        return sparse_plan(*found, cfg, self.needed(self.batches(opened, calib), cfg))

    def write(
        self,
        place: ModelPlace,
        out: Path | None,
        *,
        format: str,
        example: str | None,
        length: int,
        delta_folder: Path | None,
        seed: int,
        **settings: Any,
    ) -> dict[str, Any]:
        """Write a model for deployment; with `out` None only prepare.

        Args:
            place: the model.
            out: the file, or the folder of a format that is one.
            format: one of `formats`.
            example: one input, as in `prune`.
            length: tokens of a made-up text.
            delta_folder: a delta to put on and merge first; the model's files stay as they are.
            seed: of made-up inputs.
            settings: opset, dynamic_batch, dynamic, tolerance.

        Returns:
            What was written and how well it agrees, as plain values.

        Raises:
            UnsupportedError: the format belongs to the other framework.
        """
        if format not in self.formats:
            written = ", ".join(self.formats)
            raise UnsupportedError(
                f"--format {format} is not written here (choose from {written}): mindir is for --framework mindspore, "
                "w16a16s for Hugging Face directories"
            )
        opened = self.open(place, delta_folder)
        if delta_folder is not None:
            self.slim.merge_delta(opened.model, unload=True)
        facts: dict[str, Any] = {"format": format, "parameters": self.parameters(opened.model)}
        inputs = None
        if format != "w16a16s":
            inputs = self.example(opened, example, length=length, seed=seed)
            facts["shapes"] = self.input_shapes(inputs)
        return facts if out is None else {**facts, **self.export(opened, inputs, out, format, settings)}

    def measure(
        self, place: ModelPlace, *, example: str | None, length: int, delta_folder: Path | None, seed: int
    ) -> Measurement:
        """Parameters, zeros, MACs, trainable share and latency of a model on one input."""
        opened = self.open(place, delta_folder)
        return self.figures(opened.model, self.example(opened, example, length=length, seed=seed))

    # What they share.

    def example(self, opened: Opened, given: str | None, *, length: int = 16, seed: int = 0) -> Any:
        """One input: what the user gave (a shape, a file of arrays, a function), or one the model describes."""
        if given is None:
            own = self.own_example(opened, length, seed)
            if own is None:
                raise ConfigError(
                    "a model from a factory needs --example SHAPE (such as 1,3,224,224), a file, or a function"
                )
            return own
        if Path(given).exists():
            return self.tensors(sources.read_arrays(Path(given)))
        if ":" in given and not given.rpartition(":")[2].startswith(("float", "int", "bool")):
            made = sources.found(given, "--example")()
            return made["example"] if isinstance(made, dict) and "example" in made else made
        return self.tensors(sources.parse_example(given, seed))

    def batches(self, opened: Opened, place: DataPlace | None) -> list[Any] | None:
        """The calibration batches that were named, or None."""
        if place is None:
            return None
        if place.kind == "function":
            return place.made_batches("--calib")
        if place.kind == "arrays":
            return [self.tensors(batch) for batch in place.array_batches()]
        return self.text(opened, place)

    @staticmethod
    def needed(batches: list[Any] | None, cfg: SparseConfig) -> list[Any] | None:
        """Refuse to go on without data that the method reads."""
        if cfg.needs_data and not batches:
            raise ConfigError(f"--method {cfg.method} needs --calib DATA; only magnitude with equal ratios needs none")
        return batches


def sparse_plan(
    layers: Mapping[str, SparseLayer], skipped: Mapping[str, str], cfg: SparseConfig, batches: list[Any] | None
) -> dict[str, Any]:
    """What a sparsity run would do, as plain values."""
    left_out = dict(skipped)
    names, unmatched = select(layers, left_out, cfg)
    weights = sum(layers[n].size for n in names)
    return {
        "layers": names,
        "skipped": left_out,
        "unmatched": list(unmatched),
        "weights": weights,
        "zeros": round(weights * cfg.sparse_ratio),
        "batches": len(batches or ()),
        "blocks_done": 0,
        "resumable": False,
    }
