"""Checkpoints larger than memory: one block of a Hugging Face model at a time, resumable at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core import batch as batches
from slimkit.core import check, files
from slimkit.core.checkpoint import shards
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.locks import BLOCKS as STATE
from slimkit.core.locks import locked, same_job
from slimkit.core.log import logger
from slimkit.core.showing import Report
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.compress import compress, demand_whole_numbers
from slimkit.core.sparse.remaining import Progress
from slimkit.sparse import memory
from slimkit.sparse.checkpoint_framework import CheckpointSparse
from slimkit.stored import digest_of

import torch

_COMPUTED = {"float32": torch.float32, "float64": torch.float64}


@memory.returned_at_once()
def sparsify_checkpoint(
    src: PathLike,
    dst: PathLike,
    cfg: SparseConfig,
    dataset: Any,
    *,
    names: Callable[[str], str] | None = None,
    compute_dtype: str | None = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Make a Hugging Face checkpoint directory sparse, holding one block of it in memory at a time.

    Each finished block is written to `dst` with the activations that leave it; a run that is killed goes on from the
    last finished block when called again, and ends in the same bytes. Only layers inside the model's blocks change.

    Args:
        src: directory with config.json and .safetensors weights, in one file or in shards.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        cfg: what to do; `uniform=False` needs the whole model and is refused.
        dataset: a list (or any re-iterable that repeats itself) of batches of CPU tensors; not needed for "magnitude".
        names: parameter name of the transformers class -> tensor name in the files, for checkpoints whose names
            differ by more than the base model's prefix.
        compute_dtype: what blocks are computed in: "float32", "float64", or None for what is stored; "auto" takes
            float32 for float16 and bfloat16, in which CPUs are slow. Files keep their own types, and weights are
            rounded to them as soon as they are solved.
        on_progress: called after every layer with a `Progress` (layer, done, total, seconds, seconds_left); None shows
            a bar on a terminal and log lines elsewhere.

    Returns:
        The report of `Compressor.compress`.

    Raises:
        FileFormatError: `src` is damaged or holds no safetensors.
        UnsupportedError: the model has no chain of blocks, a tensor is not found, or `dst` was begun with other inputs.
        ConfigError: another process is at work in `dst`.
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.instance(cfg, SparseConfig, "cfg")
    if not cfg.uniform:
        raise UnsupportedError("sparsify_checkpoint needs uniform=True: sensitivities are measured on a whole model.")
    if source.resolve() == target.resolve():
        check.wrong_value("dst", "another directory than src", str(target))
    places = shards.locate(source)
    data = list(batches.dataset(dataset)) if cfg.needs_data else []
    state = target / STATE
    # A run killed in its first moments leaves its state folder and nothing else.
    if target.exists() and any(f.name != STATE for f in target.iterdir()) and not (state / "job.json").exists():
        check.wrong_value("dst", "absent, empty, or an unfinished run", str(target))
    if cfg.weight_bits == 8:
        demand_whole_numbers(name for name, place in places.items() if place.dtype == "BF16")
    compute = computing(places.values(), compute_dtype)
    host = CheckpointSparse(source, state, places, names, compute)
    if host.processes() > 1:
        raise UnsupportedError("sparsify_checkpoint needs one process: all would write the same files.")
    digests = {f.name: files.digest_file(f) for f in sorted({p.file for p in places.values()})}
    job = {"config": cfg.to_dict(), "source": digests, "dataset": digest_of(data), "threads": torch.get_num_threads()}
    job |= {"compute": str(compute)}
    with locked(state, "dst", inside=True):
        return _resume(host, cfg, data, source, target, job, on_progress)


def computing(places: Iterable[shards.Place], asked: str | None) -> torch.dtype | None:
    """What blocks are computed in; None where that is what is stored.

    Args:
        places: the tensors of the files.
        asked: "auto", "float32", "float64" or None.
    """
    if asked is None:
        return None
    check.choice(asked, ("auto", *_COMPUTED), "compute_dtype")
    if asked != "auto":
        return _COMPUTED[asked]
    halves = sorted({place.dtype for place in places} & {"F16", "BF16"})
    if not halves:
        return None
    logger.info("blocks are computed in float32, the files stay %s", " and ".join(halves))
    return torch.float32


def _resume(
    host: CheckpointSparse,
    cfg: SparseConfig,
    data: Sequence[Any],
    source: Path,
    target: Path,
    job: Mapping[str, Any],
    on_progress: Callable[[Progress], None] | None,
) -> Report:
    """Begin a job in `target`, or go on with it; the caller holds its lock."""
    state = target / STATE
    same_job(state, job, {"config": SparseConfig().to_dict(), "compute": "None"})
    files.settle(target)
    for part in target.rglob(".*.part"):  # a killed writer cannot clean up after itself
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    report_file = target / "sparse_report.json"
    if report_file.exists():
        _tidy(state)  # the kill may have come while tidying
        return Report("sparsity", files.read_json(report_file))
    report, _ = compress(host, cfg, data, on_progress)
    for row in report["layers"].values():
        row.pop("seconds", None)  # the same job writes the same bytes
    report = {k: v for k, v in report.items() if k != "seconds"}
    finished = state / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    _finish(source, finished, host.finished())
    files.write_json(finished / report_file.name, report)
    files.commit(finished, target)
    _tidy(state)
    return Report("sparsity", report)


def _tidy(state: Path) -> None:
    for leftover in state.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name not in ("job.json", ".lock"):
            leftover.unlink()


def _finish(source: Path, target: Path, replaced: dict[str, shards.Place]) -> None:
    weights = {p.file for p in shards.locate(source).values()}
    for file in sorted(source.iterdir()):
        if file in weights or not file.is_file():
            continue
        if file.suffix not in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".safetensors"):
            with open(file, "rb") as old, files.atomic_file(target / file.name) as new:
                shutil.copyfileobj(old, new)
    for file in sorted(weights):
        shards.rewrite(file, target / file.name, replaced)
