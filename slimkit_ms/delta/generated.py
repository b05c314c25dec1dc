"""Methods made from source text, in a form that graph mode can compile: it reads the source from a file."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit_ms import bridge

__all__ = ["bridge", "method_from"]

_COUNT = itertools.count()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Kept for the life of the process: graph mode reads the source at every compilation.
    return tempfile.TemporaryDirectory(prefix="slimkit_ms_")


def method_from(source: str, like: Callable[..., Any]) -> Any:
    """The one method of a class given as source.

    Args:
        source: one class with one method, as `slimkit.core.delta.attention_source` writes it.
        like: the method it takes the place of; what it reads from around it, and its defaults, are this one's.

    Returns:
        The function.
    """
    file = Path(_folder().name) / f"cell_{next(_COUNT)}.py"
    file.write_text(source, encoding="utf-8")
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    assert isinstance(made.body[0], ast.FunctionDef)
    names: dict[str, Any] = {}
    # The model's own code, edited: nothing comes from outside the process.
    around = inspect.getclosurevars(like).nonlocals
    seen = {**like.__globals__, **around} if around else like.__globals__
    exec(compile(source, str(file), "exec"), seen, names)
    function = vars(names[made.name])[made.body[0].name]
    function.__defaults__, function.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    return function
