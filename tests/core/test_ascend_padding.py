"""Targets and the padding of weights: blocks, bytes and multiply-accumulates, against sums done by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.ascend import TARGETS, padded_waste, target
from slimkit.core.ascend.operators import Generation, opsets, table
from slimkit.core.ascend.weights import legal_groups
from slimkit.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError


def test_every_target_names_a_document_for_every_fact():
    assert set(TARGETS) == {"310P", "A2", "A3"}
    for device in TARGETS.values():
        assert {"blocks", "channels", "sparsity", "precision", "bfloat16", "soc_version"} <= set(device.sources)
        for source in device.sources.values():
            assert source.says
            assert source.url.startswith("https://")
        assert json.loads(json.dumps(device.to_dict()))["blocks"]["int8"] == [16, 32]
    assert TARGETS["310P"].row_bytes is None
    assert TARGETS["A2"].row_bytes == 512
    assert "rows" in TARGETS["A2"].sources


@pytest.mark.parametrize(
    ("dtype", "block"), [("float16", (16, 16)), ("bfloat16", (16, 16)), ("int8", (16, 32)), ("float32", (16, 8))]
)
def test_blocks_are_16_rows_of_32_bytes(dtype, block):
    assert target("a2").block(dtype) == block
    assert target("A2").block("int64") is None


def test_padding_of_a_linear_layer_by_hand():
    [waste] = padded_waste({"fc": (10, 100)}, "310P", rows=3)
    assert waste.weight_bytes == 10 * 100 * 2
    assert waste.padded_bytes == 16 * 112 * 2
    assert waste.macs == 3 * 10 * 100
    assert waste.padded_macs == 16 * 16 * 112
    assert waste.wasted_bytes == pytest.approx(1 - 1000 / 1792)
    assert json.loads(json.dumps(waste.to_dict()))["shape"] == [10, 100]


def test_padding_of_a_convolution_pads_channels_and_not_the_kernel():
    [waste] = padded_waste({"conv": (20, 3, 3, 3)}, "A2", rows=64)
    assert waste.padded_bytes == 32 * 16 * 9 * 2
    assert waste.padded_macs == 64 * 32 * 16 * 9


@given(
    shape=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    rows=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_padding_is_never_negative_and_nothing_for_whole_blocks(shape, dtype, rows):
    [waste] = padded_waste({"w": shape}, "A3", dtype=dtype, rows=rows)
    # The referee counts the blocks one by one.
    size = {"float16": 2, "float32": 4, "int8": 1}[dtype]
    blocks = len(range(0, shape[0], 16)) * len(range(0, shape[1], 32 // size)) * math.prod(shape[2:])
    assert waste.padded_bytes == blocks * 16 * 32
    assert 0 <= waste.wasted_bytes < 1
    assert 0 <= waste.wasted_macs < 1
    [again] = padded_waste({"w": (16 * shape[0], 32 * shape[1])}, "A3", dtype=dtype, rows=16)
    assert again.wasted_bytes == again.wasted_macs == 0


def test_padded_waste_refuses_what_makes_no_sense():
    with pytest.raises(ArgumentError, match="target must be one of '310P', 'A2', 'A3'"):
        padded_waste({"w": (1, 1)}, "310Q")
    with pytest.raises(ArgumentTypeError, match="target must be a str"):
        padded_waste({"w": (1, 1)}, 310)
    with pytest.raises(UnsupportedError, match="does not compute in bfloat16"):
        padded_waste({"w": (1, 1)}, "310P", dtype="bfloat16")
    with pytest.raises(ArgumentError, match=r"shapes\['w'\]"):
        padded_waste({"w": (4,)}, "A2")
    with pytest.raises(ArgumentError, match=r"shapes\['w'\]"):
        padded_waste({"w": (4, 0)}, "A2")
    with pytest.raises(ArgumentError, match="rows"):
        padded_waste({"w": (4, 4)}, "A2", rows=0)


@given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_legal_groups_count_two_zeros_of_four_neighbouring_input_channels(mask):
    nonzero = np.array(mask)
    legal = 0
    for row, start in itertools.product(range(len(mask)), (0, 4)):
        legal += sum(mask[row][start : start + 4]) <= 2
    assert legal_groups(nonzero) == (legal, 2 * len(mask))
    # A kernel's places are groups of their own; the order of the axes does not matter to them.
    assert legal_groups(np.stack([nonzero, nonzero], axis=-1)) == (2 * legal, 4 * len(mask))


def test_operator_table_is_whole_and_sourced():
    whole = table()
    assert whole["version"] == 1
    assert set(whole["generations"]) == {"5", "6", "7", "8", "9"}
    for row in whole["generations"].values():
        assert opsets(row["opsets"])
        for key in row["sources"]:
            assert whole["sources"][key]["url"].startswith("https://")
    for name, row in whole["operators"].items():
        assert set(row) <= {"5", "7", "8", "basis"}, name
        for key in ("5", "7", "8"):
            if row.get(key):
                assert opsets(row[key]), name
        assert ("8" in row) == ("basis" in row)
        assert (row.get("basis") == "list") == ("8" in row and row["8"] is None)


def test_operator_table_says_what_the_documents_say():
    assert Generation("8.0").support("Conv").opsets == set(range(9, 19))
    assert Generation("5.0.4").support("Unsqueeze").opsets == set(range(8, 13))
    assert Generation("9.0.0").support("LayerNormalization").opsets == {17, 18}
    assert Generation("7.0").support("LayerNormalization").opsets == {17}
    assert not Generation("6.0.1").support("LayerNormalization").named
    assert not Generation("8.0.RC3").support("Gelu").named
    grid = Generation("8.0").support("GridSample")
    assert grid.named
    assert not grid.opsets


@pytest.mark.parametrize("cann", ["4.0", "10.0", "eight", "", "8.0;rm", "8" * 40])
def test_an_unknown_cann_version_is_refused(cann):
    with pytest.raises(ArgumentError, match="cann must be"):
        Generation(cann)
