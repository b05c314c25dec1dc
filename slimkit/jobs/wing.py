"""What the single commands ask of PyTorch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import slimkit
from slimkit import bridge, export, train
from slimkit.core import files
from slimkit.core.checkpoint import shards
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.bar import LayerBar
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.jobs.training import TASKS, AdaptAims, DistillAims, TrainingPlan
from slimkit.core.jobs.wing import Jobs, Opened, sparse_plan
from slimkit.core.locks import locked
from slimkit.core.run.measurement import Measurement
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.jobs import devices, models, teach, texts
from slimkit.measurement import measure_model
from slimkit.sparse import checkpoint as blocks
from slimkit.sparse.checkpoint_framework import CheckpointSparse
from slimkit.sparse.framework import TorchSparse
from slimkit.stages import TorchWing

import torch
from torch import nn


class TorchJobs(Jobs):
    """PyTorch's side of the commands: Hugging Face directories, weight files, factories."""

    slim = slimkit
    formats = ("onnx", "w16a16s")
    class_dtype = "int64"

    def __init__(self, device: str | None = None) -> None:
        self.stages = TorchWing()
        self.device = devices.choose_device(device)

    def open(self, place: ModelPlace, delta: Path | None = None) -> Opened:
        report = None if delta is None else delta / "adapt_report.json"
        if report is None or not report.exists() or place.factory is not None:
            opened = models.open_model(place)
        else:
            # The report of `slimkit adapt` says which head the delta was trained with, and the delta holds its values.
            told = files.read_json(report)
            head = teach.head(told.get("labels") or {})
            opened = models.open_model(place, kind=TASKS.get(told.get("task")), fresh=teach.HEADS, **head)
        if delta is not None:
            self.slim.load_delta(opened.model, delta)
        opened.model.to(self.device)
        return opened

    def tensors(self, arrays: Any) -> Any:
        return bridge.to_device(models.tensors(arrays), self.device)

    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        if not opened.is_hf:
            return None
        return bridge.to_device(models.own_example(opened.model, length, seed), self.device)

    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        if not opened.is_hf or opened.directory is None:
            raise ConfigError(
                "--calib: text needs the tokenizer of a Hugging Face directory; give arrays or a function"
            )
        return _text(opened.directory, type(opened.model), opened.model.config, place)

    def write_model(self, opened: Opened, folder: Path) -> str:
        return models.write_model(opened, folder)

    def parameters(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    def layers(self, model: nn.Module) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        return TorchSparse(model).layers()

    def figures(self, model: nn.Module, inputs: Any) -> Measurement:
        return measure_model(model, bridge.to_device(inputs, bridge.device_of(model)))

    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in export.example_arrays(inputs).items()}

    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        if format == "w16a16s":
            if not opened.is_hf:
                raise ConfigError("--format w16a16s needs a Hugging Face directory, whose config.json goes along")
            return self.slim.save_w16a16s(out, opened.model, opened.directory).to_dict()
        return export.export_onnx(opened.model, inputs, out, **settings).to_dict()

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        # Without disturbing anybody else's draws: a command may be called from a program.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield

    def evaluating(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return bridge.evaluating(model)

    def train(
        self,
        model: nn.Module,
        samples: Any,
        plan: TrainingPlan,
        loss: Callable[[Any, Any], Any],
        callbacks: list[Any],
        how: Mapping[str, Any],
    ) -> train.Trainer:
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        trainer = train.Trainer(model, optimizer=optimizer, compute_loss=loss, callbacks=callbacks)
        trainer.train(samples, **how)
        model.to(self.device)  # accelerate may have put it elsewhere
        return trainer

    def distill(
        self, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: DistillAims
    ) -> dict[str, Any]:
        """As everywhere, but a Hugging Face teacher is cut into its student and learns from text."""
        if _reads_text(place, data):
            return teach.distill(self, place, data, out, plan, aims)
        return super().distill(place, data, out, plan, aims)

    def adapt(
        self, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: AdaptAims
    ) -> dict[str, Any]:
        """As everywhere, but a Hugging Face directory has a tokenizer and a task, and learns from text."""
        if _reads_text(place, data):
            return teach.adapt(self, place, data, out, plan, aims)
        return super().adapt(place, data, out, plan, aims)

    def sparsify(
        self, place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None, restart: bool
    ) -> dict[str, Any]:
        """As everywhere, but Hugging Face directories go block by block and resume."""
        if restart and (out / blocks.STATE).is_dir():
            with locked(out / blocks.STATE, "--out", inside=True):  # a Python program may be at work there
                shutil.rmtree(out)
        if not self._by_blocks(place, cfg):
            return super().sparsify(place, out, cfg, calib=calib, restart=restart)
        assert place.model is not None
        _resumable(out)
        data = self._block_data(place.model, cfg, calib)
        with LayerBar() as bar:
            report = self.slim.sparsify_checkpoint(place.model, out, cfg, data, on_progress=bar)
        return {**report, "written": "transformers", "resumable": True}

    def plan_sparsify(
        self, place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None
    ) -> dict[str, Any]:
        """As everywhere, with how much of a resumable run is done already."""
        if not self._by_blocks(place, cfg):
            return super().plan_sparsify(place, out, cfg, calib=calib)
        source = place.model
        assert source is not None
        _resumable(out)
        found = CheckpointSparse(source, out / blocks.STATE, shards.locate(source), None).layers()
        done = len(list((out / blocks.STATE).glob("block-*.json")))
        plan = sparse_plan(*found, cfg, self._block_data(source, cfg, calib))
        return {**plan, "blocks_done": done, "resumable": True}

    def _by_blocks(self, place: ModelPlace, cfg: SparseConfig) -> bool:
        """Whether a model is walked block by block: a plain Hugging Face directory, with equal ratios, on the CPU."""
        source = place.model
        if place.factory is not None or source is None or self.device.type != "cpu" or not cfg.uniform:
            return False
        return (source / "config.json").exists() and any(source.glob("*.safetensors"))

    def _block_data(self, source: Path, cfg: SparseConfig, calib: DataPlace | None) -> list[Any] | None:
        """Calibration batches without the model, which is never whole in memory."""
        if calib is None or calib.kind != "text":
            return self.needed(self.batches(Opened(None, ModelPlace(source)), calib), cfg)
        config, kind = models.architecture(source)
        return _text(source, kind, config, calib)


def _reads_text(place: ModelPlace, data: DataPlace) -> bool:
    return place.factory is None and place.model is not None and place.model.is_dir() and data.kind == "text"


def _text(directory: Path, kind: type, config: Any, place: DataPlace) -> list[Any]:
    lines = [row["text"] for row in place.rows()]
    return texts.Reader(directory, kind, config, place.max_length).batches(lines, place.batch_size)


def _resumable(out: Path) -> None:
    """A folder without a run of sparsify_checkpoint in it must be unused; one with a run is that function's care."""
    if not (out / blocks.STATE / "job.json").exists():
        folders.unused(out, state=blocks.STATE)
