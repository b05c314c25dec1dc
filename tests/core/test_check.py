"""Validators and errors: what is refused, and what the message says."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from slimkit.core import batch, check, errors


def test_every_error_is_a_slimkit_error_and_a_builtin_kind():
    family = [e for _, e in inspect.getmembers(errors, inspect.isclass)]
    assert len(family) > 10
    for error in family:
        assert issubclass(error, errors.SlimkitError)
        if error is not errors.SlimkitError:
            assert issubclass(error, ValueError | TypeError | ImportError | RuntimeError)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: check.integer(True, "rank"), TypeError),
        (lambda: check.integer(1.0, "rank"), TypeError),
        (lambda: check.positive(0, "rank"), ValueError),
        (lambda: check.integer(9, "opset", maximum=8), ValueError),
        (lambda: check.number(float("nan"), "alpha"), ValueError),
        (lambda: check.number(True, "alpha"), TypeError),
        (lambda: check.ratio(0.0, "ratio"), ValueError),
        (lambda: check.ratio(1.0, "ratio"), ValueError),
        (lambda: check.ratio("0.5", "ratio"), TypeError),
        (lambda: check.boolean(1, "flag"), TypeError),
        (lambda: check.text("", "name"), ValueError),
        (lambda: check.choice("l3", ["l1", "l2"], "importance"), ValueError),
        (lambda: check.choice(3, ["l1", "l2"], "importance"), TypeError),
        (lambda: check.strings([], "include"), TypeError),
        (lambda: check.strings("a", "include"), TypeError),
        (lambda: check.strings(["a", 1], "include"), TypeError),
        (lambda: check.function(3, "f"), TypeError),
        (lambda: batch.dataset([]), ValueError),
        (lambda: batch.dataset(iter([1])), TypeError),
        (lambda: batch.dataset("abc"), TypeError),
        (lambda: batch.dataset(np.ones(3)), TypeError),
        (lambda: batch.dataset(3), TypeError),
    ],
)
def test_wrong_arguments_are_refused_with_what_came(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, errors.SlimkitError)
    assert "Received" in str(caught.value)


def test_a_near_miss_is_offered():
    with pytest.raises(ValueError, match="Did you mean 'hessian'"):
        check.choice("hesian", ["magnitude", "hessian"], "method")


def test_good_values_pass_unchanged():
    assert check.ratio(1, "r", one=True) == 1.0
    assert check.strings(("a", "b"), "include") == ["a", "b"]
    assert batch.as_call([1, 2]) == ((1, 2), {})
    assert batch.as_call({"x": 1}) == ((), {"x": 1})
    assert batch.as_call(5) == ((5,), {})


def test_framework_of_reads_class_names(kit):
    assert check.framework_of(kit.tensor([1.0])) == kit.name
    assert check.framework_of(kit.linear(2, 2)) == kit.name
    assert check.framework_of(np.ones(1)) == "numpy"
    assert check.framework_of("x") is None
