"""While deltas are merged they do not train: whoever trains then is told, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slimkit.core.delta.spec import PREFIX
from slimkit.core.log import logger

WATCH = "watch_while_merged"  # what the merged layers of a model hold together


class MergedWatch:
    """One for all merged layers of a model; a class, so that models with it can be copied and pickled."""

    def __init__(self) -> None:
        self.told = False

    def see(self, parameters: Iterable[tuple[str, Any]]) -> None:
        """Say so once if one of a layer's deltas, among its named parameters, is meant to train."""
        if not self.told and any(p.requires_grad for n, p in parameters if PREFIX in n):
            self.told = True
            logger.warning("the deltas are merged and do not train: call unmerge_delta before training goes on")
