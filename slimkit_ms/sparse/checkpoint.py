"""Checkpoints larger than memory: one block of a MindSpore model at a time, resumable at any moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import batch as batches
from slimkit.core import check, files
from slimkit.core.files import PathLike
from slimkit.core.locks import BLOCKS as STATE
from slimkit.core.showing import Report
from slimkit.core.sparse.compress import demand_whole_numbers
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.folderwalk import copy_others, sparsify_folder
from slimkit.core.sparse.remaining import Progress
from slimkit_ms import bridge
from slimkit_ms.sparse.checkpoint_framework import CheckpointCells
from slimkit_ms.sparse.stored import StoredCells, open_folder

import mindspore as ms
from mindspore import nn


def sparsify_checkpoint(
    src: PathLike,
    dst: PathLike,
    cfg: SparseConfig,
    dataset: Any,
    *,
    build: Callable[[str], nn.Cell | None],
    blocks: Sequence[str],
    names: Callable[[str], str] | Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Make a model that is larger than memory sparse, building and holding one of its blocks at a time.

    Each finished block is written to `dst` with the activations that leave it; a run that is killed goes on from the
    last finished block when called again, and ends in the same bytes. Only layers inside the blocks change.

    Under msrun, once `mindspore.communication.init()` has run, every process makes the same call, with the same data
    and folders that all see: each takes every n-th batch, and the bytes are those of one process of as many threads.

    Args:
        src: a folder of .safetensors (with Hugging Face's index, MindSpore's param_name_map.json, or one file), a
            folder with model.ckpt, or one such file.
        dst: folder for the result, absent or holding an unfinished run of the same job.
        cfg: what to do. Ratios of a rule (`uniform`) are judged by what leaves the last block, and measured in a walk
            of their own, which a killed run begins again.
        dataset: a list (or any re-iterable that repeats itself) of batches; not needed for "magnitude".
        build: path of a block -> a new Cell of it, whose parameters `src` names by that path and their own; "" -> what
            comes before the blocks: a Cell that gives for a batch what the first block takes, a tensor or a tuple (what
            stands behind the hidden states goes to every block), or None where batches enter the first block.
        blocks: the blocks' paths, first to last: what leaves one enters the next.
        names: where the files call things otherwise: a map as `convert_checkpoint` takes it, from their names to the
            cells' (`{"re:mlp\\.": ""}`), or a function from a parameter's name to a tensor's. A prefix that all names
            share, and PyTorch's words (.weight for .gamma and .embedding_table), are found without it.
        on_progress: called after every layer with a `Progress` (layer, done, total, seconds, seconds_left); None shows
            a bar on a terminal and log lines elsewhere.

    Returns:
        The report of `Compressor.compress`, and "bytes": what this call has read and written (see the page scale).

    Raises:
        FileFormatError: `src` is damaged or holds no weights.
        UnsupportedError: a tensor is not found or has another shape, `dst` was begun with other inputs, or
            `cfg.residual` is set, which needs the whole cell.
        ConfigError: another run is at work in `dst`.
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.instance(cfg, SparseConfig, "cfg")
    paths = [check.text(path, "blocks") for path in blocks]
    if not paths:
        check.wrong_value("blocks", "the paths of at least one block", blocks)
    if source.resolve() in (target.resolve(), target.resolve() / source.name):
        check.wrong_value("dst", "another directory than src", str(target))
    weights, parts = open_folder(source)
    with weights:
        if cfg.weight_bits == 8:
            demand_whole_numbers(name for name, entry in weights.entries.items() if entry.dtype == "BF16")
        data = list(batches.dataset(dataset)) if cfg.needs_data else []
        stored = StoredCells(weights, names)
        host = CheckpointCells(stored, target / STATE, build, paths)
        finished = cache(host.finished)  # asked once all blocks are done

        def copy(folder: Path) -> None:
            if source.is_dir():
                copy_others(source, folder, parts)

        def rewrite(file: Path, out: Path) -> None:
            stored.rewrite(file, out, finished())

        job = {"dataset": batches.digest(data, _bytes_of), "blocks": paths, "compute": "MindSpore"}
        with bridge.pynative():
            return sparsify_folder(host, cfg, data, target, parts, job, copy, rewrite, on_progress)


def _bytes_of(value: Any) -> tuple[str, bytes] | None:
    if isinstance(value, ms.Tensor):
        value = bridge.as_numpy(value)
    if not isinstance(value, np.ndarray):
        return None
    return f"{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes()
