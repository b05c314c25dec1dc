"""MiSS and SHiRA: against their formulas in NumPy, trained, merged, and in files of both sorts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slimkit.core import files
from slimkit.core.delta import miss, shira
from slimkit.core.delta.miss import MissSpec
from slimkit.core.delta.shira import ShiraSpec, chosen, refuse_index
from slimkit.core.delta.spec import Site
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.jobs.inspecting import look
from tests.both.delta_net import build

KINDS = [
    ("miss", {"rank": 4}),
    ("miss", {"rank": 5, "repeat": 4}),
    ("shira", {"rank": 1}),
    ("shira", {"rank": 1, "support": "magnitude"}),
    ("shira", {"rank": 1, "support": "random", "seed": 3}),
]
NAMES = [f"{kind}-{'-'.join(map(str, options.values()))}" for kind, options in KINDS]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)


@pytest.fixture
def net(kit):
    return build(kit)


@pytest.fixture
def x(rng):
    return rng.standard_normal((5, 6)).astype(np.float32)


def trained(kit, net):
    return {n: p for n, p in kit.params(net).items() if "mindpet_delta" in n and "index" not in n}


def stir(kit, net):
    rng = np.random.default_rng(2)
    for parameter in trained(kit, net).values():
        kit.assign(parameter, rng.standard_normal(tuple(parameter.shape)).astype(np.float32))


def change(kind, options, weight, values, spec):
    """What the delta adds to a weight, from its values, in NumPy."""
    if kind == "miss":
        return miss.weight_change(values, *weight.shape)
    return shira.weight_change(values, chosen(weight, ShiraSpec(**{**spec, "count": 0})), weight.shape)


@every_kind
def test_it_starts_as_the_base_computes_its_formula_and_merges(kit, net, x, kind, options):
    given, before = kit.tensor(x), kit.values(net)
    y0 = kit.array(net(given))
    report = kit.slim.apply_delta(net, kind, **options)
    np.testing.assert_array_equal(kit.array(net(given)), y0)
    assert all(kit.trains(p) == (n in trained(kit, net)) for n, p in kit.params(net).items())
    stir(kit, net)
    merged = {}
    for path in ("up", "down"):
        (values,) = (kit.array(p) for n, p in trained(kit, net).items() if n.startswith(path))
        spec = {k: v for k, v in report.layers[path].items() if k != "type"}
        merged[path] = before[f"{path}.weight"] + change(kind, options, before[f"{path}.weight"], values, spec)
    want = np.maximum(x @ merged["up"].T + before["up.bias"], 0) @ merged["down"].T
    y1 = kit.array(net(given))
    np.testing.assert_allclose(y1, want, rtol=1e-5, atol=1e-5)
    with kit.slim.disable_delta(net):
        np.testing.assert_array_equal(kit.array(net(given)), y0)
    np.testing.assert_array_equal(kit.array(net(given)), y1)
    kit.slim.merge_delta(net)
    for path, weight in merged.items():
        np.testing.assert_array_equal(kit.values(net)[f"{path}.weight"], weight)
    np.testing.assert_allclose(kit.array(net(given)), y1, rtol=1e-5, atol=1e-5)
    kit.slim.unmerge_delta(net)
    np.testing.assert_array_equal(kit.array(net(given)), y1)
    kit.slim.remove_delta(net)
    assert all(np.array_equal(kit.values(net)[n], v) for n, v in before.items())
    assert set(vars(net.up)) == set(vars(build(kit).up))


@every_kind
def test_its_gradient_is_that_of_the_weight(kit, net, x, kind, options):
    kit.slim.apply_delta(net, kind, ["down"], **options)
    stir(kit, net)
    hidden = np.maximum(x @ kit.values(net)["up.weight"].T + kit.values(net)["up.bias"], 0)
    out = kit.array(net(kit.tensor(x)))
    dense = (2 * out).T @ hidden  # of sum(out ** 2) by the weight
    (values,) = trained(kit, net).values()
    if kit.name == "torch":
        (net(kit.tensor(x)) ** 2).sum().backward()
        found = kit.array(values.grad)
    else:
        loss = kit.ms.value_and_grad(lambda: (net(kit.tensor(x)) ** 2).sum(), None, kit.ms.ParameterTuple([values]))
        found = kit.array(loss()[1][0])
    if kind == "shira":
        weight = kit.values(net)["down.weight"]
        want = dense.reshape(-1)[chosen(weight, ShiraSpec(**options))]
    else:
        want = np.zeros_like(found)
        np.add.at(want, (np.arange(8)[None] % want.shape[0], np.arange(4)[:, None] % want.shape[1]), dense)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)  # float32, sums of 40 terms


@pytest.mark.parametrize("format", ["slimkit", "peft"])
@every_kind
def test_it_travels(kit, net, x, tmp_path, kind, options, format):
    kit.slim.apply_delta(net, kind, **options, also_train=["up.bias"], name="mine")
    stir(kit, net)
    kit.assign(kit.params(net)["up.bias"], np.full(8, 0.25, np.float32))
    folder = kit.slim.save_delta(net, tmp_path / "x", format=format)
    again = build(kit)
    report = kit.slim.load_delta(again, folder)
    assert kind in str(report)
    np.testing.assert_array_equal(kit.array(again(kit.tensor(x))), kit.array(net(kit.tensor(x))))
    kit.slim.remove_delta(again)
    plain = build(kit)
    assert all(np.array_equal(kit.values(again)[n], v) for n, v in kit.values(plain).items())


@pytest.mark.parametrize("support", ["nonzero", "magnitude"])
def test_merging_keeps_every_zero_of_a_sparse_base(kit, net, tmp_path, support):
    weight = kit.params(net)["down.weight"]
    thin = kit.array(weight) * (np.arange(32).reshape(4, 8) % 4 == 0)
    kit.assign(weight, thin)
    report = kit.slim.apply_delta(net, "shira", ["down"], rank=2, support=support)
    assert report.layers["down"]["count"] == 8  # all that are not zero
    stir(kit, net)
    with pytest.raises(UnsupportedError, match="this one has 8"):
        kit.slim.save_delta(net, tmp_path, format="peft")
    kit.slim.save_delta(net, tmp_path / "own")
    kit.slim.merge_delta(net, unload=True)
    merged = kit.values(net)["down.weight"]
    assert np.array_equal(merged == 0, thin == 0)
    assert (merged != thin).any()


def test_the_activation_of_a_dense_layer_comes_after_them():
    ms = pytest.importorskip("mindspore")
    import slimkit_ms

    for kind in ("miss", "shira"):
        net = ms.nn.SequentialCell(ms.nn.Dense(8, 8, activation="relu"))
        slimkit_ms.apply_delta(net, kind, ["0"], rank=2)
        for parameter in net.trainable_params():
            parameter.set_data(ms.ops.ones_like(parameter))
        x = ms.ops.ones((2, 8))
        before = net(x).asnumpy()
        assert before.min() >= 0
        slimkit_ms.merge_delta(net, unload=True)
        np.testing.assert_allclose(net(x).asnumpy(), before, atol=1e-5)


def test_shapes_that_do_not_fit_are_named(kit, net):
    with pytest.raises(ArgumentError, match="rank of down must be at most 2"):
        kit.slim.apply_delta(net, "shira", ["down"], rank=3)
    with pytest.raises(ArgumentError, match="at most 6, its inputs"):
        kit.slim.apply_delta(net, "miss", ["up"], rank=7)
    with pytest.raises(ArgumentError, match="repeat must divide the 8 outputs"):
        kit.slim.apply_delta(net, "miss", ["up"], rank=2, repeat=3)
    with pytest.raises(UnsupportedError, match="cannot take miss"):
        kit.slim.apply_delta(kit.sequential(kit.embedding(5, 4)), "miss", ["0"])
    kit.assign(kit.params(net)["down.weight"], np.zeros((4, 8), np.float32))
    with pytest.raises(UnsupportedError, match="support='random' trains zeros"):
        kit.slim.apply_delta(net, "shira", rank=1)
    assert not trained(kit, net)
    assert type(net.up) is type(build(kit).up)


@pytest.mark.parametrize("kind", ["miss", "shira"])
def test_a_damaged_peft_file_changes_nothing(kit, net, tmp_path, kind):
    kit.slim.apply_delta(net, kind, rank=1)
    kit.slim.save_delta(net, tmp_path, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    tensors, _ = files.read_tensors(file, "x")
    config = files.read_json(tmp_path / "adapter_config.json", "x")
    key = {"miss": "base_model.model.down.miss_block", "shira": "base_model.model.down.shira_indices"}[kind]
    outside = tensors[key] + 100 if kind == "shira" else tensors[key].T
    twice = tensors[key][:, [0, *range(tensors[key].shape[1] - 1)]]
    spoiled = [
        ({k: v for k, v in tensors.items() if k != key}, "missing|no factors", {}),
        ({**tensors, key: outside}, "does not have|rows", {}),
        ({**tensors, key: tensors[key][:, :-1]}, "shape", {}),
        ({**tensors, "base_model.model.down.miss_bloc": tensors[key]}, "none that slimkit knows", {}),
        (tensors, "r=2", {"r": 2}),
    ]
    if kind == "shira":
        spoiled.append(({**tensors, key: twice}, "each once", {}))
    for changed, message, other in spoiled:
        files.write_tensors(file, changed)
        files.write_json(tmp_path / "adapter_config.json", {**config, **other})
        again = build(kit)
        with pytest.raises(FileFormatError, match=message):
            kit.slim.load_delta(again, tmp_path)
        assert not trained(kit, again)
    if kind == "miss":
        files.write_tensors(file, tensors)
        files.write_json(tmp_path / "adapter_config.json", {**config, "init_weights": "bat"})
        with pytest.raises(UnsupportedError, match="bat"):
            kit.slim.load_delta(build(kit), tmp_path)


def test_a_bundle_of_entries_is_checked(kit, net, tmp_path):
    kit.slim.apply_delta(net, "shira", ["down"], rank=1)
    kit.slim.save_delta(net, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    tensors, _ = files.read_tensors(tmp_path / "delta.safetensors", "x")
    name = f"down.{shira.INDEX}"
    tensors[name] = tensors[name][::-1].copy()
    manifest["tensors"][name]["sha256"] = files.digest_array(tensors[name])
    files.write_tensors(tmp_path / "delta.safetensors", tensors)
    files.write_json(tmp_path / "manifest.json", manifest)
    again = build(kit)
    with pytest.raises(FileFormatError, match="rising"):
        kit.slim.load_delta(again, tmp_path)
    assert not trained(kit, again)


@pytest.mark.parametrize(
    "index",
    [
        np.array([0, 2**31 - 1, -(2**31)], np.int32),  # the last difference wraps around to 1
        np.array([0.5, 1.5], np.float32),
        np.array([1, 1], np.int32),
        np.array([-1, 2], np.int32),
        np.array([2, 32], np.int32),
    ],
)
def test_indices_that_are_no_places_are_refused(index):
    with pytest.raises(FileFormatError, match="among 32 entries, each once, rising"):
        refuse_index(index, 32, "index", "the file")
    refuse_index(np.array([0, 31], np.int32), 32, "index", "the file")
    refuse_index(np.zeros(0, np.int32), 32, "index", "the file")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.data()
)  # fmt: skip
def test_shards_share_their_matrix(rank, outputs, inputs, data):
    repeat = data.draw(st.sampled_from([0, *(d for d in range(1, outputs + 1) if outputs % d == 0)]))
    block = np.arange(1.0, 1 + np.prod(MissSpec(rank, repeat).shape(outputs))).reshape(rank, -1)
    added = miss.weight_change(block, outputs, inputs)
    x = np.random.default_rng(0).standard_normal((3, inputs))
    padded = np.pad(x, ((0, 0), (0, -inputs % rank))).reshape(3, -1, rank).sum(1)
    np.testing.assert_allclose(x @ added.T, np.tile(padded @ block, (1, outputs // block.shape[1])), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(*[st.integers(3, 9)] * 2), elements=st.sampled_from([0, 0, 1, -3, 2])),
    st.sampled_from(shira.SUPPORTS),
    st.integers(0, 5),
)  # fmt: skip
def test_entries_are_chosen_once_and_keep_away_from_zeros(weight, support, seed):
    spec = ShiraSpec(1, support, seed)
    if support != "random" and not weight.any():
        with pytest.raises(UnsupportedError):
            chosen(weight, spec)
        return
    index = chosen(weight, spec)
    wanted = sum(weight.shape) if support == "random" else min(sum(weight.shape), np.count_nonzero(weight))
    assert len(index) == len(set(index.tolist())) == wanted
    assert (np.diff(index) > 0).all()
    assert np.array_equal(index, chosen(weight, spec))
    flat = np.abs(weight.reshape(-1))
    if support != "random":
        assert flat[index].all()
    if support == "magnitude":
        assert flat[index].min() >= np.delete(flat, index).max(initial=0)


def test_inspect_tells_the_options_and_counts_no_places(kit, net, tmp_path):
    kit.slim.apply_delta(net, "shira", rank=1, support="magnitude", seed=2)
    found = look(kit.slim.save_delta(net, tmp_path / "own"), lambda: None)
    assert found.columns[3:5] == ("rank", "options")
    assert found.rows[1][3:] == (1, "support=magnitude, seed=3, count=12", [4, 8], 12)
    assert found.facts["parameters"] == 26
    peft = look(kit.slim.save_delta(net, tmp_path / "peft", format="peft"), lambda: None)
    assert (peft.facts["peft_type"], peft.facts["rank"], peft.facts["parameters"]) == ("SHIRA", 1, 26)


def test_each_layer_draws_for_itself():
    sites = {p: Site("linear", (20, 20)) for p in "ab"}
    assert [s.seed for s in shira.by_layer(sites, ["a", "b"], 1, "random", 5).values()] == [5, 6]
