"""Deltas on a torch model: put on, choose, merge, take off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.delta import inject as steps
from slimkit.core.delta import plus
from slimkit.core.delta.spec import DeltaReport
from slimkit.delta import merged
from slimkit.delta.framework import access
from slimkit.delta.prefix_model import put_prefix
from slimkit.delta.prompt_model import put_prompt

from torch import nn


def apply_delta(
    model: nn.Module,
    kind: str = "lora",
    targets: str | Sequence[str] | None = None,
    *,
    name: str = "default",
    exclude: Sequence[str] | None = None,
    freeze: bool = True,
    also_train: Sequence[str] | None = None,
    strict: bool = True,
    dtype: Any = None,
    **options: Any,
) -> DeltaReport:
    """Put a delta on a model, in place: small trainable parameters beside weights that stay as they are.

    Args:
        model: any model.
        kind: lora, adapter, low_rank_adapter, ia3, miss or shira (on layers), prefix or prompt (act on the whole
            model).
        targets: layers by globs over whole module paths (["*query", "*value"]), a plain path for everything below
            it, or "all-linear" (the default): every linear layer but the output embedding. For prefix the attention
            layers (None: all), for prompt the embedding of the tokens (None: found by itself).
        name: one of several deltas on the same base.
        exclude: globs of targets left alone.
        freeze: stop everything else from training; `remove_delta` puts the flags back.
        also_train: globs of base parameters that train as well, for example ["*classifier*"].
        strict: whether an unmatched pattern or an unfit layer is an error; otherwise it is in the report.
        dtype: of the new parameters; None means float32, also over a half-precision base, which trains stably.
        options: of the kind. lora: rank, alpha (None: twice the rank), dropout, rslora, dora, init ("kaiming",
            "gaussian", "pissa"; "gradient" and "activations" read it from calibration=, a list of batches, the first
            with loss=f(model, batch), None: the loss that the model gives itself), ranks and alphas ({glob: number}),
            keep_zeros (None: on sparse layers), base_dtype ("int8", "bfloat16": the layers' own weights are held in
            it). adapter: bottleneck_size, non_linearity. low_rank_adapter: reduction_factor, low_rank_size,
            low_rank_w_init, non_linearity. ia3: feedforward (globs of the targets whose inputs are scaled, not
            outputs). miss: rank, repeat, dropout. shira: rank, support ("nonzero", "magnitude", "random"), seed.
            prefix: prefix_token_num, projection, mid_dim, dropout_rate, inputs (one batch,
            where a model has no dummy inputs of its own), or sizes ({path: (heads, width, query heads)}) instead of
            a run, positions (globs over the modules that are given position numbers, which then begin behind the
            prefix; None: those of Hugging Face models do, others stay as they are). prompt: num_virtual_tokens.
            prefix and prompt begin as init says ("vocabulary": as tokens drawn by seed, "random"; None: a prompt as
            tokens, a prefix at random), or as a text: text with tokenizer (of transformers or tokenizers, or its
            folder), or text_ids.

    Returns:
        The layers changed, what was skipped, and the share of parameters that train now (print it).

    Raises:
        ArgumentTypeError, ArgumentError: an argument is of the wrong type or value, a name is taken, a rank exceeds a
            layer's size.
        PatternError: no target matched, or (strict) a pattern matched nothing.
        UnsupportedError: a target is of a kind that the delta cannot go on.
        In every case the model is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(apply_delta(net, "lora", targets=["0"], rank=2, alpha=4))
        lora 'default' on 1 layers
        32 of 122 parameters train (26.2295%), in 2 tensors
    """
    model = bridge.unwrapped(bridge.check_model(model))
    return steps.apply_kind(
        access,
        model,
        kind,
        targets,
        {"prefix": put_prefix, "prompt": put_prompt},
        name=name,
        exclude=exclude,
        freeze=freeze,
        also_train=also_train,
        strict=strict,
        dtype=dtype,
        options=options,
    )


def merge_delta(model: nn.Module, *, unload: bool = False) -> DeltaReport:
    """Put every active LoRA, IA3, MiSS and SHiRA into the weights, in place: the model runs at the base's speed.

    Args:
        model: a model with deltas of these kinds on it. A layer whose delta keeps zeros stays as sparse as it was.
        unload: also put the original layers back, now with merged weights, and forget the deltas. Otherwise a copy
            of each weight is kept, and `unmerge_delta` restores it bit for bit.

    Returns:
        The layers merged.

    Raises:
        ArgumentError: no delta, or merged already.
        UnsupportedError: a delta that cannot be merged (adapters), or a weight shared with another module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> report = apply_delta(net, "lora", ["0"], rank=2)
        >>> sorted(merge_delta(net, unload=True).layers)
        ['0']
    """
    model = bridge.unwrapped(bridge.check_model(model))
    report = steps.merge(access, model, unload=unload)
    merged.watch(model)
    return report


def unmerge_delta(model: nn.Module) -> DeltaReport:
    """Put back the weights as they were before `merge_delta`, bit for bit, in place; the deltas are active again.

    Args:
        model: a model with merged deltas.

    Returns:
        The layers restored.

    Raises:
        ArgumentError: nothing is merged.
    """
    model = bridge.unwrapped(bridge.check_model(model))
    report = steps.unmerge(access, model)
    merged.forget(model)
    return report


def remove_delta(model: nn.Module, names: str | Sequence[str] | None = None) -> DeltaReport:
    """Take deltas off a model, in place; without any left it is bit for bit what it was, flags included.

    Args:
        model: a model with deltas, merged or not.
        names: the deltas to take off; None means all.

    Returns:
        The layers changed.

    Raises:
        ArgumentError: no delta, or none of that name.
        UnsupportedError: a layer was built by hand as a delta layer, so that there is none to put back.
    """
    model = bridge.unwrapped(bridge.check_model(model))
    report = steps.remove(access, model, names)
    merged.watch(model)
    return report


def set_delta(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Choose which named deltas act, in place; a delta with a head of its own brings it along.

    Args:
        model: a model with deltas.
        names: one name, several, or {name: weight} for a weighted combination of LoRAs; all others are off.

    Returns:
        The active deltas with their weights.

    Raises:
        ArgumentError: an unknown name, or the deltas are merged.
        UnsupportedError: two of them have values of their own for the same parameter of the base, or one that is no
            LoRA is given a weight other than 0 or 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("formal", "brief"):
        ...     report = apply_delta(net, "lora", ["0"], rank=2, name=name)
        >>> set_delta(net, {"formal": 0.7, "brief": 0.3})
        {'formal': 0.7, 'brief': 0.3}
    """
    return steps.activate(access, bridge.unwrapped(bridge.check_model(model)), names)


@contextlib.contextmanager
def disable_delta(model: nn.Module) -> Iterator[None]:
    """Run the base alone while the context is open; the deltas act again afterwards, also after an error.

    The base is alone: LoRAs, adapters, prefixes and prompts do not act, and what trains with them (`also_train`, a
    head that came from a file) has the base's values.

    Args:
        model: a model with deltas, not merged.

    Raises:
        ArgumentError: no delta, or the deltas are merged.
    """
    with steps.disabled(access, bridge.unwrapped(bridge.check_model(model))):
        yield


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups in which LoRA's b learns `ratio` times as fast as everything else that trains.

    Args:
        model: a model with LoRA on it.
        lr: learning rate of a (and of all else that trains).
        ratio: learning rate of b over that of a; 16 is the paper's advice.
        weight_decay: of all groups.

    Returns:
        Parameter groups for any optimizer.

    Raises:
        ArgumentError: no lora_b trains.

    Source:
        Hayou, Ghosh & Yu 2024, "LoRA+", section 4.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> report = apply_delta(net, "lora", ["0"], rank=2)
        >>> [group["lr"] for group in lora_plus_groups(net, 1e-4)]
        [0.0016, 0.0001]
    """
    named = [(n, p) for n, p in bridge.check_model(model).named_parameters() if p.requires_grad]
    return plus.plus_groups(named, lr, ratio, weight_decay)
