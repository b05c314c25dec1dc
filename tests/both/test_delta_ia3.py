"""IA3: factors of outputs or inputs, against their formula, merged, and in PEFT's files."""

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.delta.ia3 import spec_of_file
from slimkit.core.errors import ArgumentError, FileFormatError, PatternError, UnsupportedError
from tests.both.delta_net import build

INNER = [None, ["down"], ["*"]]


@pytest.fixture
def net(kit):
    return build(kit)


@pytest.fixture
def x(rng):
    return rng.standard_normal((5, 6)).astype(np.float32)


def factors(kit, net):
    return {n.partition(".mindpet")[0]: p for n, p in kit.params(net).items() if "ia3_l" in n}


def stir(kit, net):
    rng = np.random.default_rng(2)
    for parameter in factors(kit, net).values():
        kit.assign(parameter, rng.standard_normal(tuple(parameter.shape)).astype(np.float32))


def by_hand(kit, net, x, inner):
    """The formula, in NumPy."""
    held = {n: kit.array(p) for n, p in factors(kit, net).items()}
    values = kit.values(net)
    for name in ("up", "down"):
        inside = inner == ["*"] or (inner is not None and name in inner)
        x = x * held[name] if inside else x
        x = x @ values[f"{name}.weight"].T + values.get(f"{name}.bias", 0)
        x = x if inside else x * held[name]
        x = np.maximum(x, 0) if name == "up" else x
    return x


@pytest.mark.parametrize("inner", INNER, ids=str)
def test_it_starts_as_the_base_and_computes_its_formula(kit, net, x, inner):
    given = kit.tensor(x)
    before, y0 = kit.values(net), kit.array(net(given))
    report = kit.slim.apply_delta(net, "ia3", feedforward=inner)
    wanted = {"up": inner == ["*"], "down": inner is not None}
    assert {p: options["feedforward"] for p, options in report.layers.items()} == wanted
    assert {n for n, p in kit.params(net).items() if kit.trains(p)} == {
        f"{p}.mindpet_delta_ia3.mindpet_delta_ia3_l" for p in wanted
    }
    np.testing.assert_array_equal(kit.array(net(given)), y0)
    stir(kit, net)
    y1 = kit.array(net(given))
    np.testing.assert_allclose(y1, by_hand(kit, net, x, inner), rtol=1e-5, atol=1e-5)
    with kit.slim.disable_delta(net):
        np.testing.assert_array_equal(kit.array(net(given)), y0)
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(kit.array(net(given)), y1, rtol=1e-5, atol=1e-5)
    kit.slim.unmerge_delta(net)
    np.testing.assert_array_equal(kit.array(net(given)), y1)
    assert all(np.array_equal(kit.values(net)[n], v) for n, v in before.items())
    kit.slim.merge_delta(net, unload=True)
    np.testing.assert_allclose(kit.array(net(given)), y1, rtol=1e-5, atol=1e-5)
    assert set(kit.params(net)) == set(before)
    assert set(vars(net.up)) == set(vars(build(kit).up))


@pytest.mark.parametrize("inner", [None, ["0"]], ids=str)
def test_convolutions_have_factors_of_their_channels(kit, rng, inner, tmp_path):
    def make():
        return kit.fill(kit.sequential(kit.conv(3, 4, 3), kit.conv(4, 2, 1)))

    net, x = make(), kit.tensor(rng.standard_normal((2, 3, 5, 5)).astype(np.float32))
    kit.slim.apply_delta(net, "ia3", ["0", "1"], feedforward=inner)
    assert tuple(factors(kit, net)["0"].shape) == ((3,) if inner else (4,))
    stir(kit, net)
    y = kit.array(net(x))
    kit.slim.save_delta(net, tmp_path, format="peft")
    again = make()
    kit.slim.load_delta(again, tmp_path)
    np.testing.assert_array_equal(kit.array(again(x)), y)
    kit.slim.merge_delta(net, unload=True)
    np.testing.assert_allclose(kit.array(net(x)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["slimkit", "peft"])
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_it_travels(kit, net, x, tmp_path, format, inner):
    kit.slim.apply_delta(net, "ia3", feedforward=inner, also_train=["up.bias"], name="mine")
    stir(kit, net)
    kit.assign(kit.params(net)["up.bias"], np.full(8, 0.25, np.float32))
    folder = kit.slim.save_delta(net, tmp_path / "x", format=format)
    again = build(kit)
    kit.slim.load_delta(again, folder)
    np.testing.assert_array_equal(kit.array(again(kit.tensor(x))), kit.array(net(kit.tensor(x))))
    if format == "peft":
        tensors, _ = files.read_tensors(folder / "adapter_model.safetensors", "x")
        shape = tensors["base_model.model.down.ia3_l"].shape
        assert shape == ((4, 1) if inner is None else (1, 8))
    kit.slim.remove_delta(again)
    plain = build(kit)
    assert all(np.array_equal(kit.values(again)[n], v) for n, v in kit.values(plain).items())


def test_a_file_that_contradicts_itself_or_the_model_is_refused(kit, net, tmp_path):
    kit.slim.apply_delta(net, "ia3", feedforward=["down"])
    kit.slim.save_delta(net, tmp_path, format="peft")
    config = files.read_json(tmp_path / "adapter_config.json", "x")
    files.write_json(tmp_path / "adapter_config.json", {**config, "feedforward_modules": []})
    again = build(kit)
    with pytest.raises(FileFormatError, match="down: ia3_l has shape"):
        kit.slim.load_delta(again, tmp_path)
    assert not factors(kit, again)
    files.write_json(tmp_path / "adapter_config.json", config)
    tensors, _ = files.read_tensors(tmp_path / "adapter_model.safetensors", "x")
    files.write_tensors(tmp_path / "adapter_model.safetensors", {k: v for k, v in tensors.items() if "down" in k})
    with pytest.raises(FileFormatError, match=r"no factors for 1 of the 2 layers.*up"):
        kit.slim.load_delta(again, tmp_path)


def test_what_it_cannot_go_on_is_named(kit, net):
    with pytest.raises(PatternError, match="feedforward"):
        kit.slim.apply_delta(net, "ia3", ["up"], feedforward=["down"])
    with pytest.raises(ArgumentError, match="option of ia3"):
        kit.slim.apply_delta(net, "ia3", rank=2)
    table = kit.sequential(kit.embedding(5, 4))
    with pytest.raises(UnsupportedError, match="cannot take ia3"):
        kit.slim.apply_delta(table, "ia3", ["0"])
    kit.slim.apply_delta(net, "ia3", ["up"])
    with pytest.raises(UnsupportedError, match="'ia3' already"):
        kit.slim.apply_delta(net, "lora", ["up"], rank=2)
    assert not factors(kit, table)


def test_an_activation_of_the_layers_own_comes_after_the_factors():
    ms = pytest.importorskip("mindspore")
    import slimkit_ms

    net = ms.nn.SequentialCell(ms.nn.Dense(4, 4, activation="relu"))
    with pytest.raises(UnsupportedError, match="before the activation"):
        slimkit_ms.apply_delta(net, "ia3", ["0"])
    assert type(net[0]) is ms.nn.Dense
    slimkit_ms.apply_delta(net, "ia3", ["0"], feedforward=["0"])


def test_peft_takes_endings_for_feedforward_modules():
    assert spec_of_file({"feedforward_modules": ["proj"]}, "mlp.c_proj", (1, 8)).feedforward
    assert not spec_of_file({"feedforward_modules": r".*\.up"}, "mlp.up.x", (8, 1)).feedforward
