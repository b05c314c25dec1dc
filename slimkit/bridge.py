"""The only file that asks a torch model anything: names, modules, calls, modes, devices."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.freeze import Parameters, Reading
from slimkit.core.lazy import require
from slimkit.core.log import logger
from slimkit.core.replay import like_mapping, like_sequence
from slimkit.core.weights.coupling import SmallTensor, Structure, computed_names
from slimkit.core.weights.heads import Heads, heads_told_by

require("torch")


def _keep_torch_importable() -> None:
    """torch_npu without its CANN libraries breaks ``import torch`` by autoload; switch that off and say so."""
    if "torch" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return
    try:
        for name in ("libhccl.so", "libascendcl.so"):
            ctypes.CDLL(name)
    except OSError as error:
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        logger.warning("torch_npu is installed and its CANN libraries are not (%s): working without an NPU.", error)


_keep_torch_importable()

from slimkit import kinds as layer_kinds  # noqa: E402

import torch  # noqa: E402
from torch.nn.modules.lazy import LazyModuleMixin  # noqa: E402


def check_model(model: Any, name: str = "model", *, lazy: bool = False) -> torch.nn.Module:
    """Refuse anything but an nn.Module, and one with lazy layers that have no weight yet.

    Args:
        model: what a user handed over.
        name: what the argument is called.
        lazy: whether lazy layers may wait for their first run.

    Example:
        >>> check_model(torch.nn.Linear(2, 2)).in_features
        2
    """
    if not isinstance(model, torch.nn.Module):
        check.wrong_type(name, "a torch.nn.Module", model)
    left, seen = [] if lazy else [model], set()
    while left:  # quicker than named_modules, and every call comes by here
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            here = next(path or "itself" for path, m in model.named_modules() if m is module)
            kind = type(module).__name__
            raise ArgumentError(f"{name}: {here} ({kind}) has no weight yet; run the model on a batch once.")
        left.extend(m for m in module._modules.values() if m is not None)
    return model


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside those that `torch.compile` returned, so that names are its own."""
    while type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    return model


def refuse_offloaded(model: torch.nn.Module, name: str = "model") -> torch.nn.Module:
    """Refuse a model whose weights accelerate keeps elsewhere and brings in for each call only."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "offload", False):
                raise UnsupportedError(
                    f"{name} must hold its weights. Received: one whose weights accelerate offloads "
                    f"(at {path or 'the model'!r}): load it whole, or work on its folder (sparsify_checkpoint, "
                    "prune_checkpoint)"
                )
    return model


def check_whole(model: Any, name: str = "model") -> torch.nn.Module:
    """`check_model`, and refuse a model of which processes hold parts: a part would be taken for all of it."""
    checked = check_model(model, name)
    path = _in_parts(checked)
    if path is not None:
        raise UnsupportedError(
            f"{name} must hold whole parameters. Received: {path}, of which processes hold parts: do this before "
            "fully_shard, or on what save_checkpoint puts together"
        )
    return checked


def is_distributed(tensor: Any) -> bool:
    """Whether processes hold a tensor together: each a part of it, or all of it with a note of that."""
    tensors = sys.modules.get("torch.distributed.tensor")  # importing it only to ask takes long
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_managed(module: torch.nn.Module) -> bool:
    """Whether FSDP gathers the module's parameters for each of its calls."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def _in_parts(model: torch.nn.Module) -> str | None:
    """What processes hold parts of, in words; None for nothing."""
    for path, parameter in model.named_parameters():
        if is_distributed(parameter):
            return repr(path)
    # After a bare forward FSDP2 leaves gathered copies in the outermost module, where writing is lost.
    for path, module in model.named_modules():
        if is_managed(module):
            return repr(path) if path else "a model"
    return None


def refuse_sharded(model: torch.nn.Module, name: str = "model") -> torch.nn.Module:
    """Refuse a model that data-parallel training wraps or shards: it remembers the shapes of its parameters."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise UnsupportedError(
                f"{name} must be the module inside. Received: a {kind} (at {path or 'the model'!r}), whose buckets "
                f"keep the shapes it was made with: prune the module inside, then wrap it anew"
            )
    sharded = _in_parts(model)
    if sharded is not None:
        raise UnsupportedError(f"{name} must hold whole parameters. Received: {sharded}, sharded: prune first")
    return model


def data_parallel_around(model: torch.nn.Module) -> list[str]:
    """The classes of data-parallel modules that hold this one; looked for only where processes work together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    kind = torch.nn.parallel.DistributedDataParallel
    return [type(o).__name__ for o in gc.get_objects() if issubclass(type(o), kind) and model in set(o.modules())]


# What is put around a module to run it, and the child that is the module: its name is none of the model's.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile, whole or of a region
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def _wrapped_child(module: torch.nn.Module) -> str | None:
    """The child's name if a module only wraps another one, else None."""
    kind: Any = type(module)
    return next((name for name in _inner_names(kind) if module._modules.get(name) is not None), None)


@functools.lru_cache(4096)  # every walk asks it of every module
def _inner_names(kind: Any) -> tuple[str, ...]:
    return tuple(_WRAPPERS[k.__name__] for k in kind.__mro__ if k.__name__ in _WRAPPERS)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside compiled, data-parallel and checkpointing ones."""
    while (name := _wrapped_child(module)) is not None:
        module = module._modules[name]
    return module


def named_modules(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module by its path in the plain model, as `nn.Module.named_modules`, without those that wrap one."""
    seen: set[int] = set()
    left = [("", model)]
    while left:  # quicker than generators in one another
        path, held = left.pop()
        module = unwrapped(held)
        if remove_duplicate and id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = reversed(module._modules.items())
        left += [(f"{path}.{name}" if path else name, child) for name, child in children if child is not None]


def get_module(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a dotted path of the plain model; ArgumentError offers the nearest path."""
    module: torch.nn.Module | None = unwrapped(model)
    for part in path.split(".") if path else ():
        child = None if module is None else module._modules.get(part)
        module = None if child is None else unwrapped(child)
    if module is None:
        paths = [n for n, _ in named_modules(model)]
        raise ArgumentError(f"the model has no module {path!r}{check.near(path, paths)}")
    return module


def set_module(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    """Put a module at a dotted path of the plain model, in place; what wraps the one there then wraps the new one."""
    parent, _, name = path.rpartition(".")
    holder = get_module(model, parent)
    while (child := holder._modules.get(name)) is not None and (inner := _wrapped_child(child)) is not None:
        holder, name = child, inner
    setattr(holder, name, module)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    first = next(model.parameters(), None)
    first = next(model.buffers(), None) if first is None else first
    return torch.device("cpu") if first is None else first.device


def to_device(value: Any, device: torch.device | str) -> Any:
    """Tensors in nested tuples, lists and dicts on a device; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return like_mapping(value, {k: to_device(v, device) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return like_sequence(value, [to_device(v, device) for v in value])
    return value


def run(model: torch.nn.Module, batch: Any) -> Any:
    """Call the model on one batch, moved to the model's device."""
    args, kwargs = as_call(to_device(batch, device_of(model)))
    return model(*args, **kwargs)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards, also after an error."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:  # setting an attribute of a module is slow
                module.training = mode


@contextlib.contextmanager
def hooked(modules: Mapping[str, torch.nn.Module], seen: Callable[[str, Any, Any, Any], None]) -> Iterator[None]:
    """Call ``seen(name, args, kwargs, output)`` after each forward of the modules, while the context is open."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs, output: seen(name, args, kwargs, output)

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_ZEROS = "slimkit_made_zeros"


def record_zeros(module: torch.nn.Module) -> None:
    """Note on a layer, in place, that zeros in its weight were made on purpose and are meant to stay."""
    vars(module)[_ZEROS] = True


def record_zeros_of(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Note on the layers of these names, in place, that their zeros were made; names that no layer has pass.

    A part of a parameter has the parameter's name and which part it is: "experts.gate_up_proj[3]",
    "attn.in_proj_weight[query]"; the note is on the module that has the parameter.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, key = name.partition("[")[0].rpartition(".")
        if name in modules:
            record_zeros(modules[name])
        elif path in modules and key in modules[path]._parameters:
            record_zeros(modules[path])


def forget_zeros(module: torch.nn.Module) -> None:
    """Undo `record_zeros`, in place."""
    vars(module).pop(_ZEROS, None)


def has_made_zeros(module: torch.nn.Module) -> bool:
    """Whether zeros in a layer's weight were made on purpose: by slimkit, or by torch.nn.utils.prune."""
    return _ZEROS in vars(module) or ("weight_orig" in module._parameters and "weight_mask" in module._buffers)


def parameters(model: torch.nn.Module) -> Parameters:
    """Every parameter with all its names; a shared parameter comes once."""
    found = Parameters([], [], {}, _readings)
    place: dict[int, int] = {}
    for prefix, module in named_modules(model, remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            path, at = f"{prefix}.{key}" if prefix else key, place.setdefault(id(parameter), len(found.held))
            if at < len(found.held):
                found.further.setdefault(at, []).append(path)
            else:
                found.held.append(parameter)
                found.names.append(path)
    return found


def _readings(held: Sequence[torch.nn.Parameter], paths: Sequence[str]) -> Iterator[Reading]:
    """What torch says of each parameter, when it is asked for."""
    for p in held:
        yield p.numel(), p.requires_grad, p.is_floating_point() or p.is_complex()


def structure(model: torch.nn.Module) -> Structure:
    """What weight pruning asks of a model: shapes, kinds of layer, attention heads, tied and computed tensors."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    missing = unsaved(model, [name for name, _ in held])
    state = {
        n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor) and n not in missing
    }
    kinds: dict[str, str] = {}
    heads: dict[str, Heads] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module)
        for key in (*module._parameters, *module._buffers):
            fused = isinstance(module, torch.nn.MultiheadAttention) and key.startswith("in_proj")
            kinds[f"{path}.{key}" if path else key] = "linear" if fused else kind
        told = heads_told_by(module)
        if told is None and "att" in type(module).__name__.lower():
            told = heads_told_by(getattr(module, "config", None))
        if told is None and path == "":
            told = heads_told_by(getattr(model, "config", None))
        if told is not None:
            heads[path] = told
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return Structure(
        targets={n: SmallTensor(tuple(t.shape), kinds.get(n, "other")) for n, t in state.items()},
        heads=heads,
        tied=tuple(tuple(g) for g in groups.values() if len(g) > 1),
        ignorable=computed_names(missing),
        rotary=any("rotary" in type(m).__name__.lower() for m in model.modules()),
        computed={n: tuple(t.shape) for n, t in held if n in missing and t.is_floating_point()},
    )


def unsaved(model: torch.nn.Module, names: Iterable[str]) -> set[str]:
    """Those of a model's tensors that a saved one lacks, so that loading computes them anew."""
    saved = model.state_dict().keys()
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name for name in names if name not in saved or any(re.search(pattern, name) for pattern in ignored)}


def _kind(module: torch.nn.Module) -> str:
    """The kind of layer, in the words of core.coupling; Hugging Face's Conv1D is a Linear stored transposed."""
    kind = layer_kinds.kind_of(module)
    if kind is None or kind.transposed:
        return "norm" if layer_kinds.is_norm(module) else "other"
    return "linear_t" if kind.in_out else kind.word
