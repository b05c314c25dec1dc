"""Checkpoints larger than memory: one block of a Hugging Face model at a time, resumable at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from slimkit import together
from slimkit.core import batch as batches
from slimkit.core import check, files
from slimkit.core.checkpoint import shards
from slimkit.core.files import PathLike
from slimkit.core.locks import BLOCKS as STATE
from slimkit.core.log import logger
from slimkit.core.showing import Report
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.compress import demand_whole_numbers
from slimkit.core.sparse.folderwalk import copy_others, sparsify_folder
from slimkit.core.sparse.remaining import Progress
from slimkit.sparse import memory
from slimkit.sparse.checkpoint_framework import CheckpointSparse
from slimkit.stored import digest_of

import torch

_COMPUTED = {"float32": torch.float32, "float64": torch.float64}


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
        The report of `Compressor.compress`, and "bytes": what this call has read and written (see the page scale).

    Raises:
        FileFormatError: `src` is damaged or holds no safetensors.
        UnsupportedError: the model has no chain of blocks, a tensor is not found, or `dst` was begun with other inputs.
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
    where = together.join(torch.device(device))
    if cfg.weight_bits == 8:
        demand_whole_numbers(name for name, place in places.items() if place.dtype == "BF16")
    compute = computing(places.values(), compute_dtype, where)
    host = CheckpointSparse(source, target / STATE, places, names, compute, where, offload)
    weights = sorted({p.file for p in places.values()})
    job = {"dataset": digest_of(data), "threads": torch.get_num_threads()}
    job |= {"compute": str(compute), "device": where.type, "model": files.digest_file(source / "config.json")}
    finished = cache(host.finished)  # asked once all blocks are done

    def copy(folder: Path) -> None:
        copy_others(source, folder, weights)

    def rewrite(file: Path, out: Path) -> None:
        shards.rewrite(file, out, finished())

    with memory.returned_at_once(host.largest_bytes()):
        return sparsify_folder(host, cfg, data, target, weights, job, copy, rewrite, on_progress)


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
