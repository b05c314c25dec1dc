"""Name patterns against a referee: Python's own regular expressions for globs, and known bombs for the bounds."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.errors import PatternError
from slimkit.core.match import bounded_regex, demand, match, matcher


@given(st.text("ab.", max_size=12), st.text("ab.*", max_size=8))
@settings(deadline=None, max_examples=500)
def test_globs_equal_the_regular_expression_they_stand_for(name, pattern):
    referee = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
    assert matcher(pattern)(name) == (referee.fullmatch(name) is not None)


def test_only_the_star_is_special():
    assert match(["a[0]", "a0", "a?"], ["a[0]", "a?"]).names == ("a[0]", "a?")


def test_a_plain_name_matches_a_whole_module_only_when_asked():
    names = ["dense.weight", "dense2.weight", "dense"]
    assert match(names, ["dense"]).names == ("dense",)
    assert match(names, ["dense"], whole_modules=True).names == ("dense.weight", "dense")


def test_unmatched_patterns_are_told_and_demanded():
    found = match(["encoder.weight"], ["*.weight", "encodr.weight"])
    assert found.unmatched == ("encodr.weight",)
    with pytest.raises(PatternError, match=r"Did you mean 'encoder.weight'"):
        demand(found, ["encoder.weight"], "include")


def test_many_stars_take_linear_time():
    began = time.perf_counter()
    assert not matcher("*a" * 200 + "b")("a" * 20_000)
    assert time.perf_counter() - began < 5  # a backtracking matcher would need the age of the universe


@pytest.mark.parametrize("bomb", ["(a+)+$", "(a*)*b", "(a|aa)+$", "(.*a){12}", r"(a)\1", "(", "a" * 501, "x*" * 9, ""])
def test_unsafe_expressions_are_refused(bomb):
    with pytest.raises(ValueError):
        bounded_regex(bomb)


@pytest.mark.parametrize(
    ("pattern", "name", "layer"),
    [
        (r"bert.encoder.layer.(\d+).", "bert.encoder.layer.11.output.dense.weight", "11"),
        (r"(?:model|transformer)\.h\.(\d+)\.", "transformer.h.3.attn.weight", "3"),
    ],
)
def test_real_block_patterns_pass(pattern, name, layer):
    assert bounded_regex(pattern).search(name).group(1) == layer


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError):
        bounded_regex(3)
