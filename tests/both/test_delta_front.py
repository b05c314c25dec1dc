"""Prefixes and prompts on attention models that nobody edits, in both frameworks."""

import copy
import functools

import numpy as np
import pytest

from slimkit.core.errors import PatternError, UnsupportedError
from tests import attention_twins as twins
from tests.both.test_delta_apply import same, snapshot

FRONTS = [
    ("prefix", {"prefix_token_num": 3}),
    ("prefix", {"prefix_token_num": 3, "projection": True, "mid_dim": 6}),
    ("prompt", {"num_virtual_tokens": 3}),
]
IDS = ["prefix", "prefix-projection", "prompt"]


@pytest.fixture
def net(kit):
    return twins.build(kit)


@pytest.fixture
def batch(kit):
    return twins.batch(kit)


def put(kit, net, kind, options, batch):
    return kit.slim.apply_delta(net, kind, **options, **({"inputs": batch} if kind == "prefix" else {}))


def train(kit, net, batch, steps=6, lr=0.1):
    """Plain gradient steps of the mean square; gives the losses and whether every trainable got a gradient."""
    losses, reached = [], True
    for _ in range(steps):
        if kit.name == "torch":
            net.zero_grad()
            loss = (net(*batch) ** 2).mean()
            loss.backward()
            grads = {n: kit.array(p.grad) for n, p in net.named_parameters() if p.requires_grad}
        else:
            params = net.trainable_params()

            def loss_of(ids, mask):
                return (net(ids, mask) ** 2).mean()

            loss, found = kit.ms.value_and_grad(loss_of, None, kit.ms.ParameterTuple(params))(*batch)
            grads = {p.name: kit.array(g) for p, g in zip(params, found)}
        losses.append(float(kit.array(loss)))
        reached = reached and all(np.abs(g).max() > 0 for g in grads.values())
        for name, parameter in kit.params(net).items():
            if name in grads:
                kit.assign(parameter, kit.array(parameter) - lr * grads[name])
    return losses, reached


@pytest.mark.parametrize(("kind", "options"), FRONTS, ids=IDS)
def test_it_trains_alone_travels_and_comes_off_bit_for_bit(kit, net, batch, kind, options, tmp_path):
    before, y0, form = snapshot(kit, net), kit.array(net(*batch)), type(net.layers[0])
    report = put(kit, net, kind, options, batch)
    assert len(report.layers) == (2 if kind == "prefix" else 1)
    assert all("mindpet_delta" in n for n, p in kit.params(net).items() if kit.trains(p))
    losses, reached = train(kit, net, batch)
    assert reached
    assert losses[-1] < losses[0]
    y1 = kit.array(net(*batch))
    kit.slim.save_delta(net, tmp_path / "d")
    fresh = twins.build(kit)
    kit.slim.load_delta(fresh, tmp_path / "d")  # the bundle tells the sizes: nothing has to run
    np.testing.assert_array_equal(kit.array(fresh(*batch)), y1)
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), before)
    assert type(net.layers[0]) is form
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)


def test_a_prefix_stands_in_front_of_keys_and_values(kit, net, batch):
    kit.slim.apply_delta(net, "prefix", prefix_token_num=3, inputs=batch)
    values = {n.replace("embedding_table", "weight"): kit.array(p) for n, p in kit.params(net).items()}
    ids, mask = (kit.array(t) for t in batch)
    np.testing.assert_allclose(kit.array(net(*batch)), by_hand(values, ids, mask), atol=1e-5)  # float32, 16 terms


def test_positions_start_behind_the_prefix_where_told(kit, net, batch, tmp_path):
    y0 = kit.array(net(*batch))
    ids, mask = (kit.array(t) for t in batch)
    kit.slim.apply_delta(net, "prefix", prefix_token_num=3, inputs=batch, positions=["places"])
    values = {n.replace("embedding_table", "weight"): kit.array(p) for n, p in kit.params(net).items()}
    want = by_hand(values, ids, mask, start=3)
    np.testing.assert_allclose(kit.array(net(*batch)), want, atol=1e-5)  # float32, 16 terms
    kit.slim.save_delta(net, tmp_path / "d")
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)
    with pytest.raises(UnsupportedError, match=r"positions start behind it.*positions=\["):
        kit.slim.load_delta(net, tmp_path / "d")  # no name says which module holds the positions
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)
    kit.slim.load_delta(net, tmp_path / "d", positions=["place*"])
    np.testing.assert_allclose(kit.array(net(*batch)), want, atol=1e-5)


def test_a_module_that_gets_no_positions_is_named(kit, net, batch):
    y0 = kit.array(net(*batch))
    with pytest.raises(PatternError, match="palces"):
        kit.slim.apply_delta(net, "prefix", inputs=batch, positions=["palces"])
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)
    kit.slim.apply_delta(net, "prefix", inputs=batch, positions=["head"])
    with pytest.raises((TypeError, UnsupportedError), match="whole numbers"):
        net(*batch)


def by_hand(values, ids, mask, start=0):
    """The twins' outputs under a prefix, in NumPy; positions count from `start`."""

    def linear(x, name):
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    def split(x):
        return x.reshape(*x.shape[:2], twins.HEADS, -1).swapaxes(1, 2)

    x = values["words.weight"][ids] + values["places.weight"][start : start + ids.shape[1]]
    hidden = (1.0 - mask[:, None, None]) * -1e4
    hidden = np.concatenate((np.zeros((*hidden.shape[:-1], 3)), hidden), -1)
    for i in range(2):
        path = f"layers.{i}"
        front = [
            np.broadcast_to(split(values[f"{path}.mindpet_delta_prefixtuning.{part}"][None]), (len(ids), 2, 3, 8))
            for part in ("key", "value")
        ]
        q, k, v = (split(linear(x, f"{path}.{n}")) for n in ("query", "key", "value"))
        scores = q @ np.concatenate((front[0], k), 2).swapaxes(2, 3) / 8**0.5 + hidden
        share = np.exp(scores - scores.max(-1, keepdims=True))
        y = (share / share.sum(-1, keepdims=True)) @ np.concatenate((front[1], v), 2)
        x = x + linear(y.swapaxes(1, 2).reshape(x.shape), f"{path}.out")
    return linear(x, "head")


def test_a_prompt_started_from_a_text_is_that_text(kit, net, batch):
    ids, mask = (kit.array(t) for t in batch)
    text = np.array([[4, 9, 2]] * 2)
    longer = (np.concatenate((text, ids), 1), np.concatenate((np.ones_like(text), mask), 1))
    want = kit.array(net(*map(kit.tensor, longer)))
    kit.slim.apply_delta(net, "prompt", text_ids=[4, 9, 2])
    np.testing.assert_allclose(kit.array(net(*batch)), want, atol=1e-6)  # the same arithmetic on the same numbers


def test_targets_choose_the_attention_layers(kit, net, batch):
    assert list(kit.slim.apply_delta(net, "prefix", ["layers.1"], inputs=batch).layers) == ["layers.1"]
    fresh = twins.build(kit)
    y0 = kit.array(fresh(*batch))
    with pytest.raises(PatternError, match="nowhere"):
        kit.slim.apply_delta(fresh, "prefix", ["nowhere"], inputs=batch)
    np.testing.assert_array_equal(kit.array(fresh(*batch)), y0)


def test_what_cannot_be_found_is_named(kit, net, batch):
    with pytest.raises(ValueError, match="inputs"):
        kit.slim.apply_delta(net, "prefix")
    plain = kit.named(body=kit.linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"softmax|scaled_dot_product_attention"):
        kit.slim.apply_delta(plain, "prefix", inputs=kit.tensor(np.ones((1, 4), np.float32)))
    with pytest.raises(UnsupportedError, match="embedding"):
        kit.slim.apply_delta(plain, "prompt")
    put(kit, net, "prompt", {"num_virtual_tokens": 2}, batch)
    with pytest.raises(ValueError, match="already"):
        kit.slim.apply_delta(net, "prompt", num_virtual_tokens=2, name="second")


@pytest.mark.parametrize(("kind", "options"), FRONTS, ids=IDS)
def test_deepcopy_is_independent(kit, net, batch, kind, options):
    put(kit, net, kind, options, batch)
    twin = copy.deepcopy(net)
    y = kit.array(net(*batch))
    np.testing.assert_array_equal(kit.array(twin(*batch)), y)
    kit.slim.remove_delta(twin)
    np.testing.assert_array_equal(kit.array(net(*batch)), y)


@pytest.mark.parametrize("positions", [None, ["places"]], ids=str)
@pytest.mark.parametrize(("kind", "options"), FRONTS, ids=IDS)
def test_the_base_runs_alone_while_it_is_off(kit, net, batch, kind, options, positions):
    if positions is not None:
        if kind == "prompt":
            return
        options = {**options, "positions": positions}
    y0 = kit.array(net(*batch))
    put(kit, net, kind, options, batch)
    y1 = kit.array(net(*batch))
    assert y1.shape != y0.shape or np.abs(y1 - y0).max() > 1e-3
    with kit.slim.disable_delta(net):
        np.testing.assert_allclose(kit.array(net(*batch)), y0, atol=1e-6)  # the same products, some in another kernel
    np.testing.assert_array_equal(kit.array(net(*batch)), y1)
    kit.slim.apply_delta(net, "lora", ["head"], rank=2, name="other")
    kit.slim.set_delta(net, "other")
    np.testing.assert_allclose(kit.array(net(*batch)), y0, atol=1e-6)
    kit.slim.set_delta(net, "default")
    np.testing.assert_array_equal(kit.array(net(*batch)), y1)
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)


@pytest.mark.parametrize("where", ["attention", "embedding", "model"])
@pytest.mark.parametrize(("kind", "options"), FRONTS[::2], ids=IDS[::2])
def test_a_method_replaced_on_an_object_never_takes_a_delta_away_in_silence(kit, net, batch, kind, options, where):
    put(kit, net, kind, options, batch)
    y1 = kit.array(net(*batch))
    values = {n: kit.array(p) for n, p in kit.params(net).items() if "mindpet" in n}
    kit.slim.remove_delta(net)
    y0 = kit.array(net(*batch))
    method = "forward" if kit.name == "torch" else "construct"
    modules = {"attention": list(net.layers), "embedding": [net.words], "model": [net]}[where]
    for module in modules:
        setattr(module, method, functools.partial(getattr(module, method)))
    goes_on = {"prefix": where != "attention", "prompt": kit.name == "torch" or where == "attention"}  # torch: hooks
    if not goes_on[kind]:
        with pytest.raises(UnsupportedError, match="was replaced on the object"):
            put(kit, net, kind, options, batch)
        np.testing.assert_array_equal(kit.array(net(*batch)), y0)
        return
    put(kit, net, kind, options, batch)
    for name, value in values.items():
        kit.assign(kit.params(net)[name], value)
    np.testing.assert_allclose(kit.array(net(*batch)), y1, atol=1e-6)
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(kit.array(net(*batch)), y0)
