"""Making a small delta of what a torch model has learned since its base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.delta import compress as steps
from slimkit.core.delta.spec import DeltaReport
from slimkit.delta.storage import STORAGE

from torch import nn


def compress_delta(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    kind: str = "bits",
    *,
    name: str = "default",
    bytes_ratio: float = 0.09,
    rank: int | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    calibration: Sequence[Any] | None = None,
) -> DeltaReport:
    """Put what a fully fine-tuned model has learned on its base as a small delta, in place; it acts.

    `save_delta(model, folder, names=name)` then writes a bundle that loads onto the base with `load_delta` in either
    framework; several lie on one base, and `set_delta` chooses. Embeddings, linear layers and convolutions are made
    small; other tensors that differ (norms, biases) travel whole.

    Args:
        model: the base.
        tuned: the fine-tuned model, its weights by torch's names, or a file or folder of them.
        kind: "bits" (the sign of every entry, with a scale for each row of the weight, and a low-rank rest) or
            "low_rank" (that alone).
        name: of the delta.
        bytes_ratio: share of the weight's bytes in bfloat16 that its delta may take, in (0, 1); "bits" takes 1/16 at
            least. The rest's rank follows from it.
        rank: of the low-rank part; None lets it follow.
        exclude: globs of layers that travel whole, a classifier's head for one.
        seed: of the random range by which large weights are factored.
        calibration: batches that both models are run on (no labels; a few thousand tokens or rows do). Linear layers
            are then fitted so that the small model's answers are the tuned one's, block by block: the same bytes lose
            several times less. `tuned` must be a model then. Of the layers of a block, twice the square of their
            inputs is in memory.

    Returns:
        Each layer's options, its bytes and its relative error, of the weight's change or, with calibration, of what
        that change answers; how many times smaller the whole is.

    Raises:
        ArgumentTypeError, ArgumentError: an argument is of the wrong type or value, the two models are the same, or a
            name is taken.
        PatternError: a glob of `exclude` matches nothing.
        PlanError: the tuned model has fewer tensors than the base, more, or of another shape, or two values for one
            that places of the base share.
        FileFormatError: `tuned` is a damaged file.
        In every case the model is as it was.

    Source:
        Liu et al. 2024, "BitDelta", section 3; Yao et al. 2025, "DeltaZip"; Frantar et al. 2023, "OPTQ", section 3.

    Example:
        >>> import copy, torch
        >>> net = nn.Sequential(nn.Linear(64, 64))
        >>> tuned = copy.deepcopy(net)
        >>> with torch.no_grad():
        ...     _ = tuned[0].weight.add_(0.01)
        >>> compress_delta(net, tuned).layers["0"]["error"] < 0.01
        True
    """
    return steps.compress(
        STORAGE,
        bridge.unwrapped(bridge.check_whole(model)),
        tuned,
        kind,
        name=name,
        bytes_ratio=bytes_ratio,
        rank=rank,
        exclude=exclude,
        seed=seed,
        calibration=calibration,
    )
