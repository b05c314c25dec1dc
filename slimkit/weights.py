"""Transformer weight pruning on PyTorch: a large model's file, cut into a small model of the same architecture."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.blocks import PruneConfig
from slimkit.core.cut import plan_weights
from slimkit.core.openweights import open_weights, source_config
from slimkit.torchfile import TorchFile

import torch


def prune_model_weight(
    model: torch.nn.Module, config: PruneConfig, weight_file_path: Any, *, strict: bool = True
) -> dict[str, Any]:
    """Cut the weights of a large transformer out of its file and load them into a smaller instance, in place.

    Args:
        model: the smaller instance: fewer blocks, heads, FFN channels or embedding columns, same architecture.
        config: the steps, the blocks and the selection.
        weight_file_path: .pt .pth .pkl .bin (read with weights_only=True), .safetensors, a sharded index, or a
            Hugging Face directory; MindSpore's .ckpt too. Tensors are read one at a time.
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
        FileFormatError, LinkPathError: the file is damaged, missing or a link.

    Example:
        >>> import tempfile, torch
        >>> large, small = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> path = tempfile.mkdtemp() + "/large.pt"
        >>> torch.save(large.state_dict(), path)
        >>> report = prune_model_weight(small, PruneConfig().set_steps(["prune_bert_intra_block"]), path)
        >>> bool((small.weight == large.weight[:2]).all()), sorted(report["cut"])
        (True, ['bias', 'weight'])
    """
    bridge.check_model(model)
    check.instance(config, PruneConfig, "config")
    check.boolean(strict, "strict")
    spec = config.spec()
    with open_weights(weight_file_path, TorchFile, "weight_file_path") as source:
        plan = plan_weights(bridge.structure(model), source, spec, source_config(weight_file_path), strict=strict)
        source.verify(plan.feeds.values())
        tensors = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, values in plan.tensors(source):
                tensors[name].copy_(torch.from_numpy(values))
    return plan.report
