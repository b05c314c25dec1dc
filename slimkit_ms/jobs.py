"""MindSpore's side of the command line's single commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs import data as sources
from slimkit.core.jobs import folders
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.run.measurement import Measurement
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.compress import select
from slimkit_ms import bridge, checkpoint, delta, export, sparse
from slimkit_ms import prune as pruning
from slimkit_ms.measurement import measure_model
from slimkit_ms.sparse.host import MindSporeHost

import mindspore as ms
from mindspore import nn

# The file of a model without a plan; MindSpore's own format, which its tools read.
_WEIGHTS = "model.ckpt"


@dataclass
class Opened:
    """A cell, and the plan that pruned it where its folder has one."""

    model: nn.Cell
    desc: dict[str, Any] | None = None

    @property
    def parameters(self) -> int:
        """Numbers in all parameters that are weights."""
        return sum(p.size for p, paths in bridge.parameter_paths(self.model) if bridge.is_weight(p, paths[0]))


def open_model(place: ModelPlace) -> Opened:
    """Make the cell of a factory and load the weights named beside it, in eval mode.

    Raises:
        ConfigError: no factory, or one that gives no cell.
        FileFormatError: the weights are damaged or belong to another cell.
    """
    if place.factory is None:
        raise ConfigError(
            "--framework mindspore needs --factory MODULE:FUNCTION: a checkpoint does not say which cell it belongs "
            "to, and MindSpore cannot build models of transformers"
        )
    model = bridge.check_model(place.make(), "the model that --factory returns")
    bridge.rename_parameters(model)
    desc = None
    if place.model is not None and place.model.is_dir() and (place.model / folders.PLAN).exists():
        desc = files.read_json(place.model / folders.PLAN)
        pruning.load_pruned(place.model, model)
    elif place.model is not None:
        own = place.model / _WEIGHTS
        checkpoint.load_checkpoint(own if own.exists() else place.model, model, strict_load=True)
    model.set_train(False)
    return Opened(model, desc)


def prune(
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
    """Prune a cell's structure; with `out` None only plan it. Arguments and result are those of slimkit's."""
    opened = open_model(place)
    if opened.desc is not None:
        raise ConfigError("--model is a pruned model already; prune the original to the ratio wanted")
    batches = _batches(calib, "--calib")
    if compensate and batches is None:
        raise ConfigError("--compensate needs --calib DATA")
    before = opened.parameters
    pruner = (
        pruning.Pruner(opened.model, _example(example, seed))
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
    else:
        opened.desc = pruner.prune(ratio, whole)
        left = opened.parameters
    facts = {"parameters_before": before, "parameters": left, "kept": left / before, "report": pruner.report()}
    if out is not None:
        with files.atomic_directory(out) as folder:
            facts["written"] = _write(opened, folder)
            folders.write_report(folder, "prune", {"asked": ratio, **facts})
    return facts


def sparsify(
    place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None, restart: bool
) -> dict[str, Any]:
    """Make a cell sparse, in memory, and write it. Arguments and result are those of slimkit's."""
    folders.unused(out)
    opened = open_model(place)
    report = sparse.Compressor(opened.model, cfg).compress(_needed(calib, cfg))
    with files.atomic_directory(out) as folder:
        written = _write(opened, folder)
        files.write_json(folder / "sparse_report.json", report)
    return {**report, "written": written, "resumable": False}


def plan_sparsify(place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None) -> dict[str, Any]:
    """What `sparsify` would do; writes nothing."""
    folders.unused(out)
    layers, skipped = MindSporeHost(open_model(place).model).layers()
    names, unmatched = select(layers, skipped, cfg)
    weights = sum(layers[n].size for n in names)
    return {
        "layers": names,
        "skipped": skipped,
        "unmatched": list(unmatched),
        "weights": weights,
        "zeros": round(weights * cfg.sparse_ratio),
        "batches": len(_needed(calib, cfg) or ()),
        "blocks_done": 0,
        "resumable": False,
    }


def write(
    place: ModelPlace,
    out: Path | None,
    *,
    format: str,
    opset: int,
    example: str | None,
    length: int,
    dynamic_batch: bool,
    tolerance: float,
    delta_folder: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Write a cell as ONNX or MINDIR, proven against it; with `out` None only prepare. As slimkit's."""
    if format not in ("onnx", "mindir"):
        raise UnsupportedError(f"--format {format} is written from Hugging Face directories; here: onnx or mindir")
    opened = open_model(place)
    if delta_folder is not None:
        delta.load_delta(opened.model, delta_folder)
        delta.merge_delta(opened.model, unload=True)
    inputs = _example(example, seed)
    if inputs is None:
        raise ConfigError("give --example SHAPE (such as 1,3,224,224), a .npy or .npz file, or a function")
    given = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    shapes = {f"input_{at}": list(tensor.shape) for at, tensor in enumerate(given)}
    facts: dict[str, Any] = {"format": format, "parameters": opened.parameters, "shapes": shapes}
    if out is None:
        return facts
    if format == "mindir":
        return {**facts, **export.export_mindir(opened.model, tuple(given), out, tolerance=tolerance).to_dict()}
    report = export.export_onnx(
        opened.model, tuple(given), out, opset=opset, dynamic_batch=dynamic_batch, tolerance=tolerance
    )
    return {**facts, **report.to_dict()}


def measure(
    place: ModelPlace, *, example: str | None, length: int, delta_folder: Path | None, seed: int
) -> Measurement:
    """Parameters, zeros, MACs, trainable share and latency of a cell on one input. As slimkit's."""
    opened = open_model(place)
    if delta_folder is not None:
        delta.load_delta(opened.model, delta_folder)
    inputs = _example(example, seed)
    if inputs is None:
        raise ConfigError("--macs needs --example SHAPE (such as 1,3,224,224), a .npy or .npz file, or a function")
    return measure_model(opened.model, tuple(inputs.values()) if isinstance(inputs, dict) else inputs)


def _write(opened: Opened, folder: Path) -> str:
    if opened.desc is not None:
        pruning.save_pruned(folder, opened.model, opened.desc)
        return "slimkit"
    checkpoint.save_checkpoint(opened.model, folder / _WEIGHTS)
    return "weights"


def _tensors(value: Any) -> Any:
    """NumPy arrays as tensors; int64 stays what it is, float64 too."""
    if isinstance(value, dict):
        return {k: _tensors(v) for k, v in value.items()}
    return ms.Tensor(np.ascontiguousarray(value))


def _example(given: str | None, seed: int) -> Any:
    """One input from a shape, a file of arrays or a function; None where nothing was given."""
    if given is None:
        return None
    if Path(given).exists():
        return _tensors(sources.read_arrays(Path(given)))
    if ":" in given and not given.rpartition(":")[2].startswith(("float", "int", "bool")):
        made = sources.found(given, "--example")()
        return made["example"] if isinstance(made, dict) and "example" in made else made
    return _tensors(sources.parse_example(given, seed))


def _batches(place: DataPlace | None, option: str) -> list[Any] | None:
    if place is None:
        return None
    if place.kind == "text":
        raise ConfigError(f"{option}: text needs the tokenizer of a Hugging Face directory; give arrays or a function")
    if place.kind == "function":
        return place.made_batches(option)
    return [_tensors(batch) for batch in place.array_batches()]


def _needed(place: DataPlace | None, cfg: SparseConfig) -> list[Any] | None:
    found = _batches(place, "--calib")
    if cfg.needs_data and not found:
        raise ConfigError(f"--method {cfg.method} needs --calib DATA; only magnitude with equal ratios needs none")
    return found
