"""Name patterns: globs over whole parameter and module names, and regular expressions that are safe to run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

from slimkit.core import check
from slimkit.core.errors import PatternError

try:
    from re import _constants as _sre  # type: ignore[attr-defined]
    from re import _parser as _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _sre
    import sre_parse as _parser

MAX_PATTERN_LENGTH = 500


@dataclass(frozen=True)
class Matches:
    """What a list of patterns found.

    Args:
        names: every name that at least one pattern matched, in the order given.
        by_pattern: pattern -> the names it matched.
        unmatched: the patterns that matched nothing.
    """

    names: tuple[str, ...]
    by_pattern: Mapping[str, tuple[str, ...]] = field(hash=False)
    unmatched: tuple[str, ...]


def match(names: Iterable[str], patterns: Sequence[str], *, whole_modules: bool = False) -> Matches:
    """Match names against glob patterns in which ``*`` alone is special, or ``re:`` regular expressions.

    Args:
        names: parameter or module names.
        patterns: a glob over the whole name ("*.dense.*"), a plain name, or "re:" and a bounded regular
            expression that must match the whole name.
        whole_modules: a plain name also matches every name below it ("dense" matches "dense.weight", and
            "gate_up_proj" matches "gate_up_proj[3]").

    Returns:
        The names that matched, by pattern and together.

    Raises:
        PatternError: a regular expression is invalid, too long, or may backtrack without bound.

    Example:
        >>> match(["a.weight", "a.bias", "b.weight"], ["*.weight"]).names
        ('a.weight', 'b.weight')
    """
    names = list(names)
    by_pattern: dict[str, tuple[str, ...]] = {}
    for pattern in dict.fromkeys(patterns):
        test = matcher(pattern, whole_modules=whole_modules)
        by_pattern[pattern] = tuple(filter(test, names))
    if len(by_pattern) == 1:
        (together,) = by_pattern.values()
    else:
        hit = set().union(*by_pattern.values())
        together = tuple(filter(hit.__contains__, names))
    return Matches(
        names=together,
        by_pattern=by_pattern,
        unmatched=tuple(p for p, found in by_pattern.items() if not found),
    )


def matcher(pattern: str, *, whole_modules: bool = False) -> Callable[[str], bool]:
    """The test that one pattern stands for; its time is linear in the name's length for a glob."""
    if pattern.startswith("re:"):
        expression = bounded_regex(pattern[3:])
        return lambda name: expression.fullmatch(name) is not None
    first, *rest = pattern.split("*")
    if not rest:
        if whole_modules:
            below = (pattern + ".", pattern + "[")  # "[3]" stands for a part of a parameter
            return lambda name: name == pattern or name.startswith(below)
        return lambda name: name == pattern
    *middle, last = [part for part in rest[:-1] if part] + [rest[-1]]
    if not first and not middle:
        return methodcaller("endswith", last)  # the usual glob: a third of the time of the one below

    def glob(name: str) -> bool:
        if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
            return False
        at, end = len(first), len(name) - len(last)
        for part in middle:
            # The leftmost fit is always as good as any later one, so no backtracking is needed.
            at = name.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True

    return glob


def demand(found: Matches, names: Iterable[str], argument: str) -> None:
    """Raise PatternError when a pattern matched nothing, offering the nearest name.

    Example:
        >>> demand(match(["a"], ["*"]), ["a"], "include")
    """
    if found.unmatched:
        names = list(names)
        shown = check.nears(found.unmatched, names)
        raise PatternError(f"{argument} must match at least one of the {len(names)} names. Received: {shown}")


def bounded_regex(pattern: str, name: str = "pattern") -> re.Pattern[str]:
    """Compile a regular expression that cannot backtrack catastrophically.

    Args:
        pattern: at most 500 characters; no repeat inside a repeat, no alternatives inside an unbounded repeat,
            no back-reference, at most 8 unbounded repeats.
        name: the argument's name, for the message.

    Returns:
        The compiled expression.

    Raises:
        ArgumentTypeError: not a str.
        PatternError: invalid, too long, or unsafe.

    Example:
        >>> bounded_regex(r"layer.(\\d+).").search("encoder.layer.11.x").group(1)
        '11'
    """
    check.text(pattern, name)
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"{name} must be at most {MAX_PATTERN_LENGTH} characters. Received: {len(pattern)}")
    try:
        parsed = _parser.parse(pattern)
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{name} must be a valid regular expression: {error}. Received: {pattern!r}") from None
    if _unbounded_repeats(parsed, name, pattern, inside=False) > 8:
        raise PatternError(f"{name} must hold at most 8 unbounded repeats. Received: {pattern!r}")
    return compiled


def _unbounded_repeats(parsed: Any, name: str, pattern: str, *, inside: bool) -> int:
    """Count the unbounded repeats of a parsed expression; refuse what can multiply them."""
    count = 0
    for operator, argument in parsed:
        if operator in (_sre.MAX_REPEAT, _sre.MIN_REPEAT):
            low, high, body = argument
            variable = high != low
            if inside and variable:
                raise PatternError(f"{name} must not hold a repeat inside a repeat. Received: {pattern!r}")
            unbounded = high is _sre.MAXREPEAT or high > 64
            # A fixed repeat writes its body out that many times.
            times = 1 if variable else high
            count += unbounded + times * _unbounded_repeats(body, name, pattern, inside=inside or variable)
        elif operator is _sre.BRANCH:
            if inside:
                raise PatternError(f"{name} must not hold alternatives inside a repeat. Received: {pattern!r}")
            count += max(_unbounded_repeats(branch, name, pattern, inside=False) for branch in argument[1])
        elif operator is _sre.SUBPATTERN:
            count += _unbounded_repeats(argument[3], name, pattern, inside=inside)
        elif operator in (_sre.ASSERT, _sre.ASSERT_NOT):
            count += _unbounded_repeats(argument[1], name, pattern, inside=inside)
        elif operator in (_sre.GROUPREF, _sre.GROUPREF_EXISTS):
            raise PatternError(f"{name} must not hold a back-reference. Received: {pattern!r}")
    return count
