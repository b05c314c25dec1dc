"""What huggingface_hub downloads is links into blobs/: they are read everywhere, and no other link is."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.errors import ArgumentError, LinkPathError
from slimkit.core.jobs.inspecting import look
from tests.both.test_weights import INTRA, large, steps, transformer


def cached(source, root):
    """The folder as huggingface_hub lays it down: CACHE/models--me--it/snapshots/REVISION -> ../../blobs."""
    snapshot, blobs = root / "models--me--it" / "snapshots" / ("a" * 40), root / "models--me--it" / "blobs"
    blobs.mkdir(parents=True)
    for file in (f for f in sorted(source.rglob("*")) if f.is_file()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / digest, link.parent))
    return snapshot


def model_folder(folder, tensors, sharded):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    table = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00002.safetensors" if sharded else "model.safetensors"
        files.write_tensors(folder / name, {n: tensors[n] for n in part}, {"format": "pt"})
        table.update(dict.fromkeys(part, name))
    if sharded:
        files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("linked", [False, True])  # the snapshot itself, by a link of the user's
def test_a_model_in_the_cache_is_read_like_any_other(kit, rng, tmp_path, sharded, linked):
    tensors = large(kit, rng)
    snapshot = cached(model_folder(tmp_path / "plain", tensors, sharded), tmp_path / "hub")
    if linked:
        (tmp_path / "mine").symlink_to(snapshot, target_is_directory=True)
        snapshot = tmp_path / "mine"
    found = kit.slim.load_checkpoint(snapshot)
    assert {n: kit.array(t).tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}
    small = transformer(kit, heads=2, keys=2, ffn=3, width=4)
    kit.room("weights").prune_model_weight(small, steps(INTRA), snapshot)
    for name, value in kit.values(small).items():
        assert np.array_equal(value, tensors[name][tuple(slice(n) for n in value.shape)]), name
    ending = ".safetensors" if kit.name == "torch" else ".ckpt"
    report = kit.slim.convert_checkpoint(snapshot, tmp_path / f"out{ending}")
    assert len(report.written if hasattr(report, "written") else found) == len(tensors)
    assert look(snapshot, lambda: None).facts["tensors"] == len(tensors)


@pytest.mark.parametrize("format", ["slimkit", "peft"])
def test_a_delta_in_the_cache_is_read(kit, tmp_path, format):
    def net():
        return kit.fill(kit.named(fc=kit.linear(4, 4)))

    model = net()
    kit.slim.apply_delta(model, "lora", ["fc"], rank=2, alpha=3)
    kit.fill(model, seed=5)
    kit.slim.save_delta(model, tmp_path / "plain" / "adapter", format=format)
    snapshot = cached(tmp_path / "plain", tmp_path / "hub")  # the adapter lies in a folder of its repository
    fresh = net()
    report = kit.slim.load_delta(fresh, snapshot / "adapter")
    assert report.layers["fc"]["alpha"] == 3
    for name, value in kit.values(model).items():
        if "mindpet_delta" in name:
            np.testing.assert_array_equal(kit.values(fresh)[name], value)


def _elsewhere(tmp_path, file):
    """Links that leave the cache's own blobs: by themselves, by the blob, by another cache, by a blobs folder."""
    secret = tmp_path / "secret" / "blobs" / "x"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(file.resolve().read_bytes())
    blob = file.resolve()

    def relinked(link, target):
        link.unlink()
        link.symlink_to(target)

    return {
        "the link leaves": lambda: relinked(file, secret),
        "the blob leads on": lambda: relinked(blob, secret),
        "a copy of the link": lambda: None,
        "blobs is a link": lambda: (blob.parent.rename(tmp_path / "moved"), blob.parent.symlink_to(tmp_path / "moved")),
    }


@pytest.mark.parametrize("way", ["the link leaves", "the blob leads on", "a copy of the link", "blobs is a link"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_that_leaves_the_caches_own_blobs_is_refused(kit, rng, tmp_path, way, sharded):
    plain = model_folder(tmp_path / "plain", large(kit, rng), sharded)
    snapshot = cached(plain, tmp_path / "hub")
    file = next(snapshot.glob("*.safetensors"))
    if way == "a copy of the link":
        copy = tmp_path / "copy"
        copy.mkdir()
        for link in snapshot.iterdir():
            (copy / link.name).symlink_to(link.resolve())
        snapshot = copy
    else:
        _elsewhere(tmp_path, file)[way]()
    with pytest.raises((LinkPathError, ArgumentError), match=r"link|inside"):
        kit.slim.load_checkpoint(snapshot)


def test_a_shards_name_may_not_leave_by_a_cache(tmp_path):
    from slimkit.core.files import inside, is_hub_link

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "x").write_bytes(b"x")
    snapshot = cached(plain, tmp_path / "hub")
    assert is_hub_link(snapshot / "x")
    assert inside(snapshot, "x", "name").read_bytes() == b"x"
    with pytest.raises(ArgumentError, match="inside"):  # another folder's link is not this folder's
        inside(plain, os.path.relpath(snapshot / "x", plain), "name")
