"""What the jobs ask of PyTorch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import slimkit
from slimkit import bridge, compare, export, latency, loading, pruned_folder, together, train
from slimkit.core import files
from slimkit.core.calibration.reading import TextReader
from slimkit.core.calibration.record import record_of, write_record
from slimkit.core.checkpoint import shards
from slimkit.core.errors import ConfigError, SlimkitError, UnsupportedError
from slimkit.core.jobs import calibrating, cards, claim, commands, crew, folders
from slimkit.core.jobs.bar import LayerBar
from slimkit.core.jobs.framework import ComputeLoss, JobFramework, Lesson, Opened, Task
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.jobs.options import DistillOptions, FitOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace
from slimkit.core.jobs.tasks import TASKS
from slimkit.core.locks import BLOCKS, locked
from slimkit.core.log import logger
from slimkit.core.prune.onnx_times import OnnxTimes
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.processes import first
from slimkit.jobs import devices, models, sharing, teach, texts
from slimkit.measurement import measure_model
from slimkit.sharded import at_rest
from slimkit.shared_training import one_by_one
from slimkit.sparse.checkpoint_framework import CheckpointSparse
from slimkit.sparse.framework import TorchSparse
from slimkit.stored import digest_of
from slimkit.trace.examples import find_example

import torch
from torch import nn


class TorchJobs(JobFramework):
    """PyTorch's side of the jobs: modules, Hugging Face directories, weight files, factories."""

    slim = slimkit
    formats = ("onnx", "w16a16s", "w8a8s", "hf")
    class_dtype = "int64"
    losses: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {
        "cross_entropy": nn.functional.cross_entropy,
        "mse": nn.functional.mse_loss,
    }

    def __init__(self, device: str | None = None) -> None:
        self.device = devices.choose_device(device)

    # Random numbers and versions.

    def seed_framework(self, seed: int) -> None:
        torch.manual_seed(seed)

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        # Without disturbing anybody else's draws: a command may be called from a program.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield

    def framework_versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    # A model in memory.

    def check_model(self, model: Any) -> nn.Module:
        return bridge.check_model(model, "model")

    def measure(self, model: nn.Module, inputs: Any, dense: nn.Module | None = None) -> Measurement:
        return measure_model(model, bridge.to_device(inputs, bridge.device_of(model)), dense=dense)

    def latency_times(self, model: nn.Module, inputs: Any) -> OnnxTimes:
        return latency.onnx_times(bridge.to_device(inputs, bridge.device_of(model)))

    def states(self, model: nn.Module) -> Iterator[tuple[str, str, np.ndarray]]:
        for name, tensor in model.state_dict().items():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield name, f"{tensor.dtype}{tuple(tensor.shape)}", raw

    def sizes(self, model: nn.Module) -> list[tuple[int, bool]]:
        return [(p.numel(), p.requires_grad) for p in model.parameters()]

    def snapshot(self, model: nn.Module) -> Callable[[nn.Module], Any]:
        kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return lambda fresh: fresh.load_state_dict(kept)

    def record_zeros(self, model: nn.Module, names: Iterable[str]) -> None:
        bridge.record_zeros_of(model, names)

    def made_zeros(self, model: nn.Module) -> bool:
        return any(bridge.has_made_zeros(part) for part in model.modules())

    def call(self, model: nn.Module, inputs: Any) -> Any:
        return bridge.run(model, inputs)

    def outputs(self, model: nn.Module, inputs: Any) -> list[np.ndarray]:
        with bridge.evaluating(model):
            found = export.named_tensors(bridge.run(model, inputs))
        # NumPy has no bfloat16, and float32 holds its every number.
        plain = (t.float() if t.dtype == torch.bfloat16 else t for _, t in found)
        return [tensor.detach().cpu().numpy() for tensor in plain]

    def inside(self, model: nn.Module, inputs: Any, paths: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        modules = {path: bridge.get_module(model, path) for path in paths}
        with bridge.evaluating(model), bridge.hooked(modules, lambda path, _args, _more, it: found.update({path: it})):
            return {"": bridge.run(model, inputs), **found}

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        return list(export.example_arrays(inputs).values())

    def evaluating(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return bridge.evaluating(model)

    def sparse_layers(self, model: nn.Module) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        return TorchSparse(model).layers()

    # Training.

    def train(
        self,
        model: nn.Module,
        samples: Any,
        options: FitOptions,
        loss: ComputeLoss,
        callbacks: list[Any],
        how: Mapping[str, Any],
        tokens: Callable[[Any], float] | None = None,
    ) -> train.Trainer:
        at_rest(model)
        wanted = [p for p in model.parameters() if p.requires_grad]
        how_fast: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        how_fast["foreach"] = one_by_one(wanted)
        if options.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(wanted, momentum=0.9, **how_fast)
        else:
            optimizer = torch.optim.AdamW(wanted, **how_fast)
        device = bridge.device_of(model)
        trainer = train.Trainer(model, optimizer=optimizer, compute_loss=loss, callbacks=callbacks, count_tokens=tokens)
        trainer.train(loading.in_pieces(samples, together.processes()), **how)
        model.to(device)  # accelerate may have put it elsewhere
        return trainer

    @contextlib.contextmanager
    def statistics_held(self, model: nn.Module) -> Iterator[None]:
        modes = {module: module.training for module in model.modules()}
        model.train()
        for module in modes:
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def soft_loss(self, dual: nn.Module, inputs: Any) -> torch.Tensor:
        return bridge.run(dual, inputs)[0]

    # Several processes of one command.

    def join(self) -> None:
        self.device = together.join(self.device)

    def once(self, work: Callable[[], Any]) -> Any:
        def alone() -> Any:
            with together.alone():
                return work()

        return first(together, alone)

    def each(self, value: Any) -> list[Any]:
        return together.gather(value)

    def agree(self, what: str, batches: Sequence[Any]) -> None:
        found = self.each(digest_of(batches)) if crew.size() > 1 else []
        if len(set(found)) > 1:
            raise ConfigError(f"{what} must be the same in every process: seed what draws it by itself")

    def share(self, opened: Opened) -> None:
        if together.processes() > 1:
            opened.shared = sharing.SharedOut(opened.model)

    def gather(self, opened: Opened) -> None:
        if opened.shared is not None:
            opened.model, opened.shared = opened.shared.whole(), None

    # What a command line names, and what it writes.

    def open(self, place: ModelPlace, delta: Path | None = None) -> Opened:
        report = None if delta is None else delta / "adapt_report.json"
        if report is None or not report.exists() or place.factory is not None:
            opened = models.open_model(place)
        else:
            # The report of `slimkit adapt` says which head the delta was trained with, and the delta holds its values.
            told = files.read_json(report)
            head = teach.head(told.get("labels") or {})
            opened = models.open_model(place, kind=TASKS.get(told.get("task")), fresh=teach.HEADS, **head)
        if opened.directory is not None:
            bridge.record_zeros_of(opened.model, folders.made_sparse(opened.directory))
        if delta is not None:
            self.slim.load_delta(opened.model, delta)
        opened.model.to(self.device)
        return opened

    def reloaded(self, opened: Opened, folder: Path, inputs: Any) -> float | None:
        gap, scale = models.reloaded(opened, folder, lambda model: self.outputs(model.to(self.device), inputs))
        if not gap <= 1e-5 * max(1.0, scale):
            raise UnsupportedError(
                f"the folder loads with from_pretrained, but its outputs differ by {gap:.3g}: the model derives "
                "numbers from its configuration that the cut one holds otherwise; --form any is for slimkit's loaders"
            )
        return gap

    def from_config(self, folder: Path, arrays: Mapping[str, Any]) -> Any:
        return models.from_config(folder, arrays)

    def tensors(self, arrays: Any) -> Any:
        return bridge.to_device(models.tensors(arrays), self.device)

    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        if not opened.is_hf:
            return bridge.to_device(find_example(opened.model)[0].inputs, self.device)
        return bridge.to_device(models.own_example(opened.model, length, seed), self.device)

    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        if not opened.is_hf or opened.directory is None:
            raise ConfigError(
                "--calib: text needs the tokenizer of a Hugging Face directory; give arrays or a function"
            )
        return _text(opened.directory, type(opened.model), opened.model.config, place)

    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in export.example_arrays(inputs).items()}

    def write_model(self, opened: Opened, folder: Path) -> str:
        return models.write_model(opened, folder)

    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        if format == "w16a16s":
            return self.slim.save_w16a16s(out, opened.model, opened.place.model).to_dict()
        if format == "w8a8s":
            return self.slim.save_w8a8s(out, opened.model, inputs, opened.place.model, **settings).to_dict()
        return export.export_onnx(opened.model, inputs, out, **settings).to_dict()

    def judging(self) -> compare.TorchCompare:
        return compare.TorchCompare()

    def tokenizer(self, opened: Opened) -> Any:
        if opened.directory is None:
            return super().tokenizer(opened)
        return texts.tokenizer(opened.directory)

    # Text, and folders block by block.

    def reader(self, opened: Opened) -> TextReader:
        if not opened.is_hf or opened.directory is None:
            return super().reader(opened)
        if opened.model is None:
            config, kind = models.architecture(opened.directory)
            return texts.reader(opened.directory, kind, config, self.device)
        return texts.reader(opened.directory, type(opened.model), opened.model.config, self.device)

    def learns_text(self, place: ModelPlace, data: DataPlace) -> bool:
        return place.factory is None and place.model is not None and place.model.is_dir() and data.kind == "text"

    def lesson(
        self, place: ModelPlace, data: DataPlace, options: DistillOptions, student: StudentPlace, seed: int
    ) -> Lesson:
        return teach.lesson(self, place, data, options, student, seed)

    def task(
        self, place: ModelPlace, data: DataPlace, held: DataPlace | None, asked: str, options: FitOptions, seed: int
    ) -> Task:
        found = teach.task(self, place, data, held, asked, options, seed)
        found.opened.model.to(self.device)
        return found

    def folder_pruner(self, place: ModelPlace, out: Path, calib: DataPlace | None) -> tuple[Any, Any]:
        assert place.model is not None
        if self.device.type != "cpu":
            raise UnsupportedError("--stream prunes on the CPU: leave --device out, or give --whole")
        return pruned_folder.folder_pruner(place.model), self._calibration(place, place.model, out, calib)

    def sparsify_blocks(
        self,
        place: ModelPlace,
        out: Path,
        cfg: SparseConfig,
        calib: DataPlace | None,
        command: str,
        *,
        restart: bool,
        plan: bool,
    ) -> dict[str, Any] | None:
        source = place.model
        stored = source is not None and (source / "config.json").exists() and any(source.glob("*.safetensors"))
        if not stored and crew.size() > 1:
            raise ConfigError("--model: several processes need a Hugging Face directory with .safetensors weights")
        self.device = together.join(self.device)

        def place_of() -> tuple[bool, str]:
            # What the folder holds stays until the new model is whole.
            filled = out.is_dir() and any(entry.name != BLOCKS for entry in out.iterdir())
            stopped = (out / BLOCKS / "job.json").exists()  # finished files may lie beside it
            work = out / folders.FORCED if filled and not stopped else out
            if restart and not plan and (work / BLOCKS).is_dir():
                with locked(work / BLOCKS, "--out", inside=True):  # a Python program may be at work there
                    shutil.rmtree(work)
            return stopped, str(work)

        stopped, where = first(together, place_of)
        work = Path(where)
        if place.factory is not None or source is None or not stored:
            return None
        read: list[Any] = []

        def reading() -> None:
            read.append(commands.needed(self._calibration(place, source, out, calib), cfg))

        first(together, reading)  # it may write text of the model's own, which the others then find
        if not read:
            reading()
        data = read[0]
        try:
            return self._walked(source, out, work, cfg, data, None if plan else command)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            wrong = isinstance(error, SlimkitError) and not isinstance(error, UnsupportedError)
            if wrong or stopped or crew.size() > 1 or any((work / BLOCKS).glob("block-*.json")):
                raise
            reason = " ".join(str(error).split())[:200]
            logger.warning("no walk block by block (%s); the whole model is held in memory", reason)
            shutil.rmtree(work / BLOCKS, ignore_errors=True)
            return None

    def _walked(
        self, source: Path, out: Path, work: Path, cfg: SparseConfig, data: Any, command: str | None
    ) -> dict[str, Any]:
        if command is None:
            found = CheckpointSparse(source, work / BLOCKS, shards.locate(source), None).layers()
            done = len(list((work / BLOCKS).glob("block-*.json")))
            return {**commands.sparse_plan(*found, cfg, data), "blocks_done": done, "resumable": True}
        with LayerBar() if crew.rank() == 0 else contextlib.nullcontext() as bar:
            report = self.slim.sparsify_checkpoint(source, work, cfg, data, device=self.device, on_progress=bar)
        if crew.rank() > 0:
            return {**report, "written": "transformers", "resumable": True}
        write_record(work, "sparsify", record_of(data), source)
        kind = models.architecture(source)[1].__name__
        rows = cards.sparse_facts(report)
        cards.write_card_of(work, "sparse", source, kind, command, rows, "transformers")
        claim.finish(work / BLOCKS)
        if work != out:
            files.replace(work, out)
        return {**report, "written": "transformers", "resumable": True}

    def _calibration(self, place: ModelPlace, source: Path, out: Path, calib: DataPlace | None) -> Any:
        """Calibration batches without the model, which is in memory whole only while it writes text itself."""
        if calib is None or calib.kind in ("arrays", "function"):
            return calibrating.calibration_of(self, Opened(None, ModelPlace(source)), calib)
        config, kind = models.architecture(source)
        return calibrating.text_set(
            texts.reader(source, kind, config, self.device),
            calib,
            lambda n, length, start: calibrating.written(self, self.open(place), calib, out, n, length, start),
        )


def _text(directory: Path, kind: type, config: Any, place: DataPlace) -> list[Any]:
    lines = [row["text"] for row in place.rows()]
    return texts.Reader(directory, kind, config, place.max_length).batches(lines, place.batch_size)
