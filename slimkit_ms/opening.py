"""`load`: opens any folder that slimkit wrote, and makes its cell where the folder says enough."""

from __future__ import annotations

from slimkit.core.files import PathLike
from slimkit.core.run.opening import Loaded, open_folder
from slimkit_ms.jobs import MindSporeJobs

from mindspore import nn


def load(folder: PathLike, network: nn.Cell | PathLike | None = None, *, trust_factory: bool = False) -> Loaded:
    """Open what slimkit wrote: a pruned, sparse, distilled, adapted, W16A16S or Hugging Face folder, or a run's.

    Nothing is unpickled, and no code of the folder's choosing runs unless `trust_factory` says so. MindSpore cannot
    build models of transformers: give `network` for such folders.

    Args:
        folder: a folder that a call or a command of slimkit wrote, or one file of weights.
        network: a fresh cell of the original make, which gets the weights in place; for a delta its base, a cell or a
            folder. None makes the cell by what the folder names.
        trust_factory: call the function that the folder names as the maker of its cell (network.json, written by
            `save_pruned(factory=...)` and by commands with --factory; a run's recipe).

    Returns:
        A `Loaded`: `kind`, `model` in eval mode (None where nothing says how to make it), `next` (one line: how it was
        made, or what makes it), `facts`.

    Raises:
        FileFormatError: nothing that slimkit wrote, or damaged.
        PlanError: `network` is not of the make that the folder says.

    Example:
        >>> from slimkit_ms import PruneMindSpore, save_pruned
        >>> make = lambda: nn.SequentialCell(nn.Dense(8, 64), nn.ReLU(), nn.Dense(64, 4))
        >>> net = make()
        >>> save_pruned("/tmp/slimkit-small-ms", net, PruneMindSpore(net).prune(0.5, []))
        >>> load("/tmp/slimkit-small-ms").kind
        'pruned'
        >>> load("/tmp/slimkit-small-ms", make()).model[0].out_channels
        32
    """
    return open_folder(MindSporeJobs(), folder, network, trust_factory)
