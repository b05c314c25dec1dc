"""What each layer drops: the exact total, spread evenly or by what each layer was measured to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Ratios stay this close to the uniform one: sensitivities are measured there, and far from it they say little.
REACH = 0.1


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


def spread(
    costs: Mapping[str, Sequence[float]], ratios: Sequence[float], sizes: Mapping[str, int], ratio: float
) -> dict[str, float]:
    """Ratios of least summed cost whose weighted mean is the ratio asked for.

    Each layer's cost is taken as a line through its measured points' logarithms, and the one price per weight that
    meets the total is found by bisection.

    Args:
        costs: layer -> its measured cost at each of `ratios`.
        ratios: where the costs were measured, ascending, around `ratio`.
        sizes: layer -> number of weights.
        ratio: the share of all weights to drop.

    Returns:
        layer -> ratio within REACH of the one asked for; together exactly that many weights to within rounding.

    Example:
        >>> found = spread({"a": [1, 2], "b": [1, 8]}, [0.4, 0.6], {"a": 10, "b": 10}, 0.5)
        >>> found["a"] > 0.5 > found["b"] and abs(sum(found.values()) - 1) < 1e-6
        True
    """
    # Beyond .01 and .99 still room on both sides: without it the total could not be met.
    low = max(min(0.01, ratio / 2), ratio - REACH)
    high = min(max(0.99, (1 + ratio) / 2), ratio + REACH)
    slopes, levels = _exponentials(costs, ratios, ratio)

    def at(price: float) -> dict[str, float]:
        from math import log

        # cost(r) = level * exp(slope * (r - ratio)): its derivative per weight equals the price at this r.
        found = {}
        for name, slope in slopes.items():
            best = ratio + log(price * sizes[name] / (levels[name] * slope)) / slope
            found[name] = min(high, max(low, best))
        return found

    total = ratio * sum(sizes.values())
    cheap, dear = 1e-30, 1e30
    for _ in range(200):
        price = (cheap * dear) ** 0.5
        if sum(sizes[n] * r for n, r in at(price).items()) < total:
            cheap = price
        else:
            dear = price
    return at((cheap * dear) ** 0.5)


def _exponentials(
    costs: Mapping[str, Sequence[float]], ratios: Sequence[float], ratio: float
) -> tuple[dict[str, float], dict[str, float]]:
    from math import exp, log

    slopes, levels = {}, {}
    for name, values in costs.items():
        logs = [log(max(v, 1e-20)) for v in values]
        x = [r - ratio for r in ratios]
        mean_x, mean_y = sum(x) / len(x), sum(logs) / len(logs)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, logs)) / sum((a - mean_x) ** 2 for a in x)
        slopes[name] = max(slope, 1e-3)
        levels[name] = exp(mean_y - slope * mean_x)
    return slopes, levels
