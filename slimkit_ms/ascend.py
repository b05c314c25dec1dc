"""Ascend for MindSpore: the shared checks and targets, and W16A16S folders from a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit.core.ascend.w16a16s import W16A16SReport, config_told_by, save_arrays
from slimkit.core.files import PathLike
from slimkit.core.lazy import door as _door
from slimkit.core.naming import torch_name
from slimkit_ms import bridge

__getattr__, __dir__ = _door("slimkit_ms", "ascend")


def save_w16a16s(
    directory: PathLike, model: Any, config: Any = None, *, targets: Sequence[str] | None = None
) -> W16A16SReport:
    """Write a sparse cell as a W16A16S folder, from which MindIE's tools make compressed weights for the 310P.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        model: the sparse cell, which is left as it is, or a dict of tensor name -> NumPy array. Parameters are written
            by PyTorch's names ("norm.weight", not "norm.gamma"), as the readers of these folders expect.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the cell's own config.
        targets: globs over tensor names to mark W16A16S. None: every matrix "*.weight" with at least 5 % zeros.

    Returns:
        What was written, with advice on the ratio.

    Raises:
        ArgumentTypeError: `model` is neither a cell nor a dict of arrays.
        ArgumentError: no config, no sparse tensor, or a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Source:
        The layout of MindIE's documentation, "W16A16SC sparse quantization":
        https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html

    Example:
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 4, weight_init="identity"))
        >>> save_w16a16s("/tmp/w16a16s-ms", net, {"model_type": "none"}).sparse
        {'0.weight': 0.75}
    """
    if isinstance(model, dict):
        return save_arrays(directory, model, config_told_by(None, config), targets=targets)
    held = bridge.parameter_paths(bridge.check_model(model))
    arrays = {torch_name(path): bridge.as_numpy(parameter) for parameter, paths in held for path in paths}
    return save_arrays(directory, arrays, config_told_by(model, config), targets=targets)
