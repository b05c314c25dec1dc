"""LoRA's starts from data: against NumPy's singular vectors, with the base as it was and files that make it again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.delta.starts import Sketch, leading
from slimkit.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.both.delta_net import build

A = "mindpet_delta_lora_a"


@pytest.fixture
def net(kit):
    return build(kit)


@pytest.fixture
def batches(kit, rng):
    made = [[rng.standard_normal((9, n)).astype(np.float32) for n in (6, 4)] for _ in range(3)]
    return made, [tuple(map(kit.tensor, pair)) for pair in made]


def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).sum()


def by_hand(kit, net, made):
    """Gradients of the loss by the weights, summed over the batches, and what the layers are given."""
    values = kit.values(net)
    x, y = (np.concatenate(parts) for parts in zip(*made))
    before = x @ values["up.weight"].T + values["up.bias"]
    hidden = np.maximum(before, 0)
    back = 2 * (hidden @ values["down.weight"].T - y)
    inner = (back @ values["down.weight"]) * (before > 0)
    return {"up": inner.T @ x, "down": back.T @ hidden}, {"up": x, "down": hidden}


def spanned(rows):
    return rows.T @ rows  # the projection on what unit rows span, whatever their signs and order


@pytest.mark.parametrize("init", ["gradient", "activations"])
def test_a_spans_what_the_data_says_and_nothing_else_changes(kit, net, batches, init, tmp_path):
    made, given = batches
    x, before = kit.tensor(made[0][0]), {n: (kit.array(p), kit.trains(p)) for n, p in kit.params(net).items()}
    y0 = kit.array(net(x))
    data = {"loss": loss, "calibration": given} if init == "gradient" else {"calibration": [b[0] for b in given]}
    report = kit.slim.apply_delta(net, "lora", rank=2, init=init, **data)
    assert report.layers["up"]["init"] == init
    assert "calibration" not in report.layers["up"]
    np.testing.assert_array_equal(kit.array(net(x)), y0)
    matrices = by_hand(kit, net, made)[0 if init == "gradient" else 1]
    for path, matrix in matrices.items():
        rows = kit.array(kit.params(net)[f"{path}.{A}"])
        want = np.linalg.svd(matrix, full_matrices=False)[2][:2]
        seen = by_hand(kit, net, made)[1][path]
        loud, usual = np.square(seen @ rows.T).mean(0), np.square(seen).sum(1).mean() / (3 * seen.shape[1])
        np.testing.assert_allclose(loud, usual, rtol=1e-3)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)
        np.testing.assert_allclose(spanned(rows), spanned(want), atol=2e-3)  # float32, and a sketch of three batches
    assert not np.any(kit.array(kit.params(net)["up.mindpet_delta_lora_b"]))
    for name, parameter in kit.params(net).items():
        assert kit.trains(parameter) == ("mindpet_delta" in name)
        if kit.name == "torch":
            assert parameter.grad is None
    rng = np.random.default_rng(5)
    for path in matrices:
        b = kit.params(net)[f"{path}.mindpet_delta_lora_b"]
        kit.assign(b, rng.standard_normal(tuple(b.shape)).astype(np.float32))
    want = kit.array(net(x))
    for form in ("slimkit", "peft"):
        kit.slim.save_delta(net, tmp_path / form, format=form)
        again = build(kit)
        loaded = kit.slim.load_delta(again, tmp_path / form)
        np.testing.assert_array_equal(kit.array(again(x)), want)
        assert loaded.layers["up"]["rank"] == 2  # in PEFT's words a plain LoRA, of the same rank
    kit.slim.remove_delta(net)
    after = {n: (kit.array(p), kit.trains(p)) for n, p in kit.params(net).items()}
    assert all(np.array_equal(after[n][0], v) and after[n][1] == t for n, (v, t) in before.items())


def test_the_first_step_goes_further_along_the_gradient_than_from_random_rows(kit, net, batches):
    made, given = batches
    whole = by_hand(kit, net, made)[0]
    kit.slim.apply_delta(net, "lora", rank=2, init="gradient", loss=loss, calibration=given, name="told")
    kit.slim.apply_delta(net, "lora", rank=2, name="random")
    for path, gradient in whole.items():
        shares = []
        for name in ("_told", "_random"):
            rows = kit.array(kit.params(net)[f"{path}.{A}{name}"])
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            shares.append(
                np.linalg.norm(gradient @ np.linalg.pinv(rows) @ rows)
            )  # a step of b moves the weight in there
        assert shares[0] > shares[1]


def test_a_massive_row_does_not_make_the_others_loud(kit, rng):
    """The first token of a language model is some hundred times as long as the rest, which the rows' length is for."""
    net = kit.named(up=kit.linear(24, 8))
    kit.train_mode(kit.fill(net), False)
    rows = (rng.standard_normal((60, 3)) @ rng.standard_normal((3, 24))).astype(np.float32)
    rows[0] = 1000 * rng.standard_normal(24)
    kit.slim.apply_delta(net, "lora", rank=3, init="activations", calibration=[kit.tensor(rows)])
    answers = rows[1:] @ kit.array(kit.params(net)[f"up.{A}"]).T
    usual = np.square(rows[1:]).sum(1).mean() / (3 * 24)
    assert (np.square(answers).mean(0) < 4 * usual).all()


def test_layers_that_the_data_says_nothing_of_start_at_random(kit, net, batches):
    _, given = batches
    report = kit.slim.apply_delta(net, "lora", rank=2, init="gradient", loss=lambda m, b: (m(b[0]) * 0).sum(),
                                  calibration=given)  # fmt: skip
    assert "says nothing of 2 layers, which start at random: up" in str(report)
    assert np.any(kit.array(kit.params(net)[f"up.{A}"]))


def test_what_is_missing_or_too_much_is_named(kit, net, batches):
    _, given = batches
    apply = kit.slim.apply_delta
    with pytest.raises(ArgumentError, match="init='gradient' reads the gradient of the loss: give calibration="):
        apply(net, "lora", rank=2, init="gradient")
    with pytest.raises(ArgumentError, match="calibration is for init='gradient' or 'activations'"):
        apply(net, "lora", rank=2, calibration=given)
    with pytest.raises(ArgumentError, match="loss is for init='gradient'"):
        apply(net, "lora", rank=2, init="activations", calibration=given, loss=loss)
    with pytest.raises(ArgumentError, match="found no loss"):
        apply(net, "lora", rank=2, init="gradient", calibration=[b[0] for b in given])
    with pytest.raises(ArgumentError, match="at least one batch"):
        apply(net, "lora", rank=2, init="activations", calibration=[])
    with pytest.raises(ArgumentTypeError, match="a list of batches"):
        apply(net, "lora", rank=2, init="activations", calibration=given[0][0])
    table = kit.sequential(kit.embedding(5, 4))
    with pytest.raises(UnsupportedError, match="goes on linear layers; 0 is a"):
        apply(table, "lora", ["0"], rank=2, init="activations", calibration=[kit.tensor(np.array([1, 2], np.int32))])
    assert all("mindpet" not in n and kit.trains(p) for n, p in kit.params(net).items())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.integers(0, 9))
def test_leading_directions_are_numpys(n, m, rank, seed):
    rng = np.random.default_rng(seed)
    size = min(n, m)
    u, v = (np.linalg.qr(rng.standard_normal((k, size)))[0] for k in (n, m))
    matrix = (u * 2.0 ** -np.arange(size)) @ v.T  # clear of ties, so that directions are unique
    values, rows = leading(matrix, rank)
    assert rows.shape == (min(rank, size), m)
    np.testing.assert_allclose(values, 2.0 ** -np.arange(size)[:rank], rtol=1e-3)
    np.testing.assert_allclose(np.abs((rows * v.T[: len(rows)]).sum(1)), 1, atol=1e-3)
    assert (rows[np.arange(len(rows)), np.abs(rows).argmax(1)] > 0).all()


def test_a_sketch_of_batches_is_as_good_as_all_rows_together(rng):
    rows = (rng.standard_normal((200, 12)) * 2.0 ** -np.arange(12)) @ np.linalg.qr(rng.standard_normal((12, 40)).T)[0].T
    sketch = Sketch(4)
    for part in np.split(rows, 10):
        sketch.add(part)
    found = sketch.directions
    whole = np.linalg.svd(rows)[2][:4]
    assert np.linalg.norm(rows @ found.T) > 0.9999 * np.linalg.norm(rows @ whole.T)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
