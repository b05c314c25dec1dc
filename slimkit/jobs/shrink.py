"""Pruning and sparsity as commands: a model named on the command line in, a folder out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimkit import prune as pruning
from slimkit import sparse
from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.sparse import SparseConfig, shards
from slimkit.core.sparse.compress import select
from slimkit.jobs import models, texts
from slimkit.sparse import checkpoint as blocks
from slimkit.sparse.host import TorchHost


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
    """Prune a model's structure; with `out` None only plan it.

    Args:
        place: the model.
        out: folder of the pruned model; None leaves everything as it is.
        ratio: share of the parameters (or multiplications) to keep.
        align, importance, budget, allocation, node_ratio: settings of `Pruner`.
        keep: layers left whole, by number or name; None: the first and the last.
        example: one input, see `models.example_of`.
        calib: data for data-driven importances and for `compensate`.
        compensate: refit what remains on the calibration data.
        seed: of made-up examples and of random importance.

    Returns:
        What was done, as plain values.
    """
    opened = models.open_model(place)
    if opened.desc is not None:
        raise ConfigError("--model is a pruned model already; prune the original to the ratio wanted")
    config = getattr(opened.model, "config", None) if opened.is_hf else None
    data = texts.calibration(calib, opened.directory, type(opened.model), config, "--calib")
    if compensate and data is None:
        raise ConfigError("--compensate needs --calib DATA")
    before = opened.parameters
    pruner = (
        pruning.Pruner(opened.model, models.example_of(opened, example, seed=seed))
        .set_importance_evaluation_function(importance, calibration=data, seed=seed)
        .set_node_reserved_ratio(node_ratio)
        .set_alignment(align)
        .set_budget(budget)
        .set_allocation(allocation)
    )
    if compensate:
        pruner.set_compensation(data)
    whole = None if keep is None else [int(k) if k.lstrip("-").isdigit() else k for k in keep]
    if out is None:
        left, desc = pruner.analysis(ratio, whole)
    else:
        desc = pruner.prune(ratio, whole)
        left = opened.parameters
    facts = {"parameters_before": before, "parameters": left, "kept": left / before, "report": pruner.report()}
    if out is not None:
        opened.desc = desc
        with files.atomic_directory(out) as folder:
            facts["written"] = models.write_model(opened, folder)
            folders.write_report(folder, "prune", {"asked": ratio, **facts})
    return facts


def sparsify(
    place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None, restart: bool
) -> dict[str, Any]:
    """Make a model sparse: Hugging Face directories block by block and resumable, everything else in memory.

    Args:
        place: the model.
        out: folder of the sparse model; it may hold an unfinished run of the same job.
        cfg: what to do.
        calib: calibration data; "magnitude" needs none.
        restart: throw an unfinished run away.

    Returns:
        The report of the sparsity room, with "written" and "resumable".
    """
    if by_blocks(place, cfg):
        assert place.model is not None
        if restart and (out / blocks.STATE).is_dir():
            shutil.rmtree(out)
        _resumable(out)
        config, kind = models.architecture(place.model)
        data = _needed(texts.calibration(calib, place.model, kind, config, "--calib"), cfg)
        report = sparse.sparsify_checkpoint(place.model, out, cfg, data)
        return {**report, "written": "transformers", "resumable": True}
    folders.unused(out)
    opened = models.open_model(place)
    config = getattr(opened.model, "config", None) if opened.is_hf else None
    data = _needed(texts.calibration(calib, opened.directory, type(opened.model), config, "--calib"), cfg)
    report = sparse.Compressor(opened.model, cfg).compress(data)
    with files.atomic_directory(out) as folder:
        written = models.write_model(opened, folder)
        files.write_json(folder / "sparse_report.json", report)
    return {**report, "written": written, "resumable": False}


def plan_sparsify(place: ModelPlace, out: Path, cfg: SparseConfig, *, calib: DataPlace | None) -> dict[str, Any]:
    """What `sparsify` would do: the layers, the zeros, the data and how much of it is done already; writes nothing."""
    by_block = by_blocks(place, cfg)
    directory = place.model
    if by_block:
        assert directory is not None
        _resumable(out)
        config, kind = models.architecture(directory)
        host: TorchHost = blocks.CheckpointHost(directory, out / blocks.STATE, shards.locate(directory), None)
    else:
        folders.unused(out)
        opened = models.open_model(place)
        host, directory, kind = TorchHost(opened.model), opened.directory, type(opened.model)
        config = getattr(opened.model, "config", None) if opened.is_hf else None
    layers, skipped = host.layers()
    names, unmatched = select(layers, skipped, cfg)
    data = _needed(texts.calibration(calib, directory, kind, config, "--calib"), cfg)
    weights = sum(layers[n].size for n in names)
    done = len(list((out / blocks.STATE).glob("block-*.json"))) if by_block else 0
    return {
        "layers": names,
        "skipped": skipped,
        "unmatched": list(unmatched),
        "weights": weights,
        "zeros": round(weights * cfg.sparse_ratio),
        "batches": len(data or ()),
        "blocks_done": done,
        "resumable": by_block,
    }


def by_blocks(place: ModelPlace, cfg: SparseConfig) -> bool:
    """Whether a model is walked block by block: a plain Hugging Face directory, with equal ratios."""
    model = place.model
    return (
        place.factory is None
        and model is not None
        and cfg.uniform
        and (model / "config.json").exists()
        and any(model.glob("*.safetensors"))
    )


def _needed(data: Any, cfg: SparseConfig) -> Any:
    if cfg.needs_data and not data:
        raise ConfigError(f"--method {cfg.method} needs --calib DATA; only magnitude with equal ratios needs none")
    return data


def _resumable(out: Path) -> None:
    """A folder without a run of sparsify_checkpoint in it must be unused; one with a run is that function's care."""
    if not (out / blocks.STATE / "job.json").exists():
        folders.unused(out, state=blocks.STATE)
