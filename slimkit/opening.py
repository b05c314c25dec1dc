"""`load`: opens any folder that slimkit wrote, and makes its model where the folder says enough."""

from __future__ import annotations

from slimkit.core.files import PathLike
from slimkit.core.run.opening import Loaded, open_folder
from slimkit.jobs.framework import TorchJobs

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
    return open_folder(TorchJobs("cpu"), folder, network, trust_factory)
