"""Transformer weight pruning on MindSpore: a large network's file, cut into a smaller instance of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from slimkit.core import check
from slimkit.core.blocks import PruneConfig
from slimkit.core.cut import plan_weights
from slimkit.core.errors import FileFormatError
from slimkit.core.openweights import open_weights, source_config
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn


def prune_model_weight(
    model: nn.Cell, config: PruneConfig, weight_file_path: Any, *, strict: bool = True
) -> dict[str, Any]:
    """Cut the weights of a large transformer out of its file and load them into a smaller instance, in place.

    Args:
        model: the smaller instance: fewer blocks, heads, FFN channels or embedding columns, same architecture.
        config: the steps, the blocks and the selection.
        weight_file_path: .ckpt, .safetensors, a sharded index of the latter, or a folder with either; PyTorch's names
            of norms and embeddings are understood. Tensors are read one at a time.
        strict: refuse a parameter that nothing feeds and a tensor that nothing takes; False reports them.

    Returns:
        A plain dict: "copied", "cut" (name -> from and to shape), "renamed" (name -> name in the file), "initialised"
        (parameters left as they were), "tied", "unused", "dropped" (tensors of dropped blocks), "choices" (per width
        how it was selected, per attention layer the heads that stay), "selection".

    Raises:
        ArgumentTypeError: an argument of the wrong type.
        ConfigError, PatternError: steps and blocks do not fit each other, the file or the model.
        PlanError: names or shapes do not fit; the model is as it was.
        UnsupportedError: "importance" cannot tell the attention heads.
        FileFormatError, LinkPathError: the file is damaged, missing, a link, or a PyTorch file.

    Example:
        >>> import tempfile, mindspore
        >>> large, small = mindspore.nn.Dense(4, 4), mindspore.nn.Dense(4, 2)
        >>> path = tempfile.mkdtemp() + "/large.ckpt"
        >>> mindspore.save_checkpoint(large, path)
        >>> report = prune_model_weight(small, PruneConfig().set_steps(["prune_bert_intra_block"]), path)
        >>> bool((small.weight == large.weight[:2]).all()), sorted(report["cut"])
        (True, ['bias', 'weight'])
    """
    bridge.check_model(model)
    check.instance(config, PruneConfig, "config")
    check.boolean(strict, "strict")
    spec = config.spec()
    with open_weights(weight_file_path, _refuse_torch, "weight_file_path") as source:
        plan = plan_weights(bridge.structure(model), source, spec, source_config(weight_file_path), strict=strict)
        source.verify(plan.feeds.values())
        parameters = {p.name: p for p in model.get_parameters()}
        for name, values in plan.tensors(source):
            parameters[name].set_data(ms.Tensor(values, parameters[name].dtype))
    return plan.report


def _refuse_torch(path: Path) -> NoReturn:
    raise FileFormatError(
        f"{path} is a PyTorch file; MindSpore reads .ckpt and .safetensors. convert_checkpoint makes one of the other."
    )
