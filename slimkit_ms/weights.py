"""Transformer weight pruning on MindSpore: a large network's file, cut into a smaller instance of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint.openweights import open_weights, refuse_torch, source_config
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.files import PathLike
from slimkit.core.log import progress
from slimkit.core.showing import Report
from slimkit.core.weights.blocks import PruneConfig
from slimkit.core.weights.cut import plan_weights
from slimkit.core.weights.framework import Seen
from slimkit.core.weights.influence import LayerSuggestion, first_tensor, mask_of
from slimkit.core.weights.measuring import activations, layer_map
from slimkit_ms import bridge, kinds
from slimkit_ms.replay import replaying

import mindspore as ms
from mindspore import nn


def prune_model_weight(
    model: nn.Cell, config: PruneConfig, weight_file_path: PathLike, *, strict: bool = True
) -> Report:
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
        how it was selected, per attention layer the heads that stay), "selection", "computed" (tables in no file whose
        features were cut: the smaller model computes others).

    Raises:
        ArgumentTypeError: an argument of the wrong type.
        ConfigError, PatternError: steps and blocks do not fit each other, the file or the model.
        PlanError: names or shapes do not fit; the model is as it was.
        UnsupportedError: "importance" cannot find the attention heads.
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
    with open_weights(weight_file_path, refuse_torch, "weight_file_path") as source:
        plan = plan_weights(bridge.structure(model), source, spec, source_config(weight_file_path), strict=strict)
        source.verify(plan.feeds.values())
        parameters = {p.name: p for p in model.get_parameters()}
        for name, values in plan.tensors(source):
            parameters[name].set_data(_owned(values, parameters[name].dtype))
    return Report("weights", plan.report)


def _owned(values: Array, dtype: Any) -> ms.Tensor:
    """A tensor of values that nobody else keeps; float32 is handed over without a second copy."""
    if dtype != ms.float32:
        return ms.Tensor(values, dtype)
    # A view would keep all of the tensor that it was cut from.
    return ms.Tensor.from_numpy(np.array(values, np.float32) if values.base is not None else values)


def suggest_layer_map(model_or_file: Any, calibration: Any, keep: int, blocks: str | None = None) -> LayerSuggestion:
    """Measure which blocks of a large transformer hardly change what runs through them; suggest keeping the others.

    The measure is block influence, 1 - mean cosine between a block's input and output over all tokens (ShortGPT, Men
    et al. 2024, sec. 2.2): a block that hardly turns its input is missed least.

    Args:
        model_or_file: the large model, a cell.
        calibration: batches as the model takes them: tensors, tuples, or dicts of keyword arguments; where a dict has
            an attention_mask, only its tokens count.
        keep: how many blocks stay.
        blocks: path of the blocks' parent; None takes the heaviest stack of numbered blocks of one class.

    Returns:
        A `LayerSuggestion`, whose pattern and layer_id_map go into `PruneConfig.add_blocks_params`.

    Raises:
        ArgumentError: no blocks were found, or `keep` is more than there are.

    Example:
        >>> model = nn.SequentialCell(*(nn.Dense(4, 4) for _ in range(3)))
        >>> _ = model[1].weight.set_data(ms.ops.eye(4, 4)), model[1].bias.set_data(ms.ops.zeros(4))
        >>> suggest_layer_map(model, [ms.ops.randn(8, 4)], keep=2).layer_id_map
        {0: 0, 1: 2}
    """
    return layer_map(MindSporeWeights(model_or_file), calibration, keep, blocks)


def measure_activations(model_or_file: Any, calibration: Any) -> dict[str, Array]:
    """Measure what the matrices of a large transformer are given, so that pruning keeps the channels that matter.

    Args:
        model_or_file: the large model, a cell.
        calibration: batches as the model takes them: tensors, tuples, or dicts of keyword arguments; where a dict has
            an attention_mask, only its tokens count. A hundred sentences do.

    Returns:
        name of each dense layer's weight -> mean square of each of its inputs over all tokens, (in,) in float64; for
        `PruneConfig.set_selection("importance", activations)`.

    Raises:
        ArgumentError: no dense layer was run.

    Example:
        >>> measure_activations(nn.Dense(2, 1), [ms.Tensor([[1.0, 2.0], [3.0, 4.0]])])["weight"].tolist()
        [5.0, 10.0]
    """
    return activations(MindSporeWeights(model_or_file), calibration)


class MindSporeWeights:
    """A MindSpore cell, as measuring in the core sees it."""

    def __init__(self, model_or_file: Any) -> None:
        self._model = bridge.check_model(model_or_file, "model_or_file")
        self._cells = dict(self._model.cells_and_names())

    def classes(self) -> dict[str, str]:
        return {path: type(cell).__name__ for path, cell in self._cells.items()}

    def sizes(self) -> dict[str, int]:
        return {path: sum(p.size for p in cell.get_parameters()) for path, cell in self._cells.items()}

    def matrices(self) -> dict[str, str]:
        return {path: cell.weight.name for path, cell in self._cells.items() if kinds.is_kind(cell, "linear")}

    def array(self, value: Any) -> Array:
        return bridge.as_numpy(first_tensor(value))

    def watch(self, paths: Sequence[str], batches: Iterable[Any], seen: Seen) -> None:
        mask: Array | None = None
        inputs: dict[str, list[Array]] = {path: [] for path in paths}

        def before(path: str) -> Callable[..., None]:
            # A copy, since a block may add to its input in place.
            return lambda _cell, args: inputs[path].append(self.array(args))

        def after(path: str) -> Callable[..., None]:
            return lambda _cell, _args, output: seen(path, inputs[path].pop(), output, mask)

        handles = [self._cells[path].register_forward_pre_hook(before(path)) for path in paths]
        handles += [self._cells[path].register_forward_hook(after(path)) for path in paths]
        try:
            with replaying(self._model) as run:
                for batch in progress(batches, "batches"):
                    given = mask_of(batch)
                    plain = given.asnumpy() if isinstance(given, ms.Tensor) else given
                    mask = None if plain is None else np.asarray(plain)
                    run(batch)
        finally:
            for handle in handles:
                handle.remove()
