"""Methods made from source text that lies in a file: graph mode, and whoever debugs, reads it there."""

from __future__ import annotations

import functools
import inspect
import itertools
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COUNT = itertools.count()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Kept for the life of the process: graph mode reads the source at every compilation.
    return tempfile.TemporaryDirectory(prefix="slimkit_")


def method_from(source: str, class_name: str, like: Callable[..., Any]) -> Any:
    """The one method of a class given as source.

    Args:
        source: one class with one method, as `slimkit.core.source.attention_source` writes it.
        class_name: the class's name.
        like: the method it takes the place of; what it reads from around it, and its defaults, are this one's.

    Returns:
        The function.
    """
    # Graph mode looks a name up in the function's closure and in its module, so both have to be the real ones.
    around = inspect.getclosurevars(like).nonlocals
    whole = f"def make({', '.join(around)}):\n{textwrap.indent(source, '    ')}\n    return {class_name}\n"
    file = Path(_folder().name) / f"cell_{next(_COUNT)}.py"
    file.write_text(whole, encoding="utf-8")
    names: dict[str, Any] = {}
    # The model's own code, edited: nothing comes from outside the process.
    exec(compile(whole, str(file), "exec"), like.__globals__, names)
    (function,) = (f for f in vars(names["make"](**around)).values() if inspect.isfunction(f))
    function.__defaults__, function.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    return function
