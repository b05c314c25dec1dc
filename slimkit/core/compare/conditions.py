"""Conditions that fail a comparison: ``perplexity > 1.05x``, ``kl > 0.1``, ``accuracy < -0.01``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from slimkit.core import check
from slimkit.core.errors import ConfigError

_FORM = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+)\s*(x|%)?\s*")


@dataclass(frozen=True)
class Condition:
    """One bound; it holds when the comparison must fail.

    Args:
        metric: name of the figure.
        sign: one of < <= > >=.
        bound: the number.
        unit: "" for the figure itself, "x" for times the dense model's, "%" for per cent of it.
        text: as it was written.
    """

    metric: str
    sign: str
    bound: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            ConfigError: it is not of the form METRIC SIGN NUMBER, with x or % behind it for a share of the dense one.

        Example:
            >>> Condition.parse("perplexity > 1.05x").holds({"perplexity": 27.0}, {"perplexity": 25.0})
            True
        """
        found = _FORM.fullmatch(check.text(text, "fail_if"))
        if found is None:
            raise ConfigError(
                "fail_if must be METRIC < <= > >= NUMBER, with x or % behind the number for a share of the dense "
                f"model's, such as 'perplexity > 1.05x'. Received: {text!r}"
            )
        return cls(found[1], found[2], float(found[3]), found[4] or "", text.strip())

    def holds(self, small: Mapping[str, float | None], dense: Mapping[str, float | None]) -> bool:
        """Whether the bound is broken.

        Raises:
            ConfigError: there is no such figure; the message names those that there are.
        """
        value, base = small.get(self.metric), dense.get(self.metric)
        if value is None:
            known = sorted(k for k, v in small.items() if v is not None)
            raise ConfigError(
                f"fail_if names no figure of this comparison: {self.metric!r}{check.near(self.metric, known)}"
            )
        bound = self.bound
        if self.unit:
            if base is None:
                raise ConfigError(f"fail_if: the dense model has no {self.metric!r} to take a share of")
            bound = base * self.bound / (100.0 if self.unit == "%" else 1.0)
        # A figure that is no number never passes.
        if value != value:
            return True
        return {"<": value < bound, "<=": value <= bound, ">": value > bound, ">=": value >= bound}[self.sign]
