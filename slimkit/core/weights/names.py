"""Which tensor of a file a parameter is fed from, by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from slimkit.core.naming import torch_name


def pair_names(targets: Iterable[str], sources: Iterable[str]) -> dict[str, str]:
    """Match a model's names with a file's: as they are, under a common prefix, under the words of another framework.

    Args:
        targets: names in the model.
        sources: names in the file.

    Returns:
        target -> source, for every target that has one.

    Example:
        >>> pair_names(["norm.weight"], ["bert.norm.gamma", "head.weight"])
        {'norm.weight': 'bert.norm.gamma'}
    """
    sources = list(sources)
    have = set(sources)
    paired = {t: t for t in targets if t in have}
    plain = _by_canonical([s for s in sources if s not in paired])
    open_targets = [t for t in targets if t not in paired]
    for target in open_targets:
        if (source := plain.get(torch_name(target))) is not None:
            paired[target] = source
    open_targets = [t for t in open_targets if t not in paired]
    taken = set(paired.values())
    plain = {c: s for c, s in plain.items() if s not in taken}
    # One prefix for the whole file, put before its names or taken away: the one that serves most of what is left.
    votes: Counter[tuple[str, str]] = Counter()
    wanted = {torch_name(t): t for t in open_targets}
    for source in plain:
        for tail in _tails(source):
            if tail in wanted:
                votes["file", source[: -len(tail)]] += 1
    for target in wanted:
        for tail in _tails(target):
            if tail in plain:
                votes["model", target[: -len(tail)]] += 1
    if votes:
        (side, prefix), _ = min(votes.items(), key=lambda item: (-item[1], item[0]))
        for name, target in wanted.items():
            key = prefix + name if side == "file" else name.removeprefix(prefix)
            if (side == "file" or name.startswith(prefix)) and key in plain:
                paired[target] = plain[key]
    return paired


def _by_canonical(names: Iterable[str]) -> dict[str, str]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(torch_name(name), []).append(name)
    return {key: found[0] for key, found in grouped.items() if len(found) == 1}


def _tails(name: str) -> list[str]:
    """A dotted name without its first word, without its first two, ..."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(1, len(words))]
