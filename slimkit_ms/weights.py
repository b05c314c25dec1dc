"""Transformer weight pruning on MindSpore: a large network's file, cut into a smaller instance of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.batch import dataset
from slimkit.core.checkpoint.openweights import open_weights, refuse_torch, source_config
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.files import PathLike
from slimkit.core.log import progress
from slimkit.core.showing import Report
from slimkit.core.weights.activations import Energies
from slimkit.core.weights.blocks import PruneConfig
from slimkit.core.weights.cut import plan_weights
from slimkit.core.weights.influence import Influence, LayerSuggestion, find_stack, first_tensor, mask_of
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
        how it was selected, per attention layer the heads that stay), "selection".

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
    batches = dataset(calibration, "calibration")
    model = bridge.check_model(model_or_file, "model_or_file")
    cells = dict(model.cells_and_names())
    sizes = {n: sum(p.size for p in c.get_parameters()) for n, c in cells.items()}
    found = Influence(find_stack({n: type(c).__name__ for n, c in cells.items()}, sizes, blocks), keep)

    def seen(path: str, x: Array, output: Any, mask: Array | None) -> None:
        found.add(path, x, bridge.as_numpy(first_tensor(output)), mask)

    _watch(model, {p: cells[p] for p in found.paths}, batches, seen)
    return found.suggestion()


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
    batches = dataset(calibration, "calibration")
    model = bridge.check_model(model_or_file, "model_or_file")
    linear = {p: c for p, c in model.cells_and_names() if kinds.is_kind(c, "linear")}
    found = Energies({p: c.weight.name for p, c in linear.items()})

    def seen(path: str, x: Array, _output: Any, mask: Array | None) -> None:
        found.add(path, x, mask)

    _watch(model, linear, batches, seen)
    return found.mean()


def _watch(
    model: nn.Cell,
    cells: Mapping[str, nn.Cell],
    batches: Iterable[Any],
    seen: Callable[[str, Array, Any, Array | None], None],
) -> None:
    """Run the model over all batches, and call ``seen(path, input, output, mask)`` after each of the cells."""
    mask: Array | None = None
    inputs: dict[str, list[Array]] = {path: [] for path in cells}

    def before(path: str) -> Callable[..., None]:
        # A copy, since a block may add to its input in place.
        return lambda _cell, args: inputs[path].append(bridge.as_numpy(first_tensor(args)))

    def after(path: str) -> Callable[..., None]:
        return lambda _cell, _args, output: seen(path, inputs[path].pop(), output, mask)

    handles = [cell.register_forward_pre_hook(before(path)) for path, cell in cells.items()]
    handles += [cell.register_forward_hook(after(path)) for path, cell in cells.items()]
    try:
        with replaying(model) as run:
            for batch in progress(batches, "batches"):
                given = mask_of(batch)
                mask = None if given is None else np.asarray(given.asnumpy() if hasattr(given, "asnumpy") else given)
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
