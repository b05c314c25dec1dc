"""The folders of both Ascend formats are written today as version 1 wrote them, and read."""

from pathlib import Path

import numpy as np
import pytest

from slimkit.core.ascend import load_w8a8s, load_w16a16s
from slimkit.core.ascend import w8a8s as int8s
from slimkit.core.ascend.entropy import SAMPLE_BYTES, byte_entropy, lzma_bits
from slimkit.core.ascend.folder import write
from slimkit.core.ascend.int8 import PARTS, int8_layer
from slimkit.core.ascend.w16a16s import save_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
# (4, 6) whole numbers, the largest of each row 127, and steps that floats hold exactly.
WHOLE = np.array([[127, 0, -3, 0, 40, -64], [0, 127, 0, 9, -8, 0], [1, 0, 0, -127, 0, 2], [0, 0, 127, 0, -1, 0]])
STEPS = np.array([[0.5], [0.25], [2.0], [1.0]], np.float32)


def w8a8s(folder):
    layer = int8_layer("model.fc", WHOLE * STEPS, np.array([1.0, -2.0, 0.5, 0.0]), -1.0, 3.0)
    tensors = {f"model.fc.{part}": getattr(layer, part) for part in PARTS}
    tensors["model.norm.weight"] = np.ones(4, np.float16)
    kinds = {name: "FLOAT" if "norm" in name else int8s.KIND for name in tensors}
    write(folder, int8s.WEIGHTS, tensors, {"model_type": "demo", "torch_dtype": "float16"}, [], int8s.KIND, kinds)


def w16a16s(folder):
    tensors = {"model.fc.weight": (WHOLE / 64).astype(np.float32), "model.norm.weight": np.ones(4, np.float32)}
    save_arrays(folder, tensors, {"model_type": "demo"})


@pytest.mark.parametrize("made", [w8a8s, w16a16s])
def test_a_folder_is_written_as_version_1_wrote_it(made, tmp_path):
    made(tmp_path / "new")
    golden = GOLDEN / f"{made.__name__}_v1"
    names = sorted(path.name for path in golden.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [n for n in names if (golden / n).read_bytes() != (tmp_path / "new" / n).read_bytes()] == []


def test_the_golden_folders_say_what_they_hold():
    layer = load_w8a8s(GOLDEN / "w8a8s_v1").layers["model.fc"]
    x = np.linspace(-1, 3, 12, dtype=np.float32).reshape(2, 6)
    exact = x @ (WHOLE * STEPS).T + [1.0, -2.0, 0.5, 0.0]
    assert np.array_equal(layer.weight, WHOLE)
    # An input is off by half a step, here 4 / 255 / 2, and a bias by half a unit of the product.
    assert np.all(np.abs(layer(x) - exact) <= 4 / 255 * np.abs(WHOLE * STEPS).sum(1) + layer.scale)
    assert np.array_equal(load_w16a16s(GOLDEN / "w16a16s_v1").tensors["model.fc.weight"], WHOLE / 64)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_a_packer_comes_near_the_bound_of_single_bytes_and_below_it_where_bytes_repeat(dtype):
    draw = np.random.default_rng(0)
    random = draw.integers(-127, 128, (SAMPLE_BYTES, 2)).astype(dtype)
    random[draw.random(random.shape) < 0.5] = 0
    bound = byte_entropy(random)
    assert lzma_bits([random]) == pytest.approx(bound, rel=0.12)
    again = np.tile(random[:100], (100, 1))
    assert lzma_bits([again]) < byte_entropy(again) / 10
    assert lzma_bits([]) == 0.0
