"""Ratios by the medians of blocks (`uniform="dlp"`): exact in total, judged as measured ones are, both frameworks."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ConfigError
from slimkit.core.sparse import SparseConfig, allocate
from tests.both.test_sparse_block import batches, chain


def uneven(kit):
    """Three blocks; the weights of the second are ten times smaller, those of the third ten times larger."""
    model = chain(kit)
    for name, parameter in kit.params(model).items():
        for block, factor in (("blocks.1.", 0.1), ("blocks.2.", 10.0)):
            if name.startswith(block) and name.endswith(("up.weight", "down.weight")):
                kit.assign(parameter, kit.array(parameter) * np.float32(factor))
    return model


def ratios(kit, uniform, method="wanda", **kw):
    config = SparseConfig(method=method, sparse_ratio=0.6, uniform=uniform, targets=["blocks.*"], **kw)
    report = kit.slim.Compressor(uneven(kit), config).compress(batches(kit)[:2])
    return report, {name: row["ratio"] for name, row in report["layers"].items()}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_block_with_the_largest_median_loses_most(kit, monkeypatch, method):
    monkeypatch.setattr(allocate, "_errors", lambda *_: [1.0, 0.5])  # of equal ratios and of the others
    report, found = ratios(kit, "dlp", method)
    assert report["allocation"] | {"kept": "dlp", "uniform_error": 1.0, "dlp_error": 0.5} == report["allocation"]
    assert report["zeros"] == round(0.6 * report["weights"])
    own = [[r for name, r in found.items() if name.startswith(f"blocks.{i}.")] for i in range(3)]
    assert all(max(block) - min(block) < 0.01 for block in own)  # whole weights of small layers
    second, first, third = (sum(own[i]) / len(own[i]) for i in (1, 0, 2))
    assert second < first < third
    assert third - second == pytest.approx(2 * allocate.MEDIAN_REACH, abs=0.01)


def test_equal_ratios_stay_where_they_are_better(kit, monkeypatch):
    monkeypatch.setattr(allocate, "_errors", lambda *_: [0.5, 1.0])  # of equal ratios and of the others
    report, found = ratios(kit, "dlp")
    assert report["allocation"]["kept"] == "uniform"
    assert found == ratios(kit, True)[1]


def test_measured_is_the_name_of_false(kit):
    assert ratios(kit, "measured")[1] == ratios(kit, False)[1]


def test_other_words_are_refused():
    with pytest.raises(ArgumentError, match="uniform"):
        SparseConfig(uniform="owl")
    with pytest.raises(ConfigError, match="pattern"):
        SparseConfig(method="wanda", pattern="2:4", uniform="dlp")
    assert SparseConfig.from_dict(SparseConfig(uniform="dlp").to_dict()).allocation == "dlp"
