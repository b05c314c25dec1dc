"""The doors: public names that load their room, and so a framework, only when first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from slimkit.core import public
from slimkit.core.errors import MissingFrameworkError

# framework -> (what people call it, the extra that installs it, the sibling package)
_FRAMEWORKS = {
    "torch": ("PyTorch", "slimkit[torch]", "slimkit_ms works with MindSpore"),
    "mindspore": ("MindSpore", "slimkit[mindspore]", "slimkit works with PyTorch"),
}


def require(framework: str) -> None:
    """Raise one helpful line when a framework is not installed.

    Args:
        framework: "torch" or "mindspore".

    Raises:
        MissingFrameworkError: it is not installed.

    Example:
        >>> require("torch")  # doctest: +SKIP
    """
    if framework in sys.modules or importlib.util.find_spec(framework) is not None:
        return
    label, extra, sibling = _FRAMEWORKS[framework]
    wing = "slimkit" if framework == "torch" else "slimkit_ms"
    newest = "; MindSpore has wheels for Python 3.10 to 3.12" if _beyond(framework) else ""
    raise MissingFrameworkError(
        f"{wing} needs {label}, which is not installed: pip install '{extra}' ({sibling}){newest}.", name=framework
    )


def imported(framework: str) -> Any:
    """Import "torch" or "mindspore", or say in one line how to get it.

    Raises:
        MissingFrameworkError: it is not installed.

    Example:
        >>> imported("torch").__name__  # doctest: +SKIP
        'torch'
    """
    require(framework)
    return importlib.import_module(framework)


def _beyond(framework: str) -> bool:
    """Whether this Python is newer than those that a framework has wheels for."""
    return framework == "mindspore" and sys.version_info >= (3, 13)


class LateModule:
    """A module that is imported when something of it is first asked for.

    Args:
        module: dotted module name.

    Example:
        >>> LateModule("json").dumps(1)
        '1'
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


def library(module: str, extra: str) -> Any:
    """Import an optional library, or say in one line how to get it.

    Args:
        module: dotted module name, for example "onnxruntime".
        extra: the extra of slimkit that installs it, for example "onnx".

    Returns:
        The imported module.

    Raises:
        MissingFrameworkError: the library is not installed.

    Example:
        >>> library("json", "hf").dumps(1)
        '1'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name != root:
            raise
        raise MissingFrameworkError(
            f"this needs {root}, which is not installed: pip install 'slimkit[{extra}]'.", name=root
        ) from None


def door(package: str, room: str | None = None) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package top, or of a room some of whose names live elsewhere.

    Args:
        package: "slimkit" or "slimkit_ms".
        room: None for the package top; a room's name for names which that room offers but another file holds.

    Returns:
        The pair to bind as the module's ``__getattr__`` and ``__dir__``.
    """
    homes = public.homes(package, room)

    def __getattr__(name: str) -> Any:
        if name in homes:
            home = homes[name]
            owner = "slimkit" if home.startswith("core.") else package
            value = getattr(importlib.import_module(f"{owner}.{home}"), name)
            setattr(sys.modules[package if room is None else f"{package}.{room}"], name, value)
            return value
        if room is None and name in public.ROOMS:
            return importlib.import_module(f"{package}.{name}")
        where = package if room is None else f"{package}.{room}"
        raise AttributeError(f"module {where!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        rooms = [] if room else list(public.ROOMS)
        module = sys.modules[package if room is None else f"{package}.{room}"]
        return sorted({*homes, *rooms, *vars(module)})

    return __getattr__, __dir__
