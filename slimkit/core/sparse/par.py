"""par: alternating support search (ADMM) and refit on the same objective as the sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimkit.core.sparse.backend import Array
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.pattern import NM
from slimkit.core.sparse.sweep import inverse_factor, sweep


@dataclass(frozen=True)
class Schedule:
    """How long to search."""

    rounds: int

    @classmethod
    def short(cls) -> Schedule:
        """par's."""
        return cls(8)

    @classmethod
    def long(cls) -> Schedule:
        """par_v2's."""
        return cls(30)


def refine(
    target: Array,
    gram: Array,
    ratio: float,
    nm: NM | None,
    dead: Array | None,
    count: int,
    schedule: Schedule,
    config: SparseConfig,
) -> tuple[Array, Array, dict[str, Any]]:
    """Stub"""
    upper, damping = inverse_factor(gram, config.damping)
    weight, keep = sweep(target, upper, ratio, nm, config.block_size, dead=dead)
    return weight, keep, {"damping": damping}
