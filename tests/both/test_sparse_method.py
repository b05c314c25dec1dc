"""A method of one's own: one file and one row, known to every door, in both frameworks."""

from __future__ import annotations

import array_api_compat
import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError
from slimkit.core.sparse import METHODS, SparseConfig, SparseMethod, register_sparse_method


def loudest(problem):
    """Drop the columns whose inputs are quietest, whole ones first: |w|^power times the norm of the input."""
    xp = array_api_compat.array_namespace(problem.weight)
    norm = xp.sqrt(xp.linalg.diagonal(problem.gram))  # (n,)
    scores = xp.abs(problem.weight) ** problem.options["power"] * norm  # (out, n)
    order = xp.argsort(xp.reshape(scores, (-1,)), stable=True)  # (out * n,)
    keep = xp.ones_like(order, dtype=xp.bool)
    keep[order[: problem.n_zeros]] = False
    keep = xp.reshape(keep, scores.shape)
    return xp.where(keep, problem.weight, 0.0), keep, {"power": 1.0, "loudness": float(xp.max(norm))}


@pytest.fixture
def mine():
    register_sparse_method("mine", SparseMethod(loudest, options={"power": 1.0}))
    yield "mine"
    del METHODS["mine"]


def parts(kit):
    model = kit.fill(kit.named(first=kit.linear(16, 12), act=kit.relu(), last=kit.linear(12, 8)))
    rng = np.random.default_rng(0)
    scale = np.linspace(0.1, 3, 16)
    return model, [kit.tensor((rng.standard_normal((32, 16)) * scale).astype(np.float32)) for _ in range(3)]


def test_a_row_is_all_that_a_method_needs(kit, mine):
    model, data = parts(kit)
    weight = kit.values(model)["first.weight"]
    steps = []
    config = SparseConfig(method=mine, options={"power": 2.0}, sparse_ratio=0.25)
    report = kit.slim.Compressor(model, config).compress(data, on_progress=steps.append)
    assert report["ratio"] == 0.25
    assert report["layers"]["first"]["method"] == "mine"
    assert report["layers"]["first"]["loudness"] > 1
    assert [s.layer for s in steps] == ["first", "last"]
    x = np.concatenate([kit.array(b) for b in data]).astype(np.float64)
    scores = np.abs(weight.astype(np.float64)) ** 2 * np.sqrt((x**2).mean(0))
    dropped = kit.values(model)["first.weight"] == 0
    assert scores[dropped].max() <= scores[~dropped].min()
    assert dropped.sum() == 48
    assert report["config"]["options"] == {"power": 2.0}
    assert SparseConfig.from_dict(report["config"]) == config


def test_a_row_of_ones_own_falls_back_and_takes_measured_ratios_like_any(kit, mine):
    model, data = parts(kit)
    report = kit.slim.Compressor(model, SparseConfig(method=mine, min_tokens=1000)).compress(data)
    assert set(report["fallbacks"]) == {"first", "last"}
    model, data = parts(kit)
    report = kit.slim.Compressor(model, SparseConfig(method=mine, uniform=False)).compress(data)
    assert report["zeros"] == report["weights"] // 2
    assert "allocation" in report


def test_rows_that_are_refused(mine):
    with pytest.raises(ConfigError, match="no method has yet"):
        register_sparse_method("wanda", SparseMethod(loudest))
    with pytest.raises(ArgumentTypeError, match="SparseMethod"):
        register_sparse_method("other", loudest)
    with pytest.raises(ArgumentTypeError, match="function"):
        register_sparse_method("other", SparseMethod("loudest"))
    assert "other" not in METHODS
    with pytest.raises(ArgumentError, match="power"):
        SparseConfig(method=mine, options={"powre": 2})
    with pytest.raises(ConfigError, match="none of its own"):
        SparseConfig(method="wanda", options={"power": 2})
    with pytest.raises(ConfigError, match="refits"):
        SparseConfig(method=mine, asymmetric=True)
