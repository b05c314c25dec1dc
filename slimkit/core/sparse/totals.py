"""How many weights each layer loses: the exact total, and never a whole layer."""

from __future__ import annotations

from collections.abc import Mapping


def counts(sizes: Mapping[str, int], ratios: Mapping[str, float]) -> dict[str, int]:
    """How many weights of each layer become zero: together exactly as many as asked for, and never a whole layer.

    Rounded layer by layer, many small layers would lose too much or nothing: so the sum is rounded as it grows. At
    least one weight stays in each layer, and what a layer cannot give the others give, by the room they have.

    Args:
        sizes: layer -> number of weights.
        ratios: layer -> share of them to drop, 0 < ratio < 1.

    Returns:
        layer -> count. The sum falls short only where every layer is down to its last weight.

    Example:
        >>> counts({"a": 3, "b": 3, "c": 94}, {"a": 0.9, "b": 0.9, "c": 0.9})
        {'a': 2, 'b': 2, 'c': 86}
    """
    most = {name: size - 1 for name, size in sizes.items()}
    wanted = _rounded(sizes, ratios)
    found = {name: min(count, most[name]) for name, count in wanted.items()}
    missing = sum(wanted.values()) - sum(found.values())
    room = {name: most[name] - found[name] for name in found}
    free = sum(room.values())
    if missing and free:
        more = _rounded(room, dict.fromkeys(room, min(1.0, missing / free)))
        found = {name: found[name] + more[name] for name in found}
    return found


def _rounded(sizes: Mapping[str, int], ratios: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers whose sums, from the first on, are the sums of ratio times size, rounded."""
    found: dict[str, int] = {}
    total, before, stretch, last = 0.0, 0, 0, 0.0
    for name, size in sizes.items():
        if ratios[name] != last:
            total, stretch, last = total + last * stretch, 0, ratios[name]
        stretch += size  # of equal ratios: one product, as exact as the ratio of the whole
        now = round(total + last * stretch)
        found[name], before = now - before, now
    return found
