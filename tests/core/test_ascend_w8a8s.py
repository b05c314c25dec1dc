"""W8A8S folders: the tensors that the 310P's readers ask for, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core import files
from slimkit.core.ascend import inputs, load_w8a8s
from slimkit.core.ascend.folder import DESCRIPTION, write
from slimkit.core.ascend.int8 import PARTS, int8_layer, on_grid
from slimkit.core.ascend.w8a8s import KIND, WEIGHTS
from slimkit.core.errors import ArgumentError, FileFormatError


def weights(seed, out=6, n=20, scale=1.0):
    rng = np.random.default_rng(seed)
    whole = rng.integers(-126, 127, (out, n))
    whole[np.arange(out), rng.integers(0, n, out)] = 127
    whole[rng.random((out, n)) < 0.3] = 0
    whole[:, 0] = 127
    return whole, whole * (scale * rng.uniform(0.5, 2, (out, 1)) / 127)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10**6), st.floats(-50, 50), st.floats(0.01, 100), st.booleans())
def test_a_layer_computes_what_floats_do_within_the_rounding_of_its_inputs(seed, low, width, biased):
    whole, weight = weights(seed)
    rng = np.random.default_rng(seed + 1)
    bias = rng.standard_normal(len(weight)) if biased else None
    layer = int8_layer("layer", weight, bias, low, low + width)
    assert np.array_equal(layer.weight, whole)
    x = rng.uniform(min(low, 0), max(low + width, 0), (5, weight.shape[1]))
    exact = x @ weight.T + (0 if bias is None else bias)
    # Each input is off by half a step at most, the bias by half a unit of the product.
    step = float(layer.input_scale[0])
    bound = (0.5 * step + 1e-6 * (abs(low) + width)) * np.abs(weight).sum(axis=1) + layer.scale
    # A range whose ends are no multiples of the step is cut by less than a step.
    bound += step * np.abs(weight).sum(axis=1)
    assert np.all(np.abs(layer(x.astype(np.float32)) - exact) <= bound)
    assert np.array_equal(layer.inputs(np.zeros((1, 20), np.float32)), np.full((1, 20), layer.input_offset[0]))


def test_the_five_tensors_have_the_types_and_shapes_that_are_read():
    _, weight = weights(0)
    layer = int8_layer("layer", weight.astype(np.float16), np.ones(6), -1.0, 3.0)
    shapes = {"weight": (6, 20), "input_scale": (1,), "input_offset": (1,), "quant_bias": (6,), "deq_scale": (6,)}
    for part, dtype in PARTS.items():
        assert (getattr(layer, part).dtype, getattr(layer, part).shape) == (dtype, shapes[part])
    # int64 that holds the bits of a float32, the upper half zero.
    assert np.all((layer.deq_scale >> 32) == 0)
    np.testing.assert_allclose(layer.scale, np.abs(weight).max(1) / 127 * float(layer.input_scale[0]), rtol=1e-3)


def test_which_weights_are_on_the_grid():
    _, weight = weights(3)
    assert all(on_grid(weight.astype(dtype)) for dtype in (np.float64, np.float32, np.float16))
    assert not on_grid(weight * (1 + 0.002 * np.random.default_rng(0).standard_normal(weight.shape)))
    assert not on_grid(np.random.default_rng(0).standard_normal((4, 30)).astype(np.float16))
    assert not on_grid(weight[0])


def test_what_no_device_can_hold():
    _, weight = weights(0)
    with pytest.raises(ArgumentError, match="float16"):
        int8_layer("layer", weight, None, -1e8, 1e8)
    with pytest.raises(ArgumentError, match="int32"):
        int8_layer("layer", weight, np.full(6, 1e9), 0.0, 1e-3)
    with pytest.raises(ArgumentError, match="weight_bits=8"):
        int8_layer("layer", weight + 0.003, None, 0.0, 1.0)


def folder(path, change=None):
    """A folder of one int8 layer and a table, with one thing changed."""
    _, weight = weights(0)
    layer = int8_layer("fc", weight, None, -1.0, 1.0)
    tensors = {f"fc.{part}": getattr(layer, part) for part in PARTS} | {"table.weight": np.ones((3, 4), np.float16)}
    kinds = {name: "FLOAT" if name.startswith("table") else KIND for name in tensors}
    if change is not None:
        change(tensors, kinds)
    write(path, WEIGHTS, tensors, {"torch_dtype": "float16"}, [], KIND, kinds)
    return path


def test_a_folder_reads_back_and_names_every_tensor(tmp_path):
    read = load_w8a8s(folder(tmp_path / "m"))
    assert (list(read.layers), read.kinds["table.weight"], read.config) == (["fc"], "FLOAT", {"torch_dtype": "float16"})
    description = json.loads((tmp_path / "m" / DESCRIPTION).read_text())
    assert description["model_quant_type"] == "W8A8S"
    stored, _ = files.read_tensors(tmp_path / "m" / WEIGHTS, WEIGHTS)
    # A tensor without a word in the description is a KeyError where it is served.
    assert set(stored) == set(description) - {"model_quant_type", "version"}


def test_inspect_and_load_tell_what_it_is(tmp_path):
    from slimkit.core.jobs.inspecting import kind_of, look

    place = folder(tmp_path / "m")
    assert kind_of(place) == "w8a8s"
    seen = look(place, lambda: None)
    assert (seen.facts["sparse_tensors"], seen.facts["tensors"]) == (1, 6)
    (place / DESCRIPTION).write_text(json.dumps({"model_quant_type": "W4A4"}))
    with pytest.raises(FileFormatError, match="W16A16S or W8A8S"):
        kind_of(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, k: (t.pop("fc.deq_scale"), k.pop("fc.deq_scale")), "has no deq_scale"),
        (lambda t, k: t.update({"fc.weight": t["fc.weight"].astype(np.int32)}), "must be int8"),
        (lambda t, k: t.update({"fc.quant_bias": t["fc.quant_bias"][:-1]}), r"of shape \(6,\)"),
        (lambda t, k: t.update({"fc.input_scale": np.zeros(1, np.float16)}), "positive"),
        (lambda t, k: t.update({"fc.deq_scale": t["fc.deq_scale"] + 2**32}), "positive float32 bits"),
        (lambda t, k: t.update({"fc.deq_scale": np.full(6, 0x7FC00000)}), "positive float32 bits"),
        (lambda t, k: t.update({"table.weight": np.ones((3, 4), np.float32)}), "must be float16"),
        (lambda t, k: (t.update({"fc.other": t["fc.weight"]}), k.update({"fc.other": KIND})), "no tensor of a W8A8S"),
        (lambda t, k: t.pop("table.weight"), "described but not there"),
        (lambda t, k: k.update({"fc.weight": "W8A8"}), "must be W8A8S or FLOAT"),
    ],
)
def test_a_folder_that_no_reader_could_use_is_refused(tmp_path, change, said):
    with pytest.raises(FileFormatError, match=said):
        load_w8a8s(folder(tmp_path / "m", change))


def test_rows_of_many_batches_are_few_and_from_every_place():
    rows = np.arange(1_000, dtype=np.float32)[:, None]
    few = inputs._few(rows)
    assert len(few) == inputs.MOST_ROWS
    assert np.all(np.diff(few[:, 0]) > 0)
    assert len(set(few[:, 0] % 16)) == 16
    assert np.array_equal(inputs._few(rows[:256]), rows[:256])
