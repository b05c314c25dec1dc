"""`load`: opens any folder that slimkit wrote, and makes its model where the folder says enough."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from slimkit.core.errors import FileFormatError
from slimkit.core.files import PathLike
from slimkit.core.run.opening import Loaded, open_folder
from slimkit.jobs import models
from slimkit.jobs.framework import TorchJobs

import torch
from torch import nn


def load(folder: PathLike, network: nn.Module | PathLike | None = None, *, trust_factory: bool = False) -> Loaded:
    """Open what slimkit wrote: a pruned, sparse, distilled, adapted, W16A16S or Hugging Face folder, or a run's.

    Nothing is unpickled, and no code of the folder's choosing runs unless `trust_factory` says so.

    Args:
        folder: a folder that a call or a command of slimkit wrote, or one file of weights.
        network: a fresh network of the original make, which gets the weights in place; for a delta its base, a model or
            a folder. None makes the model from what the folder says: a configuration of transformers, a recipe.
        trust_factory: call the function that the folder names as the maker of its network (network.json, written by
            `save_pruned(factory=...)` and by commands with --factory; a run's recipe).

    Returns:
        A `Loaded`: `kind`, `model` in eval mode on the CPU (None where nothing says how to make it), `next` (one line:
        how it was made, or what makes it), `facts`.

    Raises:
        FileFormatError: nothing that slimkit wrote, or damaged.
        PlanError: `network` is not of the make that the folder says.
        ConfigError: transformers cannot open the folder.

    Example:
        >>> from slimkit import PruneTorch, save_pruned
        >>> make = lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> net = make()
        >>> save_pruned("/tmp/slimkit-small", net, PruneTorch(net).prune(0.5, []))
        >>> load("/tmp/slimkit-small").kind
        'pruned'
        >>> load("/tmp/slimkit-small", make()).model[0].out_features
        32
    """
    return open_folder(
        TorchJobs("cpu"), folder, network, trust_factory, lambda: importlib.import_module("torch"), _made
    )


def _made(folder: Path, tensors: dict[str, Any]) -> nn.Module:
    """The model of transformers that a folder's config.json describes, with these weights."""
    config, kind = models.architecture(folder)
    model: nn.Module = kind(config)
    told = model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=False)
    own = model.state_dict()
    held = {own[name].data_ptr() for name in tensors if name in own}
    missing = [name for name in told.missing_keys if own[name].data_ptr() not in held]  # tied ones are stored once
    odd = [*missing, *told.unexpected_keys]
    if odd:
        raise FileFormatError(f"{folder} must hold exactly the tensors of its model; these differ: {odd[:5]}")
    return model.eval()
