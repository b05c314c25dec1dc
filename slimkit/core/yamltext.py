"""YAML that people wrote: read without running anything, every way of being wrong one error."""

from __future__ import annotations

from typing import Any

from slimkit.core.errors import FileFormatError


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text; a key given twice is refused, for the second would silently win.

    Raises:
        FileFormatError: it is not YAML, or its values are none: PyYAML itself lets a ValueError out for a thirteenth
            month, a number without digits, and more.

    Example:
        >>> parse_yaml("a: [1, b]")
        {'a': [1, 'b']}
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

    try:
        return yaml.load(text, Loader=UniqueKeys)
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(" ".join(str(error).split())[:2000]) from None
