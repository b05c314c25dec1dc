"""`network.json`: which function makes the network whose weights a folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.errors import FileFormatError

FILE = "network.json"
_FORMAT, _VERSION = "slimkit-network", 1


def checked(factory: Any, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A factory and its arguments as they are kept; a file's path is made absolute.

    Args:
        factory: ``package.module:function`` or ``file.py:function``.
        arguments: keyword arguments of the function, plain JSON values.

    Raises:
        ArgumentTypeError: no str, or arguments that JSON cannot hold.
        ArgumentError: a str of another form.

    Example:
        >>> checked("nets:small", {"width": 8})
        {'factory': 'nets:small', 'arguments': {'width': 8}}
    """
    place, sign, function = check.text(factory, "factory").rpartition(":")
    if not sign or not place or not function.isidentifier():
        check.wrong_value("factory", "package.module:function or file.py:function", factory)
    held = dict(arguments or {})
    try:
        plain = json.loads(json.dumps(held, allow_nan=False))
    except (TypeError, ValueError):
        check.wrong_type("arguments", "plain JSON values by name", arguments)
    return {"factory": f"{Path(place).absolute()}:{function}" if place.endswith(".py") else factory, "arguments": plain}


def write_maker(folder: Path, factory: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Write which function makes a folder's network."""
    files.write_json(folder / FILE, {"format": _FORMAT, "version": _VERSION, **checked(factory, arguments)})


def read_maker(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The function that makes a folder's network, and its arguments; None where the folder names none.

    Raises:
        FileFormatError: the file is damaged or of another version.
    """
    file = folder / FILE
    if not file.exists():
        return None
    told = files.read_json(file, FILE)
    known = isinstance(told, dict) and told.get("format") == _FORMAT and told.get("version") == _VERSION
    if not known or not isinstance(told.get("factory"), str) or not isinstance(told.get("arguments"), dict):
        raise FileFormatError(f"{file} is damaged or of another version; this slimkit reads {_FORMAT} {_VERSION}")
    return told["factory"], told["arguments"]
