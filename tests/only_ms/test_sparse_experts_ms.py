"""Experts in one parameter as MindSpore's code reads them: cast, gathered, padded to a capacity, equal, or square."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse import SparseConfig

N_EXPERTS, N_IN, N_OUT = 3, 8, 6


def cell_of(kit, read, shape=(N_EXPERTS, N_IN, N_OUT), equal=False):
    """A cell of two parameters whose experts `read(cell, x)` asks."""
    ms = kit.ms
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32)

    class Experts(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.w = ms.Parameter(ms.Tensor(values[:1].repeat(len(values), 0) if equal else values), name="w")

        def construct(self, x):
            return read(self, x)

    return Experts()


def tokens(kit, n=96, width=N_IN):
    return kit.tensor(np.random.default_rng(1).standard_normal((n, width)).astype(np.float32))


def compressed(kit, cell, data, **kw):
    return kit.slim.Compressor(cell, SparseConfig(method="hessian", min_tokens=1, **kw)).compress(data)


def half(ms, cell, x):
    w = ms.ops.cast(cell.w, ms.float16)
    spread = ms.ops.stack([x[:32], x[32:64], x[64:]]).astype(ms.float16)
    return ms.ops.BatchMatMul()(spread, w)


def outer_batch(ms, cell, x):
    # (batch, experts, tokens, in) against (experts, in, out), as mixtures with a capacity do
    return ms.ops.matmul(x.reshape(2, N_EXPERTS, 16, N_IN), cell.w)


def gathered(ms, cell, x):
    return ms.ops.bmm(x.reshape(N_EXPERTS, 32, N_IN), cell.w[ms.Tensor([2, 0, 1])])


def split(ms, cell, x):
    return [ms.mint.matmul(x[:32], part.squeeze(0)) for part in ms.ops.split(cell.w, 1)]


def other_side(ms, cell, x):
    return [ms.ops.matmul(cell.w[i].T, x[32 * i : 32 * i + 32].T) for i in range(N_EXPERTS)]


def turned(ms, cell, x):
    return [ms.ops.MatMul(transpose_a=True)(x[32 * i : 32 * i + 32].T, cell.w[i]) for i in range(N_EXPERTS)]


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
@pytest.mark.parametrize("way", [half, outer_batch, gathered, split, other_side, turned])
def test_a_weight_is_known_however_it_is_sliced_cast_or_turned(kit, way):
    def read(cell, x):
        return way(kit.ms, cell, x)

    report = compressed(kit, cell_of(kit, read), [tokens(kit)])
    rows = {n: row["rows"] for n, row in report["layers"].items()}
    assert rows == {f"w[{i}]": 32 for i in range(N_EXPERTS)}
    assert {row["kind"] for row in report["layers"].values()} == {"conv1d"}


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_the_layout_of_square_experts_is_seen_in_a_product(kit):
    for turned_way in (False, True):

        def read(cell, x):
            return kit.ms.ops.BatchMatMul(transpose_b=turned_way)(x.reshape(N_EXPERTS, 32, N_IN), cell.w)

        report = compressed(kit, cell_of(kit, read, (N_EXPERTS, N_IN, N_IN)), [tokens(kit)], pattern="2:4")
        assert {row["kind"] for row in report["layers"].values()} == {"linear" if turned_way else "conv1d"}
        assert report["fallbacks"] == {}


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_slots_that_no_token_fills_do_not_count(kit):
    def read(cell, x):
        room = np.zeros((N_EXPERTS, 40, 1), np.float32)
        room[:, :25] = 1  # 25 of 40 places of each expert are taken
        return kit.ms.ops.bmm(x[: N_EXPERTS * 40].reshape(N_EXPERTS, 40, N_IN) * kit.tensor(room), cell.w)

    report = compressed(kit, cell_of(kit, read), [tokens(kit, 120)])
    assert [row["rows"] for row in report["layers"].values()] == [25] * N_EXPERTS


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_equal_experts_share_their_rows_and_stay_equal(kit):
    def read(cell, x):
        return [kit.ms.ops.matmul(x[32 * i : 32 * i + 32], cell.w[i]) for i in range(N_EXPERTS)]

    cell = cell_of(kit, read, (N_EXPERTS, N_IN, 16), equal=True)
    report = compressed(kit, cell, [tokens(kit)])
    assert [row["rows"] for row in report["layers"].values()] == [96] * N_EXPERTS
    w = kit.array(cell.w)
    np.testing.assert_array_equal(w[0], w[1])
    np.testing.assert_array_equal(w[0], w[2])


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_a_compiled_product_is_not_seen_and_its_experts_are_named(kit):
    ops = kit.ms.ops

    @kit.ms.jit
    def product(x, w):
        return ops.matmul(x, w)

    def read(cell, x):
        return product(x, cell.w[0])

    report = compressed(kit, cell_of(kit, read), [tokens(kit)])
    assert list(report["fallbacks"]) == ["w[0]", "w[1]", "w[2]"]


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_zeros_of_experts_that_the_cell_does_not_read_plainly_are_refused(kit):
    cell = cell_of(kit, lambda cell, x: kit.ms.ops.matmul(x, cell.w[0]))
    kit.slim.Compressor(cell, SparseConfig()).compress()
    kind = type(cell)
    with pytest.raises(UnsupportedError, match=r"freeze_zeros cannot mask 'w\[0\]': no method of Experts reads self.w"):
        kit.slim.freeze_zeros(cell)
    assert type(cell) is kind
