"""Bundles, manifests and shard indexes under damage: every file beside the tensors, fuzzed, linked and cut short."""

import json
import os
import random

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.openweights import open_weights, source_config
from slimkit.core.checkpoint.weightfile import Entry
from slimkit.core.delta import bundle
from slimkit.core.errors import FileFormatError, LinkPathError, SlimkitError

# More files: SLIMKIT_FUZZ=10000 python -m pytest tests/faults/test_readers_fuzzed.py -k fuzz
FUZZED = int(os.environ.get("SLIMKIT_FUZZ", "300"))

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.array([1, 2, 3])}
DELTA = {"name": "default", "kind": "lora", "layers": {"q": {"rank": 2}}}


def save_bundle(folder):
    bundle.write_bundle(folder, [DELTA], TENSORS, [], {"fingerprint": "00"})
    return folder, lambda: bundle.read_bundle(folder)[1], ["manifest.json", "delta.safetensors"]


def save_with_manifest(folder):
    held = saving.Items()
    for name, array in TENSORS.items():
        held.add(name, Entry("F32" if array.ndim > 1 else "I64", array.shape), lambda a=array: a)
    saving.write_items(folder / "w.ckpt", held)

    def load():
        with open_weights(folder / "w.ckpt", None) as source:
            return loading.read_all(source, lambda _name, array, _dtype: array, None, None, verify=True)

    return folder, load, ["w.ckpt.manifest.json"]


def save_sharded(folder):
    for name, array in TENSORS.items():
        files.write_tensors(folder / f"{name}.safetensors", {name: array})
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))

    def load():
        source_config(folder)
        with open_weights(folder, None) as source:
            return {name: source.read(name) for name in source.entries}

    return folder, load, ["model.safetensors.index.json", "config.json"]


KINDS = [save_bundle, save_with_manifest, save_sharded]


@pytest.mark.parametrize("kind", KINDS)
def test_fuzzed_files_end_in_an_error_or_in_the_very_values(tmp_path, kind):
    folder, load, names = kind(tmp_path)
    load()
    chance = random.Random(0)
    refused = 0
    for name in names:
        good = (folder / name).read_bytes()
        for _ in range(FUZZED):
            bad = bytearray(good)
            for _ in range(chance.choice((1, 2, 8))):
                at = chance.randrange(len(bad))
                action = chance.randrange(3)
                if action == 0:
                    bad[at] = chance.choice((0, 34, 44, 48, 57, 91, 93, 123, 125, 255, chance.randrange(256)))
                elif action == 1:
                    del bad[at : at + chance.randrange(1, 16)]
                else:
                    bad[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
                bad = bad or bytearray(b"x")
            (folder / name).write_bytes(bytes(bad))
            try:
                found = load()
            except SlimkitError:
                refused += 1
            else:
                # An index may lose an entry; what it still names must be right.
                assert all(np.array_equal(value, TENSORS[key]) for key, value in found.items() if key in TENSORS)
        (folder / name).write_bytes(good)
    assert refused > 0.2 * FUZZED * len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_in_place_of_a_file_is_refused(tmp_path, kind):
    (tmp_path / "in").mkdir()
    folder, load, names = kind(tmp_path / "in")
    for name in names:
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(LinkPathError):
            load()
        (folder / name).unlink()
        (tmp_path / "elsewhere").rename(folder / name)
    load()


def test_a_bundle_cannot_be_written_where_nothing_can_be(tmp_path):
    with pytest.raises(OSError, match="proc"):
        save_bundle("/proc/slimkit/bundle")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkPathError):
        save_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_json_nested_without_end_is_refused(tmp_path, kind, deep):
    folder, load, names = kind(tmp_path)
    (folder / names[0]).write_text(deep)
    with pytest.raises(FileFormatError):
        load()
