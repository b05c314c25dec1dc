"""The dimension algebra: laws that hold for any axes, and the layouts that networks really use."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.errors import GraphError
from slimkit.core.prune import (
    allocate,
    attributes,
    dims,
    expressions,
    graph,
    importance,
    narrowing,
    refit,
)
from slimkit.core.prune import (
    regroup as regrouping,
)
from slimkit.core.prune.dims import (
    FIXED,
    FREE,
    Dim,
    cut,
    factor,
    find,
    fix,
    fixed,
    leaves,
    product,
    total,
    unify,
)
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.regroup import regroup

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)
quick = settings(max_examples=60, deadline=None)


def fresh(shape):
    return [Dim(n) for n in shape]


@pytest.mark.parametrize(
    "module", [dims, regrouping, graph, expressions, allocate, importance, attributes, refit, narrowing]
)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


@quick
@given(sizes, st.randoms())
def test_regrouping_and_back_gives_the_same_axes(shape, random):
    axes = fresh(shape)
    flat = regroup(axes, [math.prod(shape)])
    back = regroup(flat, shape)
    assert [d.size for d in back] == list(shape)
    assert all(find(a) is find(b) for a, b in zip(axes, back) if a.size > 1)


@quick
@given(sizes, sizes)
def test_regrouping_keeps_every_size_and_number_of_elements(before, after):
    count = math.prod(before) * math.prod(after)
    axes = fresh([*before, math.prod(after)])
    out = regroup(axes, [*after, math.prod(before)])
    assert [d.size for d in out] == [*after, math.prod(before)]
    assert math.prod(d.size for d in out) == count
    for dim in [*axes, *out]:
        assert math.prod(1 for _ in leaves(dim)) == 1
        assert all(leaf.size >= 1 for leaf in leaves(dim))


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_sums_with_different_cuts_are_refined_to_common_pieces(a, b, c):
    left, right = total([Dim(a), Dim(b + c)]), total([Dim(a + b), Dim(c)])
    unify(left, right)
    assert [leaf.size for leaf in leaves(left)] == [leaf.size for leaf in leaves(right)]
    assert all(x is y for x, y in zip(leaves(left), leaves(right)))


def test_first_half_of_heads_is_a_sum_of_products():
    heads, size = Dim(8), Dim(4)
    axis = product([heads, size])
    first, rest = cut(axis, 12)
    assert [first.size, rest.size] == [12, 20]
    assert repr(find(heads)) == "(3?+5?)"


def test_a_cut_through_the_middle_of_a_head_is_refused():
    axis = product([Dim(8), Dim(4)])
    assert cut(axis, 6) is None
    assert factor(product([Dim(6), Dim(4)]), 8) is None


def test_fixing_an_axis_fixes_all_its_variables_and_keeps_the_first_reason():
    a, b = Dim(3), Dim(5)
    fix(total([a, b]), "output")
    fix(a, "later")
    assert find(a).kind == FIXED
    assert find(a).reason == find(b).reason == "output"


def test_equal_parts_of_a_shuffled_concatenation_become_one_variable():
    a, b = Dim(8), Dim(8)
    regroup([total([a, b])], (2, 8))
    assert find(a) is find(b)
    assert find(a).kind == FREE


def test_unequal_axes_cannot_be_unified():
    with pytest.raises(GraphError, match="sizes 3 and 4"):
        unify(Dim(3), Dim(4))


def test_a_repeated_axis_is_never_pruned():
    kept = regroup([Dim(2), Dim(3, elastic=True)], (6,))
    assert [leaf.kind for leaf in leaves(kept[0])] == [FREE, FIXED]


def test_fixed_spreads_through_unification():
    a, b = Dim(6), product([Dim(2), Dim(3)])
    unify(a, b)
    unify(a, fixed(6, "input"))
    assert all(leaf.kind == FIXED for leaf in leaves(b))


@quick
@given(st.lists(st.integers(2, 5), min_size=1, max_size=3), st.data())
def test_kept_indices_are_those_of_an_array_that_is_really_sliced(shape, data):
    names = [f"d{k}" for k in range(len(shape))]
    full = dict(zip(names, shape))
    keep = {
        n: np.array(sorted(data.draw(st.sets(st.integers(0, s - 1), min_size=1, max_size=s)))) for n, s in full.items()
    }
    grid = np.arange(math.prod(shape)).reshape(shape)
    want = grid[np.ix_(*keep.values())].reshape(-1)
    expr = ["*", *names] if len(names) > 1 else names[0]
    assert expressions.kept(expr, full, keep).tolist() == want.tolist()
    doubled = ["+", 3, expr]
    assert expressions.kept(doubled, full, keep).tolist() == [0, 1, 2, *(want + 3)]
    owner = expressions.owners(expr, full, names[0])
    assert owner.tolist() == np.repeat(np.arange(shape[0]), math.prod(shape[1:])).tolist()


@quick
@given(st.integers(1, 8), st.integers(1, 16), st.floats(0.3, 1.0))
def test_allocation_is_aligned_above_the_floor_and_counts_exactly(number, alignment, ratio):
    rng = np.random.default_rng(number * 100 + alignment)
    full = {f"d{k}": int(rng.integers(1, 12)) * 8 for k in range(number)}
    chain = [[10, "d0"], *[[f"d{k}", f"d{k + 1}"] for k in range(number - 1)], [f"d{number - 1}", 5]]
    account = allocate.Account.of_terms(chain, full)
    before = account.count(np.array(list(full.values())))
    got = allocate.allocate(account, list(full.values()), ratio * before, 0.25, alignment)
    assert got.total == sum(math.prod(expressions.size_of(e, got.keep) for e in term) for term in chain)
    for name, kept in got.keep.items():
        step = math.gcd(alignment, full[name])
        assert kept % step == 0
        assert min(full[name], max(step, math.ceil(full[name] * 0.25))) <= kept <= full[name]


def test_a_graph_built_wrongly_is_refused():
    g = Graph(shapes={"w": (2, 3)})
    x = g.add_value((1, 3), "input")
    w = g.add_value((2, 4), "param", "w")
    with pytest.raises(GraphError, match="'w'"):
        g.check()
    g.values[w].shape = (2, 3)
    g.add("conjure", [x, w], [g.add_value((1, 2))])
    with pytest.raises(GraphError, match="conjure"):
        g.check()


def test_refit_recovers_the_dense_layer_when_nothing_was_lost():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((200, 6)), rng.standard_normal((3, 6)), rng.standard_normal(3)
    moments = refit.RefitMoments(6, 3, bias=True)
    moments.add(x, x @ w.T + b)
    found, shift = refit.refit(moments, np.zeros((3, 6)), np.zeros(3), 1e-9)
    np.testing.assert_allclose(found, w, atol=1e-6)  # exact up to the damping of 1e-9
    np.testing.assert_allclose(shift, b, atol=1e-6)


@pytest.mark.parametrize(("floor", "gives_way", "away"), [(0.25, False, 0), (0.5, True, 0), (0.5, False, 125)])
def test_a_coarse_variable_stands_where_the_others_come_nearest(floor, gives_way, away):
    # a keeps 1000 or 2000 of 3500, b up to 1500 in tens: 2625 are reached with all of a and 625 of b alone.
    account = allocate.Account.of_terms([[1000, "a"], [10, "b"]], {"a": 2, "b": 150})
    got = allocate.allocate(account, [2, 150], 2625, floor, 1, gives_way=gives_way)
    assert abs(abs(got.total - 2625) - away) <= 15
    assert got.total == 1000 * got.keep["a"] + 10 * got.keep["b"]
