"""The loss that a cut is foretold to cost, against least squares done afresh; and the knapsack over such losses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from slimkit.core.prune import knapsack
from slimkit.core.prune.allocate import Account
from slimkit.core.prune.elimination import ChannelReader, LayerSignal, eliminate
from slimkit.core.prune.signals import sent_back


def reader(rng, n_in, n_out, owner, rows=200):
    mix = rng.standard_normal((n_in, n_in)) / n_in**0.5
    x = rng.standard_normal((rows, n_in)) @ (np.eye(n_in) + mix)
    signal = LayerSignal(x.T @ x / rows, rng.random(n_out) + 0.1, rows)
    return x, ChannelReader(rng.standard_normal((n_out, n_in)), signal, np.asarray(owner))


def fitted_loss(x, reader, gone):
    """Half the weighed squares that the best weights on the other inputs leave."""
    kept = [k for k, o in enumerate(reader.owner) if o not in gone]
    y = x @ reader.weight.T
    if kept:
        y = y - x[:, kept] @ np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return 0.5 * float((np.square(y).mean(axis=0) * reader.signal.slope).sum())


@pytest.mark.parametrize(
    "owner", [list(range(12)), np.repeat(np.arange(4), 3), [-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2]]
)
def test_foretold_losses_are_those_of_a_fresh_fit(rng, owner):
    x, one = reader(rng, 12, 5, owner)
    size = max(owner) + 1
    losses = eliminate([one], size, rounds=size, damping=1e-9)
    order = np.argsort(losses)
    for number in range(1, size + 1):
        gone = set(order[:number].tolist())
        assert losses[order[number - 1]] == pytest.approx(fitted_loss(x, one, gone), rel=1e-5)


def test_the_first_to_go_is_the_cheapest_of_all(rng):
    x, one = reader(rng, 9, 4, range(9))
    losses = eliminate([one], 9, rounds=9, damping=1e-9)
    alone = [fitted_loss(x, one, {k}) for k in range(9)]
    assert int(np.argmin(losses)) == int(np.argmin(alone))


def test_what_another_input_says_too_costs_nothing(rng):
    x, one = reader(rng, 6, 3, range(6))
    copied = np.concatenate([x, x[:, :1]], axis=1)
    signal = LayerSignal(copied.T @ copied / len(copied), one.signal.slope, len(copied))
    losses = eliminate(
        [ChannelReader(np.concatenate([one.weight, one.weight[:, :1]], axis=1), signal, np.arange(7))], 7, rounds=7
    )
    assert int(np.argmin(losses)) in (0, 6)
    assert losses.min() < 2e-2 * np.sort(losses)[1]  # the damping


def test_readers_of_one_variable_add_up(rng):
    (_, one), (_, two) = reader(rng, 6, 3, range(6)), reader(rng, 6, 5, range(6))
    first = eliminate([one], 6, rounds=1)
    second = eliminate([two], 6, rounds=1)
    assert eliminate([one, two], 6, rounds=1).max() == pytest.approx(first.max() + second.max())


def account(sizes):
    """Blocks whose parameters are 7 and 11 an index, without anything between them."""
    terms = [[7 + 4 * (k % 2), name] for k, name in enumerate(sizes)]
    return Account.of_terms(terms, sizes)


def test_the_knapsack_finds_what_trying_all_finds(rng):
    sizes = {f"d{k}": 6 for k in range(4)}
    counted = account(sizes)
    losses = {name: np.cumsum(rng.random(6)) for name in sizes}
    for target in (60, 120, 200):
        found = knapsack.measured(counted, [6] * 4, target, 0.1, 1, losses, None)
        best = min(
            sum(np.concatenate([[0], losses[n]])[6 - k] for n, k in zip(sizes, counts))
            for counts in product(range(1, 7), repeat=4)
            if counted.count(np.array(counts)) <= target
        )
        got = sum(np.concatenate([[0], losses[n]])[6 - found.keep[n]] for n in sizes)
        assert got == pytest.approx(best, rel=1e-3)
        assert counted.count(np.array(list(found.keep.values()))) == found.total <= target


def test_alike_variables_keep_equal_numbers_and_unknown_ones_all(rng):
    sizes = {f"d{k}": 8 for k in range(4)}
    losses = {name: np.cumsum(rng.random(8)) for name in list(sizes)[:3]}
    found = knapsack.measured(account(sizes), [8] * 4, 180, 0.1, 2, losses, [0, 0, 1, 1])
    assert found.keep["d0"] == found.keep["d1"]
    assert found.keep["d3"] == 8
    assert all(k % 2 == 0 for k in found.keep.values())
    assert found.total <= 180


def test_a_width_that_all_layers_share_comes_as_near_as_its_steps_allow(rng):
    losses = {f"d{k}": rng.random(1536).cumsum() for k in range(30)}
    counted = account(dict.fromkeys(losses, 1536))
    total = counted.count(np.full(30, 1536))
    for keep in np.linspace(0.5, 0.97, 12):
        found = knapsack.measured(counted, [1536] * 30, keep * total, 0.1, 16, losses, [0] * 30)
        assert 0 <= keep - found.total / total < 16 / 1536


def test_no_variable_keeps_more_than_it_may(rng):
    losses = {f"d{k}": rng.random(8).cumsum() for k in range(3)}
    counted = account(dict.fromkeys(losses, 8))
    free = knapsack.measured(counted, [8] * 3, 0.9 * counted.count(np.full(3, 8)), 0.1, 1, losses, None)
    for target in (free.total, 0.6 * free.total):
        most = [min(5, n) for n in free.keep.values()]
        found = knapsack.measured(counted, [8] * 3, target, 0.1, 1, losses, None, most)
        assert all(n <= m for n, m in zip(found.keep.values(), most))
        assert found.total <= target


def test_a_variable_stands_only_where_it_may(rng):
    counted, full = Account.of_terms([[5, f"d{k}"] for k in range(3)], {f"d{k}": 8 for k in range(3)}), np.full(3, 8)
    losses = {f"d{k}": np.cumsum(rng.random(8)) for k in range(3)}
    losses["d0"] /= 100  # so that it would go first
    target = 0.8 * counted.count(full)
    free = knapsack.measured(counted, [8] * 3, target, 0.1, 1, losses, None)
    assert free.keep["d0"] not in (4, 8)
    for places in ([4, 8], [8]):
        found = knapsack.measured(counted, [8] * 3, target, 0.1, 1, losses, None, places={"d0": places})
        assert found.keep["d0"] in places
        assert found.total <= target


def test_widths_that_multiply_one_another_stay_within_the_target(rng):
    sizes = {f"d{k}": 16 for k in range(4)}
    chain = Account.of_terms([["d0", "d1"], ["d1", "d2"], ["d2", "d3"]], sizes)
    losses = {name: np.cumsum(rng.random(16)) for name in sizes}
    found = knapsack.measured(chain, [16] * 4, 384, 0.1, 1, losses, None)
    assert 0.85 * 384 < found.total <= 384


class Stepped(Account):
    """Costs as a device's times may be: nothing is saved until three quarters are left, then much at once."""

    is_linear = False

    def count(self, counts):
        return int(sum(96 if k > 12 else 64 if k > 8 else 8 * k for k in counts))


def test_times_that_stand_still_at_first_do_not_let_everything_go_to_the_floor(rng):
    sizes = {f"d{k}": 16 for k in range(4)}
    losses = {name: np.cumsum(rng.random(16))[::-1].copy() for name in sizes}
    stepped = Stepped.of_terms([[name] for name in sizes], sizes)
    for target, least in ((384, 64), (320, 44), (256, 32), (120, 15)):
        found = knapsack.measured(stepped, [16] * 4, target, 0.1, 1, losses, None)
        assert 0.9 * target <= found.total <= target
        assert sum(found.keep.values()) >= least


def test_where_no_sum_keeps_to_the_target_all_lose_as_much(rng, monkeypatch):
    sizes = {f"d{k}": 16 for k in range(4)}
    losses = {name: np.cumsum(rng.random(16))[::-1].copy() for name in sizes}
    chain = Account.of_terms([["d0", "d1"], ["d1", "d2"], ["d2", "d3"]], sizes)
    monkeypatch.setattr(knapsack, "_solve", lambda *given: None)
    found = knapsack.measured(chain, [16] * 4, 384, 0.1, 1, losses, None)
    assert 0.8 * 384 < found.total <= 384
    lost = [0.0 if k == 16 else float(np.sort(losses[n])[15 - k]) for n, k in found.keep.items()]
    nearest = [float(np.sort(losses[n])[16 - k]) for n, k in found.keep.items() if k > 1]
    assert max(lost) <= min(nearest)


def test_what_is_sent_back_has_the_second_derivative_of_the_divergence():
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    sent = sent_back(np.random.default_rng(0), np.tile(logits, (20000, 1)), (20000, 3))
    p = np.exp(logits)
    # 20,000 draws: a hundredth of the entries, which are up to a quarter
    np.testing.assert_allclose(sent.T @ sent / len(sent), np.diag(p) - np.outer(p, p), atol=5e-3)
