"""A base held in int8 or bfloat16 under a LoRA: its numbers, its gradients, merging, files, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.delta.held_base import quantised, restored
from slimkit.core.errors import ArgumentError, UnsupportedError
from tests.both.delta_net import build

KINDS = pytest.mark.parametrize("held", ["int8", "bfloat16"])


@pytest.fixture
def net(kit):
    return build(kit)


@pytest.fixture
def x(rng):
    return rng.standard_normal((5, 6)).astype(np.float32)


def by_hand(weight, held):
    """What a weight is once it was held."""
    if held == "int8":
        return restored(*quantised(weight))
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)  # to the nearest even


def stir(kit, net, scale=0.3):
    rng = np.random.default_rng(2)
    for name, parameter in kit.params(net).items():
        if "mindpet_delta" in name:
            kit.assign(parameter, rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * scale)


def factors(kit, net, path):
    return [kit.array(kit.params(net)[f"{path}.mindpet_delta_lora_{part}"]) for part in "ab"]


@KINDS
def test_it_computes_with_what_it_holds_merges_exactly_and_comes_off(kit, net, x, held):
    before, given = kit.values(net), kit.tensor(x)
    report = kit.slim.apply_delta(net, "lora", rank=2, alpha=4, base_dtype=held)
    assert report.layers["up"]["base_dtype"] == held
    base = {path: by_hand(before[f"{path}.weight"], held) for path in ("up", "down")}

    def run(weights):
        return np.maximum(x @ weights["up"].T + before["up.bias"], 0) @ weights["down"].T

    np.testing.assert_allclose(kit.array(net(given)), run(base), rtol=1e-5, atol=1e-5)
    assert {n for n, p in kit.params(net).items() if kit.trains(p)} == {
        f"{path}.mindpet_delta_lora_{part}" for path in base for part in "ab"
    }
    stir(kit, net)
    merged = {p: base[p] + 2 * (b @ a) for p in base for a, b in [factors(kit, net, p)]}
    y = kit.array(net(given))
    np.testing.assert_allclose(y, run(merged), rtol=1e-5, atol=1e-5)
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(kit.array(net.down.weight), merged["down"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kit.array(net(given)), y, rtol=1e-5, atol=1e-5)
    kit.slim.unmerge_delta(net)
    np.testing.assert_array_equal(kit.array(net(given)), y)
    with kit.slim.disable_delta(net):
        np.testing.assert_allclose(kit.array(net(given)), run(base), rtol=1e-5, atol=1e-5)
    kit.slim.merge_delta(net, unload=True)
    after = kit.values(net)
    assert set(after) == set(before)
    np.testing.assert_allclose(after["down.weight"], merged["down"], rtol=1e-6, atol=1e-6)
    assert set(vars(net.up)) == set(vars(build(kit).up))
    np.testing.assert_allclose(kit.array(net(given)), y, rtol=1e-5, atol=1e-5)


@KINDS
def test_its_bytes_and_what_is_left_of_the_base(kit, net, held):
    before = kit.values(net)
    kit.slim.apply_delta(net, "lora", ["down"], rank=2, base_dtype=held)
    stored = kit.params(net)["down.weight_held"]
    assert str(stored.dtype).lower().endswith(held)
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(kit.values(net)["down.weight"], by_hand(before["down.weight"], held))
    assert kit.trains(kit.params(net)["down.weight"])
    kit.slim.apply_delta(net, "lora", ["down"], rank=2)  # a plain layer again


@KINDS
def test_gradients_are_those_over_the_held_weight(kit, net, x, held):
    plain = build(kit)
    for name, parameter in kit.params(plain).items():
        if name.endswith("weight"):
            kit.assign(parameter, by_hand(kit.array(parameter), held))
    found = []
    for model, options in ((net, {"base_dtype": held}), (plain, {})):
        kit.slim.apply_delta(model, "lora", rank=2, **options)
        stir(kit, model)
        trained = {n: p for n, p in kit.params(model).items() if kit.trains(p)}
        if kit.name == "torch":
            (model(kit.tensor(x)) ** 2).sum().backward()
            found.append({n: kit.array(p.grad) for n, p in trained.items()})
        else:
            step = kit.ms.value_and_grad(lambda m=model: (m(kit.tensor(x)) ** 2).sum(), None,
                                         kit.ms.ParameterTuple(trained.values()))  # fmt: skip
            found.append({n: kit.array(g) for n, g in zip(trained, step()[1])})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        np.testing.assert_allclose(gradient, found[1][name], rtol=1e-4, atol=1e-4)


@KINDS
def test_files_hold_it_again_and_peft_gets_a_plain_lora(kit, net, x, held, tmp_path):
    kit.slim.apply_delta(net, "lora", rank=2, base_dtype=held)
    stir(kit, net)
    y = kit.array(net(kit.tensor(x)))
    kit.slim.save_delta(net, tmp_path / "own")
    kit.slim.save_delta(net, tmp_path / "peft", format="peft")
    again = build(kit)
    report = kit.slim.load_delta(again, tmp_path / "own", same_base=True)  # the base is known by what it was
    assert report.layers["up"]["base_dtype"] == held
    np.testing.assert_array_equal(kit.array(again(kit.tensor(x))), y)
    wide = build(kit)
    kit.slim.load_delta(wide, tmp_path / "peft")
    gap = np.abs(kit.array(wide(kit.tensor(x))) - y).max()
    assert 0 < gap < 0.1 * np.abs(y).max()


def test_a_second_delta_goes_on_the_same_base(kit, net, x):
    kit.slim.apply_delta(net, "lora", rank=2, base_dtype="int8")
    kit.slim.apply_delta(net, "lora", rank=1, name="second", base_dtype="int8")
    kit.slim.apply_delta(net, "lora", rank=1, name="third")
    with pytest.raises(ArgumentError, match="not held in bfloat16"):
        kit.slim.apply_delta(net, "lora", rank=1, name="fourth", base_dtype="bfloat16")
    with pytest.raises(UnsupportedError, match="excludes dora"):
        kit.slim.apply_delta(net, "lora", rank=1, name="fifth", dora=True)
    y = kit.array(net(kit.tensor(x)))
    kit.slim.remove_delta(net, ["default", "third"])
    np.testing.assert_array_equal(kit.array(net(kit.tensor(x))), y)  # every b is zero


def test_what_it_is_not_offered_with_is_named_and_changes_nothing(kit, net):
    apply = kit.slim.apply_delta
    for option in ({"dora": True}, {"keep_zeros": True}, {"init": "pissa"}):
        with pytest.raises(UnsupportedError, match="excludes dora, keep_zeros and pissa"):
            apply(net, "lora", rank=2, base_dtype="int8", **option)
    with pytest.raises(ArgumentError, match="base_dtype must be one of"):
        apply(net, "lora", rank=2, base_dtype="int4")
    with pytest.raises(UnsupportedError, match="works on linear layers; 0 is a"):
        apply(kit.sequential(kit.embedding(5, 4)), "lora", ["0"], rank=2, base_dtype="int8")
    net.down.weight = net.up.weight
    with pytest.raises(UnsupportedError, match="shared with another module"):
        apply(net, "lora", ["up"], rank=2, base_dtype="int8")
    assert type(net.up) is type(build(kit).up)


def test_half_precision_neither_overflows_nor_loses_its_gradients(kit, rng):
    """127 times a massive input is beyond float16, and a small gradient times a scale is below it."""
    net = kit.named(up=kit.linear(64, 8))
    kit.train_mode(kit.fill(net), False)
    weight, x = rng.standard_normal((8, 64)).astype(np.float32) * 0.1, np.full((2, 64), 0.25, np.float16)
    x[:, 5] = 1500
    kit.assign(kit.params(net)["up.weight"], weight)
    bias = kit.values(net)["up.bias"]
    kit.slim.apply_delta(net, "lora", rank=2, base_dtype="int8")
    base = by_hand(weight, "int8")
    np.testing.assert_allclose(kit.array(net(kit.tensor(x))), x.astype(np.float32) @ base.T + bias, rtol=5e-3)
    if kit.name == "torch":
        given = kit.tensor(x).requires_grad_()
        (net(given).float().sum() * 1e-4).backward()
        gradient = kit.array(given.grad)
    else:
        gradient = kit.array(kit.ms.grad(lambda v: net(v).astype(kit.ms.float32).sum() * 1e-4)(kit.tensor(x)))
    assert np.linalg.norm(gradient[0] - 1e-4 * base.sum(0)) < 0.02 * np.linalg.norm(1e-4 * base.sum(0))


@KINDS
def test_saved_while_merged_it_is_the_delta_and_not_a_base_that_trains(kit, net, x, held, tmp_path):
    kit.slim.apply_delta(net, "lora", rank=2, base_dtype=held)
    stir(kit, net)
    y, names = kit.array(net(kit.tensor(x))), {n for n, p in kit.params(net).items() if kit.trains(p)}
    kit.slim.merge_delta(net)
    assert {n for n, p in kit.params(net).items() if kit.trains(p)} <= names
    kit.slim.save_delta(net, tmp_path)
    again = build(kit)
    kit.slim.load_delta(again, tmp_path)
    np.testing.assert_array_equal(kit.array(again(kit.tensor(x))), y)
    kit.slim.merge_delta(net, unload=True)
    assert all(kit.trains(p) for p in kit.params(net).values())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_a_row_is_off_by_half_a_step_at_most_and_zeros_stay(outputs, inputs, seed, size):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((outputs, inputs)) * size * rng.integers(0, 2, (outputs, inputs))).astype(np.float32)
    held, scale = quantised(weight)
    assert held.dtype == np.int8
    assert (np.abs(restored(held, scale) - weight) <= 0.5 * scale[:, None] * (1 + 1e-5)).all()
    assert not restored(held, scale)[weight == 0].any()
    assert (np.abs(held).max(1)[weight.any(1)] == 127).all()


@KINDS
def test_what_comes_later_remembers_the_base_that_it_was_made_over(kit, net, x, held, tmp_path):
    kit.slim.apply_delta(net, "lora", ["up"], rank=2, name="one", base_dtype=held)
    kit.slim.apply_delta(net, "lora", ["up"], rank=2, name="two")
    stir(kit, net)
    kit.slim.combine_delta(net, {"one": 0.5, "two": 1.0}, "both")
    for name in ("two", "both"):
        kit.slim.set_delta(net, name)
        fresh = build(kit)
        kit.slim.load_delta(fresh, kit.slim.save_delta(net, tmp_path / name, names=name))
        np.testing.assert_array_equal(kit.array(fresh(kit.tensor(x))), kit.array(net(kit.tensor(x))))


def test_a_delta_over_whole_weights_says_that_they_are_held_here(kit, net, tmp_path):
    kit.slim.apply_delta(net, "lora", ["up"], rank=2)
    folder = kit.slim.save_delta(net, tmp_path / "whole")
    other = build(kit)
    kit.slim.apply_delta(other, "lora", ["up", "down"], rank=2, name="one", base_dtype="int8")
    report = kit.slim.load_delta(other, folder, name="two")
    assert any("made over whole ones" in note for note in report.notes)
    assert not any("whole ones" in note for note in kit.slim.load_delta(build(kit), folder).notes)
