"""Freezing for MindSpore: flags set by the rules of slimkit.core.freeze."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from slimkit.core import freeze as rules
from slimkit.core.freeze import FreezeReport
from slimkit.core.freezer import Freezer, FreezerLayer, LayerGroup
from slimkit_ms import bridge, kinds

from mindspore import nn

__all__ = [
    "FreezeReport",
    "FreezerLayer",
    "LayerGroup",
    "ModelFreezer",
    "freeze_delta",
    "freeze_from_config",
    "freeze_modules",
    "trainable_summary",
]


def freeze_modules(
    model: nn.Cell,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    strict: bool = True,
) -> FreezeReport:
    """Freeze what `include` names and train what `exclude` names, in place; call it before making an optimizer.

    Args:
        model: the model.
        include: globs over whole parameter names ("*.dense.*"), or plain names of parameters and modules: they stop
            training. None: nothing.
        exclude: the same, for what trains. What both lists match is left as it is.
        strict: whether a pattern that matches nothing is an error; otherwise it is in the report.

    Returns:
        What was frozen and trained, and a summary of what trains now (print it).

    Raises:
        ArgumentTypeError: `model` is no mindspore.nn.Cell, or a list is not a non-empty list of str.
        ArgumentError: both lists are None.
        PatternError: a pattern matches nothing, or is not safe.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 1))
        >>> freeze_modules(net, include=["0"]).frozen
        ('0.weight', '0.bias')
    """
    found = bridge.parameters(bridge.check_model(model))
    return rules.train_by_lists(found, include, exclude, strict=strict)


def freeze_delta(
    model: nn.Cell,
    mode: str,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    strict: bool = True,
) -> FreezeReport:
    """Freeze everything but what one way of tuning trains, in place; call it before making an optimizer.

    Args:
        model: the model, its delta layers already in place.
        mode: lora, prefixtuning (or prefix), adapter, low_rank_adapter, ia3, miss, shira, bitfit, prompttuning (or
            prompt) or ptuning2, in any letter case.
        include: further globs or names to freeze, applied after the mode.
        exclude: further globs or names to train, for example ["*head*"]. What both lists match stays as the mode
            left it.
        strict: whether a mode or a pattern that finds nothing is an error; otherwise it is in the report.

    Returns:
        What was frozen and trained, and a summary of what trains now (print it).

    Raises:
        ArgumentTypeError: `model` is no mindspore.nn.Cell, or a list is not a non-empty list of str.
        ArgumentError: an unknown mode, or the model has nothing that the mode trains.
        PatternError: a pattern matches nothing, or is not safe.

    Source:
        bitfit: Ben Zaken, Ravfogel & Goldberg 2022, "BitFit", section 3; the others: see docs/delta.md.

    Example:
        >>> freeze_delta(nn.Dense(2, 2), "bitfit").trainable_count
        2
    """
    found = bridge.parameters(bridge.check_model(model))
    return rules.train_by_mode(found, mode, include, exclude, strict=strict)


def freeze_from_config(model: nn.Cell, config_path: str | os.PathLike[str], *, strict: bool = True) -> FreezeReport:
    """Freeze by the `freeze` section (include, exclude) of a YAML file, in place.

    Args:
        model: the model.
        config_path: the file: `freeze:` with `include:`, `exclude:` or both, as in freeze_modules.
        strict: whether a pattern that matches nothing is an error; otherwise it is in the report.

    Returns:
        What was frozen and trained, and a summary of what trains now (print it).

    Raises:
        ArgumentTypeError: `model` or `config_path` is of the wrong type, or a list is not a non-empty list of str.
        ArgumentError: `config_path` is empty, or both lists are.
        ReadYamlFileError: the file is missing, a link, or not YAML.
        ModelConfigFreezeInfoError: the file has no usable `freeze` section.
        PatternError: a pattern matches nothing, or is not safe.
    """
    bridge.check_model(model)
    include, exclude = rules.read_config(config_path)
    return freeze_modules(model, include, exclude, strict=strict)


def trainable_summary(model: nn.Cell) -> FreezeReport:
    """What trains in a model now; print it for the share and the list.

    Args:
        model: the model; nothing is changed.

    Returns:
        The report of a freezing call that did nothing.

    Example:
        >>> print(trainable_summary(nn.Dense(2, 2)))
        6 of 6 parameters train (100.0000%), in 2 tensors
             1 x weight  4
             1 x bias  2
    """
    return rules.report_of(bridge.parameters(bridge.check_model(model)))


class ModelFreezer(Freezer):
    """Freeze and unfreeze a model by its layer groups: the direct children of the model, in order.

    Every parameter trains once the freezer is made. Parameters held by the model itself, in none of its children, go
    with group 0.

    Args:
        model: the model, with at least one child.
        freeze_batch_norms: whether `freeze` also takes batch norms; by default they go on training, and keep their
            mode, since frozen statistics of another data set often hurt.

    Raises:
        ArgumentTypeError: `model` is no mindspore.nn.Cell, or the flag no bool.
        ArgumentError: the model has no children.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 1))
        >>> frozen = ModelFreezer(net).freeze()
        >>> [p.requires_grad for p in net.get_parameters()]
        [False, False, True, True]
    """

    def __init__(self, model: nn.Cell, freeze_batch_norms: bool = False) -> None:
        super().__init__(bridge.check_model(model), freeze_batch_norms)

    def _children(self, module: Any) -> list[Any]:
        return list(module.cells())

    def _modules(self, module: Any) -> list[Any]:
        return [cell for _, cell in module.cells_and_names()]

    def _parameters(self, module: Any, *, own: bool = False) -> list[Any]:
        held, found = module._params.values() if own else None, bridge.parameters(module)
        return [
            parameter
            for parameter, (_, _, may_train) in zip(found.held, found.readings())
            if may_train and (held is None or any(parameter is own for own in held))
        ]

    def _is_batch_norm(self, module: Any) -> bool:
        return kinds.is_batch_norm(module)

    def _is_training(self, module: Any) -> bool:
        return bool(module.training)

    def _set_training(self, module: Any, mode: bool) -> None:
        module.training = mode
