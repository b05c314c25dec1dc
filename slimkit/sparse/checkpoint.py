"""Checkpoints larger than memory: one block of a Hugging Face model at a time, resumable at any moment."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit import together
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
from slimkit.core.sparse.processes import first
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
    device: str | torch.device = "cpu",
    offload: str = "disk",
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Make a Hugging Face checkpoint directory sparse, holding one block of it in memory at a time.

    Each finished block is written to `dst` with the activations that leave it; a run that is killed goes on from the
    last finished block when called again, and ends in the same bytes. Only layers inside the model's blocks change.

    Under torchrun (or in a group of torch.distributed that is there) every process makes the same call, with the same
    data and folders that all see: each takes every n-th batch, layers that do not wait for each other are solved by
    one process each, and the bytes are those of one process of as many threads. Whichever process is killed, the same
    command goes on, with any number of processes. The bar and the log are those of process 0.

    Args:
        src: directory with config.json and .safetensors weights, in one file or in shards.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        cfg: what to do. `uniform=False` measures in a walk of its own first, which a killed run begins again.
        dataset: a list (or any re-iterable that repeats itself) of batches of CPU tensors; not needed for "magnitude".
        names: parameter name of the transformers class -> tensor name in the files, for checkpoints whose names
            differ by more than the base model's prefix.
        compute_dtype: what blocks are computed in: "float32", "float64", or None for what is stored; "auto" takes
            float32 for float16 and bfloat16 on the CPU, which is slow in them. Files keep their own types, and
            weights are rounded to them as soon as they are solved.
        device: where blocks compute and layers are solved, such as "cuda:0" or "npu": one block's weights and one
            batch are there, the next block is read ahead into main memory.
        offload: where activations lie between two blocks: "disk", or "cpu" for main memory, which is quicker.
        on_progress: called after every layer with a `Progress` (layer, done, total, seconds, seconds_left); None shows
            a bar on a terminal and log lines elsewhere.

    Returns:
        The report of `Compressor.compress`.

    Raises:
        FileFormatError: `src` is damaged or holds no safetensors.
        UnsupportedError: the model has no chain of blocks, a tensor is not found, `dst` was begun with other inputs, or
            several processes are to train blocks.
        ConfigError: another run is at work in `dst`.
        ProcessLostError: one of several processes has ended.
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.instance(cfg, SparseConfig, "cfg")
    check.choice(offload, ("disk", "cpu"), "offload")
    if source.resolve() == target.resolve():
        check.wrong_value("dst", "another directory than src", str(target))
    places = shards.locate(source)
    data = list(batches.dataset(dataset)) if cfg.needs_data else []
    place = together.join(torch.device(device))
    return _walked(source, target, places, cfg, data, names, compute_dtype, place, offload, on_progress)


def _walked(
    source: Path,
    target: Path,
    places: dict[str, shards.Place],
    cfg: SparseConfig,
    data: Sequence[Any],
    names: Callable[[str], str] | None,
    compute_dtype: str | None,
    device: torch.device,
    offload: str,
    on_progress: Callable[[Progress], None] | None,
) -> Report:
    """The walk, by one process or by all of a group."""
    state = target / STATE
    if cfg.weight_bits == 8:
        demand_whole_numbers(name for name, place in places.items() if place.dtype == "BF16")
    compute = computing(places.values(), compute_dtype, device)
    host = CheckpointSparse(source, state, places, names, compute, device, offload)
    if host.processes() > 1 and cfg.row.reconstructs:
        raise UnsupportedError(f"method {cfg.method!r} trains blocks, which sparsify_checkpoint does in one process.")
    digests = _digests(host, sorted({p.file for p in places.values()}))
    job = {"config": cfg.to_dict(), "source": digests, "dataset": digest_of(data), "threads": torch.get_num_threads()}
    job |= {"compute": str(compute), "device": device.type}
    told = host.gather(job)
    if any(other != told[0] for other in told):
        raise UnsupportedError("all processes must be given the same model, data, configuration and threads.")
    quiet = logger.disabled
    with contextlib.ExitStack() as held:
        try:
            logger.disabled = quiet or host.rank() > 0
            first(host, lambda: _claim(held, target))
            return _resume(host, cfg, data, source, target, job, on_progress if host.rank() == 0 else _unseen)
        finally:
            logger.disabled = quiet


def _unseen(_step: Progress) -> None:
    """The progress of a process that does not speak."""


def _claim(held: contextlib.ExitStack, target: Path) -> None:
    """Make sure that the folder is free, and lock it."""
    state = target / STATE
    # A run killed in its first moments leaves its state folder and nothing else.
    if target.exists() and any(f.name != STATE for f in target.iterdir()) and not (state / "job.json").exists():
        check.wrong_value("dst", "absent, empty, or an unfinished run", str(target))
    held.enter_context(locked(state, "dst", inside=True))


def _digests(host: CheckpointSparse, weights: Sequence[Path]) -> dict[str, str]:
    """The digest of each file, which one process reads."""
    n, rank = host.processes(), host.rank()
    every = host.gather([files.digest_file(file) for file in weights[rank::n]])
    return {file.name: every[i % n][i // n] for i, file in enumerate(weights)}


def computing(
    places: Iterable[shards.Place], asked: str | None, device: torch.device | None = None
) -> torch.dtype | None:
    """What blocks are computed in; None where that is what is stored.

    Args:
        places: the tensors of the files.
        asked: "auto", "float32", "float64" or None.
        device: where; the CPU unless it is named.
    """
    if asked is None:
        return None
    check.choice(asked, ("auto", *_COMPUTED), "compute_dtype")
    if asked != "auto":
        return _COMPUTED[asked]
    halves = sorted({place.dtype for place in places} & {"F16", "BF16"})
    if not halves or (device is not None and device.type != "cpu"):
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
    """Begin a job in `target`, or go on with it; process 0 holds its lock."""
    state = target / STATE
    report_file = target / "sparse_report.json"

    def begin() -> Any:
        same_job(state, job, {"config": SparseConfig().to_dict(), "compute": "None", "device": "cpu"})
        files.settle(target)
        for part in target.rglob(".*.part"):  # a killed writer cannot clean up after itself
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if not report_file.exists():
            return None
        _tidy(state)  # the kill may have come while tidying
        return files.read_json(report_file)

    report = first(host, begin)
    if report is not None:
        return Report("sparsity", report)
    report, _ = compress(host, cfg, data, on_progress)
    for row in report["layers"].values():
        row.pop("seconds", None)  # the same job writes the same bytes
    report = {k: v for k, v in report.items() if k != "seconds"}
    finished = state / "finished"

    def prepare() -> None:
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        _copy_others(source, finished)
        files.write_json(finished / report_file.name, report)

    def commit() -> None:
        files.commit(finished, target)
        _tidy(state)

    first(host, prepare)
    replaced = host.finished()
    for file in sorted({p.file for p in shards.locate(source).values()})[host.rank() :: host.processes()]:
        shards.rewrite(file, finished / file.name, replaced)
    host.gather(None)  # all are written
    first(host, commit)
    return Report("sparsity", report)


def _tidy(state: Path) -> None:
    for leftover in state.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name not in ("job.json", ".lock"):
            leftover.unlink()


def _copy_others(source: Path, target: Path) -> None:
    """Copy what is no weights: configuration, tokenizer and the like."""
    weights = {p.file for p in shards.locate(source).values()}
    for file in sorted(source.iterdir()):
        if file in weights or not file.is_file():
            continue
        if file.suffix not in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".safetensors"):
            with open(file, "rb") as old, files.atomic_file(target / file.name) as new:
                shutil.copyfileobj(old, new)
