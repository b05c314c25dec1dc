"""Cutting a torch model: parameters, buffers and the attributes that speak of their sizes, all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from slimkit import renorm
from slimkit.attention import PrunedMultiheadAttention
from slimkit.core.errors import GraphError, PlanError
from slimkit.core.prune.attributes import rewritten
from slimkit.core.prune.plan import PrunePlan
from slimkit.derived import put_numbers
from slimkit.kinds import is_in_out, is_kind, kind_of
from slimkit.trace.watch import named_tensors

import torch
from torch import nn

# Besides the families of `kinds`, modules whose attributes follow from their weights.
_SETTLED = (nn.MultiheadAttention, nn.PReLU)
Shapes = Mapping[str, tuple[int, ...]]
# What an attribute holds that is not there.
_ABSENT = object()
Axes = list["np.ndarray[Any, Any] | None"]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by path, tied ones once, under their first name."""
    found: dict[int, str] = {}
    out = {}
    for path, tensor in named_tensors(model):
        if id(tensor) not in found:
            found[id(tensor)] = path
            out[path] = tensor
    return out


def integers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Module path -> whole-number attributes, without those that its own weights settle."""
    out = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or kind_of(module) or isinstance(module, _SETTLED):
            continue
        numbers = {k: _number(v) for k, v in vars(module).items() if k[0] != "_" and _number(v) > 1}
        if numbers:
            out[path] = numbers
    return out


def _number(value: Any) -> int:
    """A whole number, written as such or as a shape of one axis; 0 for anything else."""
    if type(value) in (tuple, list, torch.Size) and len(value) == 1:
        value = value[0]
    return value if type(value) is int else 0


def settled(path: str, module: nn.Module, shapes: Shapes, groups: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """Attributes of a known layer as its weights' shapes give them.

    Args:
        path: the module's path.
        module: the layer.
        shapes: shapes of all parameters after the cut.
        groups: module path -> (attribute, number of groups after the cut).

    Returns:
        attribute -> new value; empty for a module that is no known layer.
    """
    weight = shapes.get(f"{path}.weight" if path else "weight")
    if is_kind(module, "conv") and weight:
        n_groups = groups[path][1] if path in groups else module.groups
        made, read = (weight[1] * n_groups, weight[0]) if module.transposed else (weight[0], weight[1] * n_groups)
        return {"out_channels": made, "in_channels": read, "groups": n_groups}
    if isinstance(module, nn.Linear) and weight:
        return {"out_features": weight[0], "in_features": weight[1]}
    if is_in_out(module) and weight:
        return {"nx": weight[0], "nf": weight[1]}
    if "num_features" in vars(module) and is_kind(module, "norm"):  # of batches, of instances
        shape = weight or shapes.get(f"{path}.running_mean")
        return {"num_features": shape[0]} if shape else {}
    if isinstance(module, nn.GroupNorm):
        out = {"num_groups": groups[path][1]} if path in groups else {}
        return {**out, "num_channels": weight[0]} if weight else out
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight:
        return {"normalized_shape": tuple(weight)}
    if isinstance(module, nn.Embedding) and weight:
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU) and weight:
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.RNNBase):
        n_gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        ahead, again = shapes[_of(path, "weight_ih_l0")], shapes[_of(path, "weight_hh_l0")]
        projected = again[1] if module.proj_size else 0
        return {"input_size": ahead[1], "hidden_size": again[0] // n_gates, "proj_size": projected}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": shapes[_of(path, "weight_ih")][1], "hidden_size": shapes[_of(path, "weight_hh")][1]}
    if isinstance(module, nn.MultiheadAttention):
        return _attention(path, module, shapes)
    return {}


def _of(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _attention(path: str, module: nn.MultiheadAttention, shapes: Shapes) -> dict[str, Any]:
    embed = shapes[f"{path}.out_proj.weight"][0]
    inner = shapes[f"{path}.out_proj.weight"][1]
    head_dim = module.head_dim
    out: dict[str, Any] = {"embed_dim": embed, "num_heads": inner // head_dim}
    for name in ("k", "v"):
        separate = shapes.get(f"{path}.{name}_proj_weight")
        out[f"{name}dim"] = separate[1] if separate else embed
    if inner != embed or embed % out["num_heads"] or embed // out["num_heads"] != head_dim:
        # torch's own forward takes the size of a head from the width of its input.
        out.update(__class__=PrunedMultiheadAttention, _qkv_same_embed_dim=False)
    return out


class Changes:
    """Attribute changes that can be taken back."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name, _ABSENT)
        if old is value or (type(old) is type(value) and old == value):
            return
        self._done.append((owner, name, old))
        setattr(owner, name, value)

    def put(self, store: dict[str, Any], key: str, value: Any) -> None:
        self._done.append((store, key, store[key]))
        store[key] = value

    def undo(self) -> None:
        for owner, name, old in reversed(self._done):
            if isinstance(owner, dict):
                owner[name] = old
            elif old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._done.clear()


def rewrite(model: nn.Module, plan: PrunePlan, shapes: Shapes, names: Mapping[str, str], changes: Changes) -> None:
    """Make every attribute say the widths after the cut, in place; `changes` can take it back.

    Args:
        model: the model.
        plan: the plan.
        shapes: shapes of all parameters after the cut, by the model's own paths.
        names: the plan's parameter paths -> the model's.
        changes: receives what was done.

    Raises:
        PlanError: an attribute of the plan is missing or says something else in this model.
    """
    modules = dict(model.named_modules())
    found = tensors(model)
    changed = {id(found[names[p]]) for p in plan.indices}
    touched = set(plan.groups)
    for path, module in modules.items():
        # By identity, so that every module which shares a tied weight learns of its new shape.
        if any(id(t) in changed for store in (module._parameters, module._buffers) for t in store.values()):
            touched |= {path, path.rpartition(".")[0]}
    for path, module in modules.items():
        if path in touched:
            for name, value in settled(path, module, shapes, plan.groups).items():
                changes.set(module, name, value)
    for path, wanted in plan.attributes.items():
        if path not in modules:
            raise PlanError(f"desc was made for a model with a module {path!r}, and this model has none")
        for name, (old, new) in wanted.items():
            held = getattr(modules[path], name, None)
            here = _number(held) or held
            if plan.framework == "torch" and here != old:
                raise PlanError(f"desc was made for a model whose {path}.{name} is {old}, and here it is {here!r}")
            if here == old:
                kind: Any = type(held)
                changes.set(modules[path], name, new if kind is int else kind((new,)))
    for module in modules.values():
        inside = isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, PrunedMultiheadAttention) for m in module.modules()
        )
        if inside and module.use_nested_tensor:
            # torch's fused layer reads nested tensors, and only attention as torch makes it goes there.
            changes.set(module, "use_nested_tensor", False)
    config = getattr(model, "config", None)
    for owner, name, new in rewritten(config, plan.config):
        changes.set(owner, name, new)
    for owner, name, new in put_numbers(model, plan.derived):
        changes.set(owner, name, new)


@contextlib.contextmanager
def rehearsing(model: nn.Module, plan: PrunePlan, names: Mapping[str, str], real: bool = False) -> Iterator[set[str]]:
    """Attributes and shapes of the model as after the cut, while the context is open; values are made up.

    Args:
        model: the model; it is as it was when the context closes.
        plan: the plan.
        names: the plan's parameter paths -> the model's.
        real: the stand-ins hold numbers, for models that must be computed.

    Yields:
        The modules that the cut replaces by a class of ours.
    """
    changes = Changes()
    try:
        shapes = shapes_after(model, plan, names)
        rewrite(model, plan, shapes, names, changes)
        found = tensors(model)
        changed = {id(tensor) for path, tensor in found.items() if shapes[path] != tuple(tensor.shape)}
        for module in model.modules():
            # What one module holds lies on one device: torch's own code (weight normalisation) looks at that.
            own = {id(t) for t in module._parameters.values() if t is not None}
            changed |= own if own & changed else set()
        stand_ins = {id(t): _stand_in(t, shapes[path], real) for path, t in found.items() if id(t) in changed}
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if id(tensor) in stand_ins:
                        changes.put(store, key, stand_ins[id(tensor)])
        yield {p for p, m in model.named_modules() if isinstance(m, PrunedMultiheadAttention)}
    finally:
        changes.undo()


def _stand_in(tensor: torch.Tensor, shape: tuple[int, ...], real: bool) -> torch.Tensor:
    made = torch.empty(shape, dtype=tensor.dtype, device="meta")
    if real:
        made = tensor.detach()
        for axis, size in enumerate(shape):
            made = made.narrow(axis, 0, size)
        made = made.clone()
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def shapes_after(model: nn.Module, plan: PrunePlan, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers after the cut, tied ones under each of their names."""
    wanted = {names[p]: s for p, s in plan.sizes().items()}
    first = {id(t): p for p, t in tensors(model).items()}
    return {p: wanted.get(first[id(t)], tuple(t.shape)) for p, t in named_tensors(model)}


def cut(model: nn.Module, plan: PrunePlan, names: Mapping[str, str]) -> Callable[[], None]:
    """Cut parameters, buffers and attributes, in place; on an error the model is as it was.

    Args:
        model: the model.
        plan: what to keep.
        names: the plan's parameter paths -> the model's.

    Returns:
        A call that takes the cut back.
    """
    found = tensors(model)
    done: list[Callable[[], None]] = []
    changes = Changes()

    def undo() -> None:
        for take_back in reversed(done):
            take_back()
        done.clear()
        changes.undo()

    try:
        rewrite(model, plan, shapes_after(model, plan, names), names, changes)
        kept = {names[path]: partial(select, axes=axes) for path, axes in plan.indices.items()}
        factors = renorm.follow(model, found, kept)
        for path, axes in plan.indices.items():
            done.append(_resize(found[names[path]], axes))
        for path, factor in factors.items():
            done.append(_scale(found[path], factor))
        zeros = {
            names[path]: axes for path, axes in plan.zeros().items() if isinstance(found[names[path]], nn.Parameter)
        }
        for path, filled in renorm.with_zeros(model, found, zeros).items():
            done.append(_put(found[path], filled))
    except BaseException:
        undo()
        raise
    return undo


def _scale(tensor: torch.Tensor, factor: torch.Tensor) -> Callable[[], None]:
    """Multiply a tensor's values, in place; returns a call that takes it back."""
    return _put(tensor, tensor.data * factor.to(tensor.dtype))


def _put(tensor: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    """Give a tensor other values of the same shape, in place; returns a call that takes it back."""
    old = tensor.data
    tensor.data = values

    def take_back() -> None:
        tensor.data = old

    return take_back


def _resize(tensor: torch.Tensor, axes: Axes) -> Callable[[], None]:
    """Cut a tensor and its gradient, in place; returns a call that takes it back.

    The Parameter itself stays, so that tied names, hooks, optimizers and references go on meaning it.
    """
    data, grad = tensor.data, tensor.grad
    fresh = select(data, axes)
    fresh_grad = None if grad is None else select(grad, axes)
    handle = None
    tracked = tensor.requires_grad and not tensor.is_inference()
    if tracked:
        # Nothing but graphs from before the cut holds this node; it dies at once where there is none.
        node = torch.autograd.graph.get_gradient_edge(tensor).node
        handle = node.register_prehook(_outdated)
    set_data(tensor, fresh, fresh_grad)

    def take_back() -> None:
        if handle is not None:
            handle.remove()
        set_data(tensor, data, grad)

    if tracked:
        # A graph that saved the old values must not go on with the new ones.
        torch.autograd.graph.increment_version(tensor)
    return take_back


def set_data(tensor: torch.Tensor, data: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Give a tensor other values of another shape, and the gradient that belongs to them, in place."""
    tensor.grad = None
    if tensor.is_floating_point() or tensor.is_complex():
        # While any old graph lives, autograd goes on checking gradients against the shape that its accumulator saw.
        # It makes a new accumulator only where the dtype (or device) changes: hence the detour over another dtype.
        detour = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=detour, device=tensor.device)
    tensor.data = data
    tensor.grad = grad


def _outdated(_gradients: Any) -> None:
    raise GraphError(
        "this backward pass goes through a graph from before the model was pruned; run the model again for a new one"
    )


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, cut: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Whatever is done to a model while the context is open is taken back when an error leaves it.

    Args:
        model: the model.
        cut: tensors that are given other data before anything is written into them; the others are copied.
    """
    modules = [(m, type(m), dict(vars(m))) for m in model.modules()]
    stores = [(s, dict(s)) for m, _, _ in modules for s in (m._parameters, m._buffers, m._modules)]
    held = {id(t): t for m, _, _ in modules for s in (m._parameters, m._buffers) for t in s.values() if t is not None}
    replaced = {id(t) for t in cut}
    old = [(t, t.data, t.grad, None if id(t) in replaced else t.detach().clone()) for t in held.values()]
    extra = [
        (m, m.get_extra_state()) for m, kind, _ in modules if kind.get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    except BaseException:
        for module, kind, state in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        for store, entries in stores:
            store.clear()
            store.update(entries)
        for tensor, data, grad, values in old:
            if tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
                set_data(tensor, data, grad)
            if values is not None:
                data.copy_(values)
        for module, value in extra:
            module.set_extra_state(value)
        raise


def select(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """The kept indices of a tensor, as a new one; an axis whose indices are None stays as it is."""
    # The axis that shrinks most goes first, so that later ones copy less.
    order = sorted((len(i) / tensor.shape[a], a) for a, i in enumerate(axes) if i is not None)
    for _, axis in order:
        index = axes[axis]
        assert index is not None
        if len(index) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
    return tensor if tensor.layout != torch.strided else tensor.contiguous()
