"""Ascend for PyTorch: the shared checks and targets, and W16A16S folders from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.ascend.w16a16s import W16A16SReport, config_told_by, save_arrays
from slimkit.core.files import PathLike
from slimkit.core.lazy import door as _door

__getattr__, __dir__ = _door("slimkit", "ascend")


def save_w16a16s(
    directory: PathLike, model: Any, config: Any = None, *, targets: Sequence[str] | None = None
) -> W16A16SReport:
    """Write a sparse model as a W16A16S folder, from which MindIE's tools make compressed weights for the 310P.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        model: the sparse model, which is left as it is, or a dict of tensor name -> NumPy array.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the model's own config.
        targets: globs over tensor names to mark W16A16S. None: every matrix "*.weight" with at least 5 % zeros.

    Returns:
        What was written, with advice on the ratio.

    Raises:
        ArgumentTypeError: `model` is neither a model nor a dict of arrays.
        ArgumentError: no config, no sparse tensor, or a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Source:
        The layout of MindIE's documentation, "W16A16SC sparse quantization":
        https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = torch.nn.init.eye_(net[0].weight)
        >>> save_w16a16s("/tmp/w16a16s-torch", net, {"model_type": "none"}).sparse
        {'0.weight': 0.75}
    """
    if isinstance(model, dict):
        return save_arrays(directory, model, config_told_by(None, config), targets=targets)
    tensors = bridge.check_model(model).state_dict()
    # NumPy knows no bfloat16; every float becomes float16 in the end.
    arrays = {n: (t.float() if t.is_floating_point() else t).detach().cpu().numpy() for n, t in tensors.items()}
    return save_arrays(directory, arrays, config_told_by(model, config), targets=targets)
