"""Latency tables: files, interpolation, the fit and what is timed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.errors import FileFormatError
from slimkit.core.prune.latency import LatencyTable
from slimkit.core.prune.measuring import Widths, _fitted, cross, filled
from slimkit.core.prune.onnx_times import _geometry


def table():
    made = LatencyTable("a CPU", "onnxruntime", 1, {"onnxruntime": "1"})
    made.put("linear, 1 row", [8, 16, 32], [8, 32], [[1, 4], [2, 8], [4, 16]])
    made.networks["0"] = {"model": "Net", "dense_ms": 1.0, "layers": 1, "elements": 0, "constant": 0, "fitted_to": []}
    return made


def test_a_table_comes_back_from_its_file(tmp_path):
    table().save(tmp_path / "t.json")
    again = LatencyTable.read(tmp_path / "t.json")
    assert again.to_dict() == table().to_dict()
    # exact at what was measured, linear between and beyond
    assert again.ms("linear, 1 row", [8, 32, 24, 40], [8, 32, 32, 32]).tolist() == [1, 16, 12, 20]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "x"}, "no latency table"),
        ({"version": 2}, "no latency table"),
        ({"more": 1}, "more"),
        ({"layers": {"l": {"in": [2, 1], "out": [1], "ms": [[1], [1]]}}}, "ascending"),
        ({"layers": {"l": {"in": [1, 2], "out": [1], "ms": [[1]]}}}, "one for each pair"),
        ({"layers": {"l": {"in": [1], "out": [1], "ms": [[-1]]}}}, "one for each pair"),
        ({"layers": {"l": {"in": [1]}}}, "damaged"),
        ({"layers": []}, "damaged"),
        ({"networks": {"n": {"layers": -1, "elements": 0, "constant": 0}}}, "negative"),
        ({"networks": {"n": {}}}, "damaged"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path, change, said):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**table().to_dict(), **change}))
    with pytest.raises(FileFormatError, match=said) as raised:
        LatencyTable.read(path)
    assert "t.json" in str(raised.value)


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_layers_that_take_no_time_beside_a_call_do_not_make_others_endless(share):
    rng = np.random.default_rng(int(10 * share))
    ins, outs = Widths(), Widths()
    ins.add("a", {"a": 80}, 8, 1)
    outs.add("b", {"b": 64}, 8, 1)
    for _ in range(20):
        measured = {pair: float(rng.uniform(0.001, 1) * (rng.uniform() > share)) for pair in cross(ins, outs)}
        longest = max(measured.values())
        found = np.array(filled(measured, ins, outs))
        assert found.min() >= 0
        assert found.max() <= longest + 1e-6
        for i in ins.coarse:
            for o in outs.coarse:
                wanted = max(measured[i, o], 0.01 * longest)
                assert found[sorted(ins.fine).index(i), sorted(outs.fine).index(o)] == pytest.approx(wanted, abs=2e-6)


def test_times_of_a_product_are_filled_exactly_from_a_cross():
    """What is a product of both widths is known from a row and a column; measured points stay what they are."""
    ins, outs = Widths(), Widths()
    ins.add("a", {"a": 64}, 8, 1)
    outs.add("b", {"b": 32}, 8, 1)
    time = {
        (i, o): i * o * 0.5 + (7.0 if (i, o) == (min(ins.coarse), min(outs.coarse)) else 0.0)
        for i in ins.fine
        for o in outs.fine
    }
    measured = {pair: time[pair] for pair in cross(ins, outs)}
    assert len(measured) < len(time)
    found = np.array(filled(measured, ins, outs))
    rows, columns = sorted(ins.fine), sorted(outs.fine)
    for (i, o), ms in measured.items():
        assert found[rows.index(i), columns.index(o)] == pytest.approx(ms, rel=1e-5)
    assert found[-2, -2] == pytest.approx(time[rows[-2], columns[-2]], rel=1e-5)


def test_the_fit_finds_what_times_are_made_of():
    features = [(10, 400), (7, 350), (4, 100), (2, 90)]
    found = _fitted("Net", features, [0.8 * layers + 0.01 * e + 0.5 for layers, e in features], [("", 1.0)] * 4)
    assert [found[k] for k in ("layers", "elements", "constant")] == pytest.approx([0.8, 0.01, 0.5], rel=1e-3)


@pytest.mark.parametrize(
    ("size", "made", "kernel"), [(64, 32, 3), (64, 64, 3), (8, 8, 1), (224, 14, 16), (9, 4, 2), (7, 1, 7)]
)
def test_strides_and_pads_make_the_output_that_was_seen(size, made, kernel):
    spec = {"in": [size], "out": [made], "kernel": [kernel], "transposed": False}
    (stride,), (before, after), _ = _geometry(spec)
    assert (size + before + after - kernel) // stride + 1 == made
