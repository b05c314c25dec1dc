"""Modules that the tracer takes as one operator, and what they are made of in the neutral graph: recurrent networks,
observers and fake quantisation. Their own code runs kernels that shapes alone cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)
from slimkit.trace.readers import Emit

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

# rule(emit, module, args, kwargs) -> what the module returns; emit as readers have it
ModuleRule = Callable[[Emit, Any, tuple[Any, ...], dict[str, Any]], Any]


def rule_of(module: nn.Module) -> ModuleRule | None:
    """The rule for a module's class, or None to watch its code."""
    if isinstance(module, nn.RNNBase):
        return recurrent
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.ao.quantization")}
    if "FakeQuantizeBase" in kinds:
        return fake_quantize
    return observe if "ObserverBase" in kinds else None


def _like(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def recurrent(emit: Emit, module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """LSTM, GRU and RNN: every gate and the state have the hidden width, which the recurrent weights read again."""
    given = args[0] if args else kwargs["input"]
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    x = given.data if isinstance(given, PackedSequence) else given
    if x.shape[-1] != module.input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size {module.input_size}, got {x.shape[-1]}")
    lead = list(x.shape[:-1])  # (batch, time), (time, batch), (time,) or the rows of a packed sequence
    sides = ("", "_reverse") if module.bidirectional else ("",)
    width = module.proj_size or module.hidden_size
    starts = state if isinstance(state, tuple) else (state,) if state is not None else ()
    cells: list[torch.Tensor] = []
    tips: list[torch.Tensor] = []
    for layer in range(module.num_layers):
        outputs = []
        for suffix in sides:
            end = f"l{layer}{suffix}"
            cell, made = _direction(emit, module, x, lead, end)
            cells.append(cell)
            outputs.append(made)
        tips.extend(outputs)
        x = outputs[0]
        if len(outputs) > 1:
            x = _like(x, *lead, 2 * width)
            emit("concat", outputs, [x], axis=len(lead))
    # One hidden_size speaks of all layers and directions.
    for alike in (cells, tips):
        emit("elementwise", alike, [_like(x, *alike[0].shape)], fn="alike")

    def features(source: torch.Tensor) -> torch.Tensor:
        """Its last axis alone."""
        flat = _like(x, source.shape[-1])
        emit("reduce", [source], [flat], axes=list(range(source.dim() - 1)), keepdim=False, fn="sum")
        return flat

    states = (tips[-1], cells[-1]) if isinstance(module, nn.LSTM) else (tips[-1],)
    for start, end in zip(starts, states):
        if start.shape[-1] != end.shape[-1]:
            raise RuntimeError(f"Expected hidden size of {end.shape[-1]}, got {start.shape[-1]}")
        emit("elementwise", [features(start), features(end)], [_like(x, end.shape[-1])], fn="start")
    batch = [] if isinstance(given, torch.Tensor) and given.dim() == 2 else [_batch(module, given)]
    ends = []
    for end in states:
        last = _like(x, module.num_layers * len(sides), *batch, end.shape[-1])
        one = _like(x, *[1] * (last.dim() - 1), end.shape[-1])
        emit("reshape", [features(end)], [one])
        emit("expand", [one], [last])
        ends.append(last)
    out: Any = x
    if isinstance(given, PackedSequence):
        out = PackedSequence(x, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
    return out, tuple(ends) if isinstance(module, nn.LSTM) else ends[0]


def _batch(module: nn.RNNBase, given: Any) -> int:
    if isinstance(given, PackedSequence):
        return int(given.batch_sizes[0])
    return int(given.shape[0 if module.batch_first else 1])


def _direction(emit: Emit, module: nn.RNNBase, x: torch.Tensor, lead: list[int], end: str) -> tuple[torch.Tensor, ...]:
    """One layer in one direction, as one step of it (gates from the input and from the state before): its cell and its
    output, which are the same without a projection."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    p: dict[str, Any] = {name: getattr(module, f"{name}_{end}", None) for name in names}
    n_hidden = module.hidden_size
    n_gates = p["weight_hh"].shape[0] // n_hidden
    if n_gates * n_hidden != p["weight_hh"].shape[0] or (not module.proj_size and p["weight_hh"].shape[1] != n_hidden):
        raise RuntimeError(f"weight_hh_{end} does not fit hidden_size {n_hidden}")

    def gates(source: torch.Tensor, weight: Any, bias: Any) -> list[torch.Tensor]:
        both = _like(x, *lead, n_gates * n_hidden)
        emit("linear", [source, weight, bias], [both])
        parts = [_like(x, *lead, n_hidden) for _ in range(n_gates)]
        emit("split", [both], parts, axis=len(lead), sizes=[n_hidden] * n_gates)
        return parts

    def projected(cell: torch.Tensor) -> torch.Tensor:
        if not module.proj_size:
            return cell
        out = _like(x, *lead, module.proj_size)
        emit("linear", [cell, getattr(module, f"weight_hr_{end}"), None], [out])
        return out

    first, cell = _like(x, *lead, n_hidden), _like(x, *lead, n_hidden)
    emit("elementwise", gates(x, p["weight_ih"], p["bias_ih"]), [first], fn="gates")
    emit("elementwise", [first, *gates(projected(first), p["weight_hh"], p["bias_hh"])], [cell], fn="gates")
    return cell, projected(cell)


def observe(emit: Emit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An observer hands its input on; what it has seen of single channels is cut with them."""
    x = args[0]
    ranges = [b for b in module.buffers() if b.dim() == 1 and b.numel() > 1]
    axis = getattr(module, "ch_axis", -1)
    if not ranges or axis < 0 or any(b.numel() != x.shape[axis] for b in ranges):
        return x
    out = _like(x, *x.shape)
    wide = []
    for one in ranges:
        shape = [one.numel() if k == axis else 1 for k in range(x.dim())]
        wide.append(_like(x, *shape))
        emit("reshape", [one], [wide[-1]])
    emit("elementwise", [x, *wide], [out], fn="fake_quantize")
    return out


def fake_quantize(emit: Emit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same values on a grid; a grid for each channel is cut with it."""
    return observe(emit, module, args, kwargs)
