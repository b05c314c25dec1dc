"""What a Hugging Face model computes from its configuration when it is made: numbers, and tensors in no file."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.lazy import library
from slimkit.core.prune.attributes import Field
from slimkit.core.prune.plan import Derived, PrunePlan
from slimkit.trace.watch import named_tensors

import torch
from torch import nn


def build(model: nn.Module, values: Mapping[str, Any] | None = None) -> nn.Module:
    """A model of the same class from its configuration, without weights; raises what its code raises.

    Args:
        model: the model; it is left alone.
        values: fields (those of a configuration inside another one with its name before them) that shall be other.
    """
    config: Any = copy.deepcopy(model.config)
    for name, value in (values or {}).items():
        *inside, leaf = name.split(".")
        owner = functools.reduce(getattr, inside, config)
        held = getattr(owner, leaf, None)
        setattr(owner, leaf, type(held)(value) if isinstance(held, (list, tuple)) else value)
    if hasattr(config, "validate"):
        config.validate()  # as saving and loading do
    accelerate = library("accelerate", "torch")
    # Buffers stay real: some constructors compute with them.
    with accelerate.init_empty_weights(include_buffers=False):
        built: nn.Module = type(model)(config)
    return built


def unsaved(model: nn.Module) -> set[str]:
    """The parameters and floating-point buffers that a saved model lacks, so that loading computes them anew."""
    return bridge.unsaved(model, (path for path, _ in named_tensors(model)))


def derived_numbers(model: nn.Module, config: Mapping[str, tuple[Field, Field]]) -> Derived:
    """Numbers in modules that become others when the configuration does, such as a scale by the root of a width.

    Args:
        model: the model.
        config: field -> (before, after).

    Returns:
        Module -> attribute or buffer -> (what the model holds, what one of the new configuration holds), where these
        differ.
    """
    found: Derived = {}
    if config:
        old, new = (
            dict(build(model, {name: pair[k] for name, pair in config.items()}).named_modules()) for k in range(2)
        )
        for path, module in model.named_modules():
            before, after = (_numbers(made[path]) if path in made else {} for made in (old, new))
            for name, held in _numbers(module).items():
                # What the configuration does not decide is the model's own.
                if name in before and name in after and float(before[name]) != float(after[name]):
                    made = held.new_tensor(float(after[name])) if isinstance(held, torch.Tensor) else after[name]
                    if float(made) != float(held):
                        found.setdefault(path, {})[name] = (float(held), float(made))
    return found


def told_attributes(
    model: nn.Module, config: Mapping[str, tuple[Field, Field]], among: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Whole numbers in modules that become others when the configuration does.

    Args:
        model: the model.
        config: field -> (before, after).
        among: module -> attributes that are asked about.

    Returns:
        Module -> attribute -> (what the model holds, what one of the new configuration holds), where these differ.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    if not config:
        return found
    old, new = (dict(build(model, {n: pair[k] for n, pair in config.items()}).named_modules()) for k in range(2))
    for path, names in among.items():
        for name in names:
            held, before, after = (getattr(m.get(path), name, None) for m in (dict(model.named_modules()), old, new))
            # What the configuration does not decide is the model's own.
            if type(held) is int and held == before and type(after) is int and after != held:
                found.setdefault(path, {})[name] = (held, after)
    return found


def with_derived(model: nn.Module, plan: PrunePlan) -> PrunePlan:
    """The plan with the numbers that its configuration gives, where it was written before plans told them."""
    made = plan.desc.get("made", {})
    if "derived" in plan.desc or not plan.config or made.get("form") not in ("config", "padded"):
        return plan
    return PrunePlan({**plan.desc, "derived": derived_numbers(model, plan.config)})


def put_numbers(model: nn.Module, derived: Derived) -> Iterator[tuple[nn.Module, str, Any]]:
    """What is to be set so that a model holds derived numbers: (module, attribute or buffer, value)."""
    modules = dict(model.named_modules())
    for path, numbers in derived.items():
        for name, (_, new) in numbers.items():
            held: Any = getattr(modules[path], name, None) if path in modules else None
            if isinstance(held, torch.Tensor):
                yield modules[path], name, held.new_tensor(new)
            elif isinstance(held, float):
                yield modules[path], name, new


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The numbers of a module that are no whole ones: floats, and tensors of one number that are no parameters."""
    out: dict[str, Any] = {}
    for store in (vars(module), module._buffers):
        for name, value in store.items():
            if isinstance(value, torch.Tensor):
                if value.dim() == 0 and value.is_floating_point() and value.device.type != "meta":
                    out[name] = value
            elif isinstance(value, float):
                out[name] = value
    return out
