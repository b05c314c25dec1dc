"""Why a weight is left alone: matrices that belong to no layer that can be sparse, and parts of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slimkit.core.replay import is_own

# What an adapter of PEFT's kind wraps: the children of its classes that are the model's own.
WRAPPED = ("base_layer", "base_model", "model", "modules_to_save")

# How the parameters of this package's deltas are called, all of them.
DELTA = "mindpet_delta_"


def adapter_parts(modules: Mapping[str, Any]) -> dict[str, str]:
    """Paths of modules that are parts of an adapter and no layers of the model, with the reason.

    Args:
        modules: every module by its path, parents first.
    """
    found: dict[str, str] = {}
    for path, _ in modules.items():
        parent, _, own = path.rpartition(".")
        if parent in found:
            found[path] = found[parent]
        elif DELTA in own:
            found[path] = "it is a part of a delta"
        elif path and own not in WRAPPED:
            kind = type(modules.get(parent))
            if "peft" in kind.__module__.split("."):
                found[path] = f"it is a part of an adapter ({kind.__module__}.{kind.__name__})"
    return found


def other_matrices(
    modules: Iterable[tuple[str, Any, Mapping[str, tuple[int, ...]]]], known: Iterable[str]
) -> dict[str, str]:
    """Layers and parameters with a matrix that sparsity does not know, with the reason.

    Args:
        modules: path, module, and the shapes of its own floating-point parameters by name.
        known: paths of layers, modules and parameters that need no word: those that are known, and tables.
    """
    known = set(known)
    found: dict[str, str] = {}
    for path, module, shapes in modules:
        kind = type(module).__name__
        matrices = [key for key, shape in shapes.items() if len(shape) > 1]
        if not matrices or path in known or "norm" in kind.lower():
            continue
        if is_own(type(module)):
            found[path] = f"{kind} is not among the layers that can be sparse"
            continue
        # A table of positions, (1, tokens, width), multiplies nothing.
        for key in (key for key in matrices if min(shapes[key]) > 1):
            name = f"{path}.{key}" if path else key
            if name not in known:
                found[name] = f"a parameter of {kind} itself, not of a layer"
    return found
