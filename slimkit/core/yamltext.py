"""YAML that people wrote: read without running anything, every way of being wrong one error."""

from __future__ import annotations

import re
from typing import Any

from slimkit.core.errors import FileFormatError

_INTEGER = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text; a key given twice is refused, for the second would silently win.

    Raises:
        FileFormatError: it is not YAML, or its values are none: PyYAML itself lets a ValueError out for a thirteenth
            month, a number without digits, and more.

    Example:
        >>> parse_yaml("a: [1, b]")
        {'a': [1, 'b']}
        >>> parse_yaml("{pattern: 2:4, rate: 1e-2}")
        {'pattern': '2:4', 'rate': 0.01}
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str | int) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key) if isinstance(key, str | int) else None
            made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return made

    # YAML 1.1 reads 2:4 as sixty times two and four, and 1e-2 as text; people mean the pattern and the number.
    numbers = {"tag:yaml.org,2002:int": _INTEGER, "tag:yaml.org,2002:float": _FLOAT}
    UniqueKeys.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in numbers]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in numbers.items():
        UniqueKeys.add_implicit_resolver(tag, pattern, list("-+.0123456789"))

    try:
        return yaml.load(text, Loader=UniqueKeys)
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(" ".join(str(error).split())[:2000]) from None
