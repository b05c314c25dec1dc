"""The mathematics of sparsity on NumPy arrays: counts, patterns, factors, the sweep, refits, ratios, unfolding."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.checkpoint import shards
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.sparse.allocate import REACH, spread
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths import pattern as patterns
from slimkit.core.sparse.maths import shrink
from slimkit.core.sparse.maths.factor import inverse_factor, inverse_from, quadratic
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.par import refit
from slimkit.core.sparse.maths.pattern import NM
from slimkit.core.sparse.maths.solve import solve, steps_to
from slimkit.core.sparse.maths.sweep import sweep
from slimkit.core.sparse.methods import METHODS, SparseMethod

few = settings(max_examples=25, deadline=None)


def gram_of(n, rows=300, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, n)) @ np.random.default_rng(seed + 1).standard_normal((n, n))
    return x.T @ x / rows


@few
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 300), st.integers(0, 5))
def test_exact_counts_whatever_the_ties(columns, rows, zeros, kinds):
    scores = np.random.default_rng(zeros).integers(0, kinds + 1, (rows, columns)).astype(float)
    zeros = min(zeros, scores.size)
    keep = patterns.keep_all_but(scores, zeros)
    assert (~keep).sum() == zeros
    if 0 < zeros < scores.size:
        assert scores[~keep].max() <= scores[keep].min()
    by_row = patterns.keep_all_but_rows(scores, min(zeros, columns))
    assert ((~by_row).sum(1) == min(zeros, columns)).all()
    same = patterns.keep_by_row(scores, np.full((rows, 1), min(zeros, columns)))
    assert (same == by_row).all()


@few
@given(st.integers(2, 9), st.data())
def test_every_group_keeps_its_largest(group, data):
    nm = NM(data.draw(st.integers(1, group - 1)), group)
    scores = np.random.default_rng(group).integers(0, 4, (5, 3 * group)).astype(float)
    keep = patterns.keep_nm(scores, nm).reshape(5, 3, group)
    assert (keep.sum(2) == nm.keep).all()
    grouped = scores.reshape(5, 3, group)
    for mask, values in zip(keep.reshape(-1, group), grouped.reshape(-1, group)):
        assert values[mask].min() >= values[~mask].max()


@few
@given(st.floats(0.01, 0.99), st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_pieces_of_a_row_add_up(ratio, sizes):
    ends = np.cumsum(sizes).tolist()
    pieces = [patterns.zeros_between(ratio, end - size, end) for end, size in zip(ends, sizes)]
    assert sum(pieces) == round(ratio * ends[-1])


@pytest.mark.parametrize("n", [20, 129, 300, 600])  # a leaf, and recursions that do not divide evenly
def test_inverse_factor_is_the_factor_of_the_inverse(n):
    gram = gram_of(n, rows=2 * n)
    upper, damping = inverse_factor(gram, 0.01)
    assert damping == 0.01
    assert not np.tril(upper, -1).any()
    inverse = np.linalg.inv(gram + 0.01 * np.trace(gram) / n * np.eye(n))
    np.testing.assert_allclose(upper.T @ upper, inverse, atol=1e-9)
    np.testing.assert_allclose(inverse_from(upper), inverse, atol=1e-9)


@pytest.mark.parametrize("n", [20, 300, 600])
def test_half_of_a_symmetric_gram_tells_the_outputs_power(n):
    gram, turned = gram_of(n, rows=2 * n), np.random.default_rng(0).standard_normal((n, 7))
    whole = np.trace(turned.T @ gram @ turned)
    assert abs(quadratic(turned, gram) - whole) < 1e-9 * whole


def test_a_matrix_that_no_damping_cures_is_refused():
    with pytest.raises(ArgumentError, match="positive definite"):
        inverse_factor(-np.eye(4), 0.01)


def column_by_column(weight, gram, mask):
    """The published loop: one column at a time against the whole rest."""
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    w = weight.copy()
    for j in range(w.shape[1]):
        kept = np.where(mask[:, j], w[:, j], 0.0)
        error = (w[:, j] - kept) / upper[j, j]
        w[:, j] = kept
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return w


@pytest.mark.parametrize("block", [8, 50, 128])
def test_blocks_change_nothing_but_the_order_of_sums(block):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((6, 70)), gram_of(70)
    keep = rng.random((6, 70)) > 0.5
    upper, _ = inverse_factor(gram, 0.0)
    turned = weight.T.copy()
    mask, loss = sweep(turned, upper, 0.5, None, block, keep=keep.T)
    ours = turned.T
    assert (mask.T == keep).all()
    np.testing.assert_allclose(ours, column_by_column(weight, gram, keep), atol=1e-8)  # float64, ill-conditioned
    change = weight - ours
    assert abs(loss - np.sum((change @ gram) * change)) < 1e-8 * loss


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(5, 8)])
def test_groups_choose_by_what_the_columns_before_them_left(nm):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((6, 48)), gram_of(48)
    upper, _ = inverse_factor(gram, 0.01)
    turned = weight.T.copy()
    mask, _ = sweep(turned, upper, 0.0, nm, 128)
    damped = gram + 0.01 * np.trace(gram) / 48 * np.eye(48)
    for start in range(0, 48, nm.group):  # what stands when a group's turn comes, and what it chooses then
        chosen = mask.T.copy()
        chosen[:, start:] = True
        stands = column_by_column(weight, damped, chosen)[:, start : start + nm.group]
        scores = (stands / np.diag(upper)[start : start + nm.group]) ** 2
        assert (patterns.keep_nm(scores, nm) == mask.T[:, start : start + nm.group]).all()


def test_no_zero_is_negative():
    turned = np.random.default_rng(0).standard_normal((48, 6))
    sweep(turned, inverse_factor(gram_of(48), 0.01)[0], 0.5, None, 16)
    assert not np.signbit(turned[turned == 0]).any()


@pytest.mark.parametrize("zeros", [1, 20_000, 65_000, 99_999])
def test_exact_counts_among_many_scores(zeros):
    scores = np.random.default_rng(0).standard_normal((10, 10_000))
    scores[:7] = np.round(scores[:7], 1)  # ties, and a sample that a sorted array misleads
    for some in (scores, np.sort(scores.reshape(-1)).reshape(scores.shape)):
        keep = patterns.keep_all_but(some, zeros)
        assert (~keep).sum() == zeros
        assert some[~keep].max() <= some[keep].min()


def test_refit_reaches_least_squares_on_the_support():
    rng = np.random.default_rng(0)
    gram = np.corrcoef(rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)), rowvar=False) + 0.1 * np.eye(12)
    goal, keep = rng.standard_normal((5, 12)), rng.random((5, 12)) > 0.4
    fitted = goal.copy()
    losses = refit(goal, fitted, keep, gram, 40)
    for row, target, mask, loss in zip(fitted, goal, keep, losses[:, 0]):
        best = np.linalg.solve(gram[np.ix_(mask, mask)], gram[mask] @ target)
        np.testing.assert_allclose(row[mask], best, atol=1e-8)
        assert not row[~mask].any()
        assert abs(loss - (target - row) @ gram @ (target - row)) < 1e-8


def test_shrinkage_grows_as_rows_get_few():
    correlation = np.corrcoef(gram_of(10), rowvar=False)
    shares = [shrink.linear(correlation.copy(), count)[1] for count in (5, 50, 5000)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] <= 1
    assert np.allclose(np.diag(shrink.linear(correlation.copy(), 50)[0]), 1)


@few
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.floats(0.2, 0.8))
def test_spread_ratios_keep_the_total_and_the_reach(levels, ratio):
    names = {str(i): 100 * (i + 1) for i in range(len(levels))}
    costs = {n: [v, v * 3] for n, v in zip(names, levels)}
    found = spread(costs, [ratio - 0.1, ratio + 0.1], names, ratio)
    assert abs(sum(names[n] * r for n, r in found.items()) - ratio * sum(names.values())) < 1e-3
    assert all(ratio - REACH - 1e-9 <= r <= ratio + REACH + 1e-9 for r in found.values())


def test_progressive_steps_rise_to_the_ratio():
    steps = steps_to(0.6, SparseConfig(progressive=True, progressive_steps=5))
    assert len(steps) == 5
    assert steps == sorted(steps)
    assert steps[-1] == 0.6


@pytest.mark.parametrize("groups", [1, 2])
def test_unfolding_is_the_convolution(groups):
    rng = np.random.default_rng(0)
    layer = SparseLayer("c", "conv2d", (4, 6 // groups, 3, 2), groups, stride=(2, 1), dilation=(1, 2))
    x, weight = rng.standard_normal((2, 6, 9, 8)), rng.standard_normal(layer.shape)
    matrix = layer.to_matrix(weight)
    assert (layer.from_matrix(matrix) == weight).all()
    (rows,) = layer.rows(x)
    out = (rows @ matrix.transpose(0, 2, 1)).reshape(groups, 2, 4, 6, 4 // groups)
    for n, o, i, j in ((0, 0, 0, 0), (1, 3, 2, 4), (1, 1, 3, 5)):
        group, inner = divmod(o, 4 // groups)
        channels = slice(group * 6 // groups, (group + 1) * 6 // groups)
        patch = x[n, channels, 2 * i : 2 * i + 3, j : j + 3 : 2]
        assert abs(out[group, n, i, j, inner] - (patch * weight[o]).sum()) < 1e-10


def test_paired_moments_find_the_weights_for_changed_inputs():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((40000, 8))
    turn = rng.standard_normal((8, 8)) / 3 + np.eye(8)
    layer = SparseLayer("l", "linear", (5, 8), has_bias=True)
    moments = Moments(layer, paired=True)
    moments.add(dense @ turn + 0.5, dense)
    weight = rng.standard_normal((5, 8))
    solved = solve(layer, weight, moments, 0.01, SparseConfig(method="par", damping=1e-6))  # 0.01: nothing dropped
    before = dense @ weight.T
    after = (dense @ turn + 0.5) @ np.asarray(solved.weight).T + np.asarray(solved.bias_shift)
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)  # the shrinkage's price


@pytest.mark.parametrize("rows", [4, 30, 400])
@pytest.mark.parametrize("method", ["hessian", "par", "par_v2"])
def test_the_error_told_is_the_calibration_rows_error(method, rows):
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((rows, 24)) @ rng.standard_normal((24, 24))
    sparse = dense + 0.2 * rng.standard_normal(dense.shape)
    dense[:, 5] = sparse[:, 5] = 0.0  # a dead column
    weight, drift = rng.standard_normal((9, 24)), 0.1 * rng.standard_normal((rows, 9))
    for layer, inputs in (
        (SparseLayer("l", "linear", (9, 24)), (sparse,)),
        (SparseLayer("l", "linear", (9, 24), has_bias=True), (sparse, dense, drift)),
    ):
        moments = [Moments(layer, paired=len(inputs) > 1) for _ in range(2)]
        for m in moments:
            m.add(*inputs)
        config = SparseConfig(method=method, pattern="2:4", min_tokens=1)
        kept, spent = (solve(layer, weight, m, 0.5, config, last=last) for m, last in zip(moments, (False, True)))
        np.testing.assert_array_equal(kept.weight, spent.weight)  # memory is saved, nothing else
        assert kept.account["output_error"] == spent.account["output_error"]
        if len(inputs) == 1:
            change = sparse @ (weight - np.asarray(kept.weight)).T
            # A column without input makes no error and no output, whatever its weights become.
            told = kept.account["output_error"] ** 2 * np.sum((sparse @ weight.T) ** 2)
            np.testing.assert_allclose(told, np.sum(change**2), rtol=1e-6)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_summed_as_missing_are_those_of_the_inputs_products(has_bias, groups):
    rng = np.random.default_rng(0)
    layer = SparseLayer("l", "conv2d", (6, 8 // groups, 1, 1), groups=groups, has_bias=has_bias)
    weight = rng.standard_normal(layer.shape)
    dense = rng.standard_normal((50, 8, 3, 3)) + 0.5
    sparse = dense + 0.1 * rng.standard_normal(dense.shape)
    ways = [Moments(layer, True), Moments(layer, True, weight)]
    for moments in ways:
        for half in (slice(0, 20), slice(20, 50)):
            moments.add(sparse[half], dense[half])
    assert ways[0].missing is None
    assert ways[1].cross is None
    first, second = (solve(layer, weight, m, 0.5, SparseConfig(method="par")) for m in ways)
    np.testing.assert_allclose(first.weight, second.weight, atol=1e-12)
    if has_bias:
        np.testing.assert_allclose(first.bias_shift, second.bias_shift, atol=1e-12)


def test_shards_are_copied_with_some_tensors_replaced(tmp_path):
    from slimkit.core import files

    rng = np.random.default_rng(0)
    old = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float32)}
    files.write_tensors(tmp_path / "model.safetensors", old)
    files.write_tensors(tmp_path / "new", {"a": old["a"] * 2})
    shards.rewrite(tmp_path / "model.safetensors", tmp_path / "out", shards.header(tmp_path / "new"))
    found, _ = files.read_tensors(tmp_path / "out")
    assert (found["a"] == old["a"] * 2).all()
    assert (found["b"] == old["b"]).all()
    files.write_tensors(tmp_path / "new", {"a": old["b"]})
    with pytest.raises(UnsupportedError, match="'a'"):
        shards.rewrite(tmp_path / "model.safetensors", tmp_path / "out", shards.header(tmp_path / "new"))


@few
@given(st.integers(0, 400), st.integers(0, 255))
def test_damaged_shards_are_refused_or_read(position, value):
    import tempfile
    from pathlib import Path

    from safetensors.numpy import save

    data = bytearray(save({"a": np.ones((3, 4), np.float32)}))
    data[position % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(bytes(data))
        try:
            places = shards.header(file)
        except FileFormatError:
            return
        assert all(0 <= p.start <= p.stop <= len(data) for p in places.values())


@pytest.mark.parametrize("rows", [30, 60, 90, 600])
def test_shrinking_each_eigenvalue_beats_one_share_for_all(rows):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((12, 60)) / 12**0.5  # a few strong directions over a floor of noise
    truth = mix.T @ mix + 0.25 * np.eye(60)
    scale = np.sqrt(np.diag(truth))
    x = (rng.standard_normal((rows, 12)) @ mix + 0.5 * rng.standard_normal((rows, 60))) / scale
    truth = truth / scale[:, None] / scale
    sample = x.T @ x / rows
    values, vectors = np.linalg.eigh(sample)
    found = shrink.nonlinear(values, rows)
    assert (np.diff(found) >= 0).all()
    assert found[0] > 0
    error = [
        np.linalg.norm(m - truth)
        for m in ((vectors * found) @ vectors.T, shrink.linear(sample.copy(), rows)[0], sample)
    ]
    assert error[0] < 0.97 * error[1] < error[2]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("method", ["hessian", "par", "par_v2", "wanda"])
def test_dead_columns_do_as_little_at_any_scale_of_the_inputs(method, scale):
    """Ones on their diagonal, as the published loop has them, were most of the damping where inputs are small."""
    rng = np.random.default_rng(1)
    layer, weight = SparseLayer("l", "linear", (12, 24)), rng.standard_normal((12, 24))
    rows = rng.standard_normal((300, 24)) @ (np.eye(24) + 0.3 * rng.standard_normal((24, 24)))
    rows[:, ::3] = 0
    found = []
    for factor in (1.0, scale):
        moments = Moments(layer)
        moments.add(factor * rows)
        found.append(solve(layer, weight, moments, 0.5, SparseConfig(method=method, swaps=3)))
    np.testing.assert_array_equal(found[0].keep, found[1].keep)
    np.testing.assert_allclose(found[0].weight, found[1].weight, rtol=1e-9, atol=1e-12)
    assert found[1].account["output_error"] == pytest.approx(found[0].account["output_error"], rel=1e-9)
    assert not found[1].keep[:, ::3].any()


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("method", ["hessian", "par", "par_v2"])
def test_hardly_a_row_makes_no_weight_that_is_not_finite(method, rows):
    """Nonlinear shrinkage of one row has no eigenvalue to start from: its weights were NaN."""
    rng = np.random.default_rng(2)
    for layer in (SparseLayer("l", "linear", (6, 16)), SparseLayer("l", "linear", (6, 16), has_bias=True)):
        x, weight = rng.standard_normal((rows, 16)), rng.standard_normal((6, 16))
        moments = Moments(layer, paired=True)
        moments.add(x + 0.1 * rng.standard_normal(x.shape), x)
        found = solve(layer, weight, moments, 0.5, SparseConfig(method=method, min_tokens=0))
        assert np.isfinite(found.weight).all()
        assert np.count_nonzero(found.keep) == 48


def test_a_method_whose_weights_are_not_finite_is_refused_by_name():
    layer, weight = SparseLayer("l", "linear", (2, 4)), np.ones((2, 4))
    broken = SparseMethod(lambda p: (p.weight * np.nan, p.weight > 0, {}), needs_data=False)
    with mock.patch.dict(METHODS, {"broken": broken}), pytest.raises(ArgumentError, match="'broken' gave 'l'"):
        solve(layer, weight, None, 0.5, SparseConfig(method="broken"))
