"""Checkpoints written by version 1 stay readable, and are written the same today."""

from pathlib import Path

import numpy as np
import pytest

from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.ckpt import Ckpt
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.weightfile import Arrays, Entry, decode, encode
from slimkit.core.errors import FileFormatError

GOLDEN = Path(__file__).parents[1] / "golden"


def items():
    held = Items()
    held.add("conv.weight", Entry("F32", (2, 3)), lambda: np.arange(6, dtype=np.float32).reshape(2, 3))
    held.add("half", Entry("BF16", (2,)), lambda: encode(np.array([1.5, -2], np.float32), "BF16"))
    held.add("step", Entry("I64", ()), lambda: np.array(7, np.int64))
    for name, value in {"epoch": 3, "lr": 0.5, "done": True, "note": "hé"}.items():
        held.add_value(name, value)
    return held


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_golden_checkpoints_load_verified_and_are_written_the_same(tmp_path, ending):
    golden = GOLDEN / f"checkpoint_v1.{ending}"
    with open_weights(golden, None) as source:
        assert loading.check_manifest(source)
        assert loading.values_of(source) == {"epoch": 3, "lr": 0.5, "done": True, "note": "hé"}
        assert np.array_equal(source.read("conv.weight"), np.arange(6).reshape(2, 3))
        assert source.read("half").tolist() == [1.5, -2.0]
        assert source.read("step").shape == ()
    saving.write_items(tmp_path / golden.name, items())
    for name in (golden.name, golden.name + ".manifest.json"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_a_tensor_longer_than_a_record_is_split_and_joined(tmp_path, monkeypatch):
    from slimkit.core.checkpoint import ckpt

    monkeypatch.setattr(ckpt, "_SLICE_BYTES", 16)
    array = np.arange(25, dtype=np.float32).reshape(5, 5)
    ckpt.stream_ckpt(tmp_path / "w.ckpt", {"w": Entry("F32", (5, 5))}, [("w", array)], crc=True)
    with Ckpt(tmp_path / "w.ckpt") as found:
        assert len(found._parts["w"]) == 7
        assert np.array_equal(found.read("w"), array)
    content = bytearray((tmp_path / "w.ckpt").read_bytes())
    content[40] ^= 1
    (tmp_path / "w.ckpt").write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match="checksum"):
        Ckpt(tmp_path / "w.ckpt")


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_no_number():
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-40], np.float32)
    back = decode(encode(values, "BF16"), "BF16")
    # 1.00390625 and 1.01171875 lie halfway between two bfloat16 numbers: the even one is taken.
    assert back[:6].tolist() == [1.0, 1.0, 1.015625, -0.0, np.inf, -np.inf]
    assert np.isnan(back[6])
    assert np.signbit(back[3])
    assert encode(np.array(2.0, np.float32), "BF16").shape == ()


def test_what_cannot_be_computed_with_can_still_be_passed_on():
    held = Arrays({"w": (np.zeros(2, np.uint8), "F8_E4M3")})
    assert held.raw("w").tolist() == [0, 0]
    with pytest.raises(ValueError, match="copied as they are"):
        held.read("w")
