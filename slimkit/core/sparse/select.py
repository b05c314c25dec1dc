"""Which layers a configuration means, and which of its patterns mean none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimkit.core import match
from slimkit.core.errors import ArgumentError, PatternError
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer


def select(
    layers: Mapping[str, SparseLayer], skipped: dict[str, str], config: SparseConfig
) -> tuple[list[str], list[str]]:
    """The layers that a configuration asks for, and its patterns that match none.

    Args:
        layers: every layer that can be sparse.
        skipped: name -> reason; layers that the pattern does not fit are added, in place.
        config: targets, ignore, pattern, strict.

    Returns:
        Names in the model's order, and the unmatched patterns.

    Raises:
        PatternError: a pattern matches no layer, and `config.strict`.
        ArgumentError: nothing is left, or the n:m pattern does not fit a layer and `config.strict`.
    """
    paths = {path: name for name, layer in layers.items() for path in (name, *layer.aliases)}
    known = [*paths, *skipped]
    wanted = match.match(known, config.targets, whole_modules=True) if config.targets is not None else None
    left = match.match(known, config.ignore, whole_modules=True)
    if config.strict:
        if wanted is not None:
            match.demand(wanted, known, "SparseConfig.targets")
        match.demand(left, known, "SparseConfig.ignore")
        refused = [
            f"{n!r} ({skipped[n]})" for n in (wanted.names if wanted else ()) if n in skipped and n not in left.names
        ]
        if refused and not any(n in paths for n in (wanted.names if wanted else ())):
            raise ArgumentError(
                f"SparseConfig.targets must match layers that can be sparse. Received: {', '.join(refused)}"
            )
    chosen = {paths[n] for n in (wanted.names if wanted else paths) if n in paths} - {
        paths[n] for n in left.names if n in paths
    }
    names = [n for n in layers if n in chosen]
    if config.nm is not None:
        unfit = [n for n in names if layers[n].n_channels % config.nm.group]
        if unfit and config.strict:
            raise ArgumentError(
                f"SparseConfig.pattern {config.pattern!r} needs input channels in multiples of {config.nm.group}; "
                f"{', '.join(f'{n!r} has {layers[n].n_channels}' for n in unfit)}. Put them into `ignore`."
            )
        for n in unfit:
            skipped[n] = f"{layers[n].n_channels} input channels are no multiple of {config.nm.group}"
        names = [n for n in names if n not in skipped]
    unmatched = [*(wanted.unmatched if wanted else ()), *left.unmatched]
    if not names:
        raise PatternError(
            f"no layer is left to make sparse: of {len(layers)} that can be, `targets` and `ignore` leave none"
            + ("" if layers else f" ({_why_none(skipped)})")
        )
    return names, unmatched


def _why_none(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return "the model has no Linear, Conv1D or Conv2d"
    reasons = {why: [n for n in skipped if skipped[n] == why] for why in skipped.values()}
    return "; ".join(f"{said(names)} left alone: {why}" for why, names in reasons.items())


def said(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, the first few of many.

    Example:
        >>> said(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more were"
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more + (" were" if len(names) > 1 else " was")
