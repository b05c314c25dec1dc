"""Transformer weight pruning on PyTorch: a large model's file, cut into a small model of the same architecture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.checkpoint.openweights import open_weights, source_config
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.files import PathLike
from slimkit.core.lazy import library
from slimkit.core.log import progress
from slimkit.core.showing import Report
from slimkit.core.weights.blocks import PruneConfig
from slimkit.core.weights.cut import plan_weights
from slimkit.core.weights.framework import Seen
from slimkit.core.weights.influence import LayerSuggestion, first_tensor, mask_of
from slimkit.core.weights.measuring import activations, layer_map
from slimkit.replay import entering, replaying
from slimkit.torchfile import TorchWeightFile

import torch


def prune_model_weight(
    model: torch.nn.Module, config: PruneConfig, weight_file_path: PathLike, *, strict: bool = True
) -> Report:
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
        how it was selected, per attention layer the heads that stay), "selection", "computed" (tables in no file whose
        features were cut: the smaller model computes others).

    Raises:
        ArgumentTypeError: an argument of the wrong type.
        ConfigError, PatternError: steps and blocks do not fit each other, the file or the model.
        PlanError: names or shapes do not fit; the model is as it was.
        UnsupportedError: "importance" cannot find the attention heads.
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
    bridge.check_whole(model)
    check.instance(config, PruneConfig, "config")
    check.boolean(strict, "strict")
    spec = config.spec()
    with open_weights(weight_file_path, TorchWeightFile, "weight_file_path") as source:
        plan = plan_weights(bridge.structure(model), source, spec, source_config(weight_file_path), strict=strict)
        source.verify(plan.feeds.values())
        tensors = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, values in plan.tensors(source):
                tensors[name].copy_(torch.from_numpy(values))
    return Report("weights", plan.report)


def suggest_layer_map(model_or_file: Any, calibration: Any, keep: int, blocks: str | None = None) -> LayerSuggestion:
    """Measure which blocks of a large transformer hardly change what runs through them; suggest keeping the others.

    The measure is block influence, 1 - mean cosine between a block's input and output over all tokens (ShortGPT, Men
    et al. 2024, sec. 2.2): a block that hardly turns its input is missed least.

    Args:
        model_or_file: the large model, or a Hugging Face directory to load it from (needs transformers).
        calibration: batches as the model takes them: tensors, tuples, or dicts of keyword arguments; where a dict has
            an attention_mask, only its tokens count.
        keep: how many blocks stay.
        blocks: path of the blocks' parent; None takes the heaviest stack of numbered blocks of one class.

    Returns:
        A `LayerSuggestion`, whose pattern and layer_id_map go into `PruneConfig.add_blocks_params`.

    Raises:
        ArgumentError: no blocks were found, or `keep` is more than there are.

    Example:
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.copy_(torch.eye(4)), model[1].bias.zero_()
        >>> suggest_layer_map(model, [torch.randn(8, 4)], keep=2).layer_id_map
        {0: 0, 1: 2}
    """
    return layer_map(TorchWeights(_model(model_or_file)), calibration, keep, blocks)


def measure_activations(model_or_file: Any, calibration: Any) -> dict[str, Array]:
    """Measure what the matrices of a large transformer are given, so that pruning keeps the channels that matter.

    Args:
        model_or_file: the large model, or a Hugging Face directory to load it from (needs transformers).
        calibration: batches as the model takes them: tensors, tuples, or dicts of keyword arguments; where a dict has
            an attention_mask, only its tokens count. A hundred sentences do.

    Returns:
        name of each linear layer's weight -> mean square of each of its inputs over all tokens, (in,) in float64; for
        `PruneConfig.set_selection("importance", activations)`.

    Raises:
        ArgumentError: no linear layer was run.

    Example:
        >>> measure_activations(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])["weight"].tolist()
        [5.0, 10.0]
    """
    return activations(TorchWeights(_model(model_or_file)), calibration)


def _model(model_or_file: Any) -> torch.nn.Module:
    if isinstance(model_or_file, (str, os.PathLike)):
        found: torch.nn.Module = library("transformers", "hf").AutoModel.from_pretrained(os.fspath(model_or_file))
        return found
    return bridge.check_whole(model_or_file, "model_or_file")


class TorchWeights:
    """A torch model, as measuring in the core sees it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._modules = model, dict(model.named_modules())

    def classes(self) -> dict[str, str]:
        return {path: type(module).__name__ for path, module in self._modules.items()}

    def sizes(self) -> dict[str, int]:
        return {path: sum(p.numel() for p in module.parameters()) for path, module in self._modules.items()}

    def matrices(self) -> dict[str, str]:
        targets = bridge.structure(self._model).targets
        names = {path: f"{path}.weight" if path else "weight" for path in self._modules}
        return {p: n for p, n in names.items() if n in targets and targets[n].kind in ("linear", "linear_t")}

    def array(self, value: Any) -> Array:
        found: Array = first_tensor(value).float().cpu().numpy()
        return found

    def watch(self, paths: Sequence[str], batches: Iterable[Any], seen: Seen) -> None:
        mask: Array | None = None
        inputs: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

        def began(path: str, args: Any, kwargs: Any) -> None:
            inputs[path].append(first_tensor((*args, kwargs)).clone())  # a block may add to its input in place

        def ended(path: str, _args: Any, _kwargs: Any, output: Any) -> None:
            seen(path, self.array(inputs[path].pop()), output, mask)

        modules = {path: self._modules[path] for path in paths}
        with replaying(self._model) as run, entering(modules, began), bridge.hooked(modules, ended):
            for batch in progress(batches, "batches"):
                given = mask_of(batch)
                mask = None if given is None else torch.as_tensor(given).cpu().numpy()
                run(batch)
