"""One LoRA made of several, in both frameworks: what each method computes, and what stays as it was."""

import numpy as np
import pytest

from slimkit.core.delta import merges
from slimkit.core.errors import ArgumentError, UnsupportedError
from tests.both.test_delta_apply import out, same, snapshot, stir


@pytest.fixture
def net(kit):
    net = kit.named(query=kit.linear(8, 8), act=kit.relu(), value=kit.linear(8, 6))
    kit.train_mode(kit.fill(net), False)
    for seed, (name, rank, targets) in enumerate((("p", 2, ["query", "value"]), ("q", 3, ["query"]))):
        kit.slim.apply_delta(net, "lora", targets, rank=rank, alpha=5, name=name)
        stir(kit, net, seed, what=f"_{name}")
    return net


@pytest.fixture
def x(kit, rng):
    return kit.tensor(rng.standard_normal((5, 8)).astype(np.float32))


def factors(kit, net, path, name):
    params = kit.params(net)
    return [kit.array(params[f"{path}.mindpet_delta_lora_{half}_{name}"]) for half in "ab"]


def test_cat_and_svd_are_the_weighted_sum(kit, net, x):
    kit.slim.set_delta(net, {"p": 0.5, "q": -2.0})
    wanted = out(kit, net, x)
    kit.slim.set_delta(net, ["p", "q"])
    report = kit.slim.combine_delta(net, {"p": 0.5, "q": -2.0}, "both")
    np.testing.assert_allclose(out(kit, net, x), wanted, atol=1e-5)  # float32, sums in another order
    assert {p: r["rank"] for p, r in report.layers.items()} == {"query": 5, "value": 2}
    assert "'p', 'q' no longer act" in str(report)
    kit.slim.combine_delta(net, {"p": 0.5, "q": -2.0}, "sum", method="svd", rank=5)
    np.testing.assert_allclose(out(kit, net, x), wanted, atol=1e-5)
    assert not any(kit.trains(p) for n, p in kit.params(net).items() if n.endswith(("_both", "_sum")))


def test_the_products_are_what_numpy_says(kit, net):
    kit.slim.combine_delta(net, {"p": 1.0, "q": 0.5}, "t", method="ties_svd", density=0.4, rank=8)
    products = []
    for name, rank in (("p", 2), ("q", 3)):
        a, b = factors(kit, net, "query", name)
        product = b @ a
        bound = np.sort(np.abs(product).reshape(-1))[-int(0.4 * product.size)]
        products.append(np.where(np.abs(product) >= bound, product, 0))
    scaled = [p * 5 / rank * w for p, rank, w in zip(products, (2, 3), (1.0, 0.5))]
    wanted = np.zeros((8, 8))
    for i in range(8):
        for j in range(8):
            winner = 1 if products[0][i, j] + products[1][i, j] >= 0 else -1
            voices = [s[i, j] for p, s in zip(products, scaled) if np.sign(p[i, j]) == winner]
            wanted[i, j] = sum(voices) / max(len(voices), 1)
    a, b = factors(kit, net, "query", "t")
    np.testing.assert_allclose(b @ a, wanted, atol=1e-4)  # float32 through a decomposition


def test_it_travels_alone_and_leaves_no_trace(kit, net, x, tmp_path):
    before = snapshot(kit, net)
    kit.slim.combine_delta(net, ["p", "q"], "both", method="dare_linear_svd", density=0.5, seed=3)
    wanted = out(kit, net, x)
    kit.slim.save_delta(net, tmp_path, names="both")
    kit.slim.remove_delta(net, "both")
    kit.slim.set_delta(net, ["p", "q"])
    assert same(snapshot(kit, net), before)
    kit.slim.remove_delta(net)
    kit.slim.load_delta(net, tmp_path)
    np.testing.assert_array_equal(out(kit, net, x), wanted)


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (["p", "r"], {}, ArgumentError, "'r'"),
        (["p", "q"], {"name": "p"}, ArgumentError, "already"),
        (["p", "q"], {"method": "linear"}, ArgumentError, "ranks must be equal"),
        (["p", "q"], {"method": "ties_svd"}, ArgumentError, "density"),
        (["p", "q"], {"density": 0.5}, ArgumentError, "density goes with"),
        (["p", "q"], {"rank": 2}, ArgumentError, "rank goes with"),
        (["p", "q"], {"method": "slerp"}, ArgumentError, "must be one of"),
        (["p", "d"], {}, UnsupportedError, "dora"),
    ],
)
def test_what_cannot_be_combined_changes_nothing(kit, net, names, options, error, words):
    kit.slim.apply_delta(net, "lora", ["query"], rank=2, dora=True, name="d")
    before = snapshot(kit, net)
    with pytest.raises(error, match=words):
        kit.slim.combine_delta(net, names, **{"name": "both", **options})
    assert same(snapshot(kit, net), before)


def test_merged_deltas_and_heads_are_refused(kit, net):
    kit.slim.apply_delta(net, "lora", ["query"], rank=2, name="h", also_train=["*value.bias"])
    with pytest.raises(UnsupportedError, match="values of its own for value"):
        kit.slim.combine_delta(net, ["p", "h"])
    kit.slim.merge_delta(net)
    with pytest.raises(ArgumentError, match="merged"):
        kit.slim.combine_delta(net, ["p"])


def test_random_entries_are_the_same_in_both_frameworks_and_fair(rng):
    tensor = np.ones((200, 200), np.float32)
    kept = merges.drawn(tensor, 0.25, np.random.default_rng([0, 1]))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert abs(kept.mean() - 1) < 0.03  # 40,000 draws: a standard error of 0.009
    assert np.array_equal(kept, merges.drawn(tensor, 0.25, np.random.default_rng([0, 1])))
