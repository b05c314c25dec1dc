"""Methods edited to read a parameter masked."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import UnsupportedError
from slimkit.core.source.masked_reads import masked_methods


class Experts:
    def __init__(self):
        self.w, self.w_mask = np.ones((1, 2, 2)), np.array([[1.0, 0.0], [1.0, 1.0]])

    def construct(self, x: np.ndarray, scale: float = 2.0, *, more=1.0) -> np.ndarray:
        return x @ self._of(0) * scale * more

    def _of(self, i):
        other = Other()
        return self.w[i] + other.w

    def unread(self):
        return 0


class Other:
    w = 0.0


class Sub(Experts):
    """Reads it through its base."""


class Calls(Experts):
    def construct(self, x):
        return super().construct(x) + self.w


class Decorated(Experts):
    @staticmethod
    def unread():
        return 0

    _of = np.vectorize(Experts._of).pyfunc

    def construct(self, x):
        return x


@pytest.mark.parametrize("kind", [Experts, Sub, Decorated])
def test_every_read_is_masked_and_nothing_else(kind):
    found = masked_methods(kind, "w", "w_mask", "mindspore")
    assert list(found) == ["_of"]
    made = type("Masked", (kind,), found)()
    np.testing.assert_array_equal(made._of(0), made.w_mask)
    if kind is not Decorated:
        np.testing.assert_array_equal(made.construct(np.ones((1, 2))), [[4.0, 2.0]])


def compiled():
    names = {}
    exec("def construct(self, x):\n    return x @ self.w\n", names)
    return type("Compiled", (), {"construct": names["construct"]})


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Other, "no method of Other reads self.w"), (Calls, "calls super"), (compiled(), "has no source")],
)
def test_what_cannot_be_masked_is_refused_with_the_reason(kind, words):
    with pytest.raises(UnsupportedError, match=words):
        masked_methods(kind, "w", "w_mask", "mindspore")
