"""Saving the deltas of a torch model and putting them on another one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import travel
from slimkit.core.delta.spec import DeltaReport
from slimkit.delta.hands import hands

from torch import nn

FORMATS = ("slimkit", "peft")


def save_delta(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    names: str | Sequence[str] | None = None,
    format: str = "slimkit",
) -> Path:
    """Save what was trained: the deltas, and every base parameter that trains (a head, biases).

    Args:
        model: a model with deltas, or one in which `freeze_delta(model, "bitfit")` left something to train.
        directory: a folder; made if missing.
        names: the named deltas to save; None means all.
        format: "slimkit" (a bundle that opens in either framework) or "peft" (files that Hugging Face PEFT loads; one
            delta of lora, prefix or prompt).

    Returns:
        The folder.

    Raises:
        ArgumentError: nothing to save, an unknown name or format.
        OSError: the folder cannot be written; an earlier bundle there is left as it was.

    Example:
        >>> import tempfile
        >>> from slimkit.delta import apply_delta
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> report = apply_delta(net, "lora", ["0"], rank=2)
        >>> folder = save_delta(net, tempfile.mkdtemp())
        >>> sorted(p.name for p in folder.iterdir())
        ['delta.safetensors', 'manifest.json']
    """
    bridge.check_model(model)
    if check.choice(format, FORMATS, "format") == "peft":
        return travel.save_peft(hands, model, directory, names)
    return travel.save(hands, model, directory, names)


def load_delta(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    freeze: bool = True,
    same_base: bool = False,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
) -> DeltaReport:
    """Put saved deltas on a model, in place: a slimkit bundle of either framework, or a Hugging Face PEFT adapter.

    Args:
        model: a model like the one the delta was trained on, without the delta.
        directory: the folder.
        name: put the delta on under this name; None keeps its own.
        freeze: stop everything else from training.
        same_base: refuse a base whose weights are not those the delta was trained on; otherwise the log and the report
            say so.
        rename: how paths in the file are called here: {beginning: beginning}, or a function of a path.

    Returns:
        The layers changed, and the share of parameters that train now.

    Raises:
        FileFormatError: the files are damaged, or a tensor is missing, left over, transposed or of another shape.
        ArgumentError: the model lacks a layer, or has one of another shape; a name is taken; (same_base) other weights.
        In every case the model is as it was.
    """
    bridge.check_model(model)
    return travel.load(hands, model, directory, name=name, freeze=freeze, same_base=same_base, rename=rename)
