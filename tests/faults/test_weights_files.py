"""Weight files and checkpoints under damage: cut, flipped, lying, hostile, killed while written, disk full."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core import files
from slimkit.core.checkpoint import loading, manifest, saving
from slimkit.core.checkpoint.background import BackgroundThread
from slimkit.core.checkpoint.ckpt import Ckpt, stream_ckpt
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.weightfile import Entry, Safetensors, stream_safetensors, tag_of
from slimkit.core.errors import FileFormatError, LinkPathError, SlimkitError

# More files: SLIMKIT_FUZZ=10000 python -m pytest tests/faults/test_weights_files.py -k fuzz
FUZZED = int(os.environ.get("SLIMKIT_FUZZ", "1200"))

TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "bn.running_mean": np.linspace(0, 1, 5, dtype=np.float16),
    "step": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def items():
    held = Items()
    for name, array in TENSORS.items():
        held.add(name, Entry(tag_of(array), array.shape), lambda a=array: a)
    held.add_value("epoch", 3)
    held.add_value("note", "hé")
    return held


def load(path, verify=True):
    with open_weights(path, refuse) as source:
        return loading.read_all(source, lambda _name, array, _dtype: array, None, None, verify=verify)


def refuse(path):
    raise FileFormatError(f"{path}: no torch here")


def unchanged(found):
    return set(found) == {*TENSORS, "epoch", "note"} and all(
        np.array_equal(found[n], a) and found[n].dtype == a.dtype and found[n].shape == a.shape
        for n, a in TENSORS.items()
    )


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_fuzzed_files_end_in_an_error_or_in_the_very_values(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    saving.write_items(path, items())
    assert unchanged(load(path))
    good, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(FUZZED):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(bad))
            action = chance.randrange(5)
            if action == 0:
                bad[at] ^= 1 << chance.randrange(8)
            elif action == 1:
                bad[at] = chance.choice((0, 127, 128, 255))
            elif action == 2:
                del bad[at : at + chance.randrange(1, 16)]
            elif action == 3:
                bad[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 12)))
            else:
                del bad[at:]
            bad = bad or bytearray(b"x")
        path.write_bytes(bytes(bad))
        try:
            found = load(path)
        except SlimkitError:
            refused += 1
        else:
            # What passes may only differ in what no tensor depends on (a space in the header, the numbers).
            assert all(np.array_equal(found[n], a) for n, a in TENSORS.items())
        try:
            load(path, verify=False)  # without the manifest it may be wrong, and must not crash
        except SlimkitError:
            pass
    assert refused > 0.8 * FUZZED


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_both_formats(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for kind, ending in ((Safetensors, ".safetensors"), (Ckpt, ".ckpt")):
        path = folder / f"any{ending}"
        path.write_bytes(content)
        try:
            with kind(path) as found:
                for name in found.entries:
                    found.raw(name)
        except SlimkitError:
            pass


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL"]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=5,
    ),
    st.dictionaries(
        st.from_regex(r"v[0-9]{1,3}", fullmatch=True), st.integers(-9, 9) | st.booleans() | st.text(max_size=9)
    ),
)
def test_what_is_written_is_read_in_both_formats(tmp_path_factory, shapes, values):
    folder = tmp_path_factory.getbasetemp()
    rng = np.random.default_rng(0)
    held = Items(values={k: v for k, v in values.items() if k not in shapes and "\0" not in str(v)})
    arrays = {}
    for name, (dtype, shape) in shapes.items():
        if "\0" in name or any(0xD800 <= ord(c) <= 0xDFFF for c in name):
            continue
        from slimkit.core.checkpoint.weightfile import STORED

        arrays[name] = (rng.random(shape) * 200).astype(STORED[dtype])
        held.add(name, Entry(dtype, shape), lambda a=arrays[name]: a)
    for ending in (".safetensors", ".ckpt"):
        path = folder / f"round{ending}"
        if not arrays and not held.values and ending == ".ckpt":
            continue  # a .ckpt without any record is an empty file
        saving.write_items(path, held)
        found = load(path)
        assert {n: v for n, v in found.items() if not isinstance(v, np.ndarray)} == held.values
        assert all(np.array_equal(found[n], a) and found[n].shape == a.shape for n, a in arrays.items())


def safetensors_with(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{}",
        safetensors_with(b"[" * 5000),
        safetensors_with(b'{"a":1' + b"0" * 5000 + b"}"),
        safetensors_with([]),
        safetensors_with({"w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_with({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_with({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        safetensors_with({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        safetensors_with({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_with({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_with({"w": 3}),
        safetensors_with({"__metadata__": {"a": 1}}),
        safetensors_with(TWICE, b"1"),
    ],
)  # fmt: skip
def test_lying_safetensors_headers_end_in_an_error_in_bounded_memory(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=r"w\.safetensors"):
            Safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\xff" * 30,
        b"\x0a\x02\x0a\x00",
        b"\x0a\x17\x0a\x01w\x12\x12\x08\x02\x08\x03\x12\x04Int8\x1a\x06\0\1\2\3\4",
        b"\x0a\x1b\x0a\x01w\x12\x16\x08\xff\xff\xff\xff\xff\xff\x7f\x08\x03\x12\x04Int8\x1a\x03abc",
        b"\x12\x00",
        b"crc_num" + b"\0" * 10,
        b"\xd8\x5e\x3a\x7f" + b"secret" * 9,
    ],
)
def test_damaged_ckpt_records_end_in_an_error_in_bounded_memory(tmp_path, content):
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=r"w\.ckpt"):
            Ckpt(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "x\0y"])
def test_an_index_must_not_lead_outside_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(SlimkitError):
        open_weights(index, refuse)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"w": 3}}', '{"weight_map": [1]}']
)
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FileFormatError):
        open_weights(tmp_path, refuse)


def test_an_index_that_names_what_its_shard_lacks_is_refused(tmp_path):
    stream_safetensors(tmp_path / "a.safetensors", {"w": Entry("F32", (1,))}, [("w", np.zeros(1, np.float32))])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    with pytest.raises(FileFormatError, match="'v'"):
        open_weights(tmp_path, refuse)


def test_links_of_a_hugging_face_cache_are_followed_and_no_others(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    stream_safetensors(blobs / "digest", {"w": Entry("F32", (1,))}, [("w", np.ones(1, np.float32))])
    (snapshot / "model.safetensors").symlink_to("../../blobs/digest")
    with open_weights(snapshot, refuse) as found:
        assert found.read("w").tolist() == [1.0]
    (tmp_path / "outside").write_bytes((blobs / "digest").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(LinkPathError):
        open_weights(snapshot, refuse)


def test_a_manifest_that_is_a_link_or_damaged_is_refused(tmp_path):
    path = tmp_path / "w.ckpt"
    saving.write_items(path, items())
    side = manifest.sidecar(path)
    content = side.read_text()
    side.write_text(content[:50])
    with pytest.raises(FileFormatError):
        load(path)
    side.unlink()
    (tmp_path / "other").write_text(content)
    side.symlink_to(tmp_path / "other")
    with pytest.raises(LinkPathError):
        load(path)


CHILD = """
import sys, numpy as np
from slimkit.core.checkpoint import saving
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.weightfile import Entry
print("ready", flush=True)
number = 0
while True:
    number += 1
    held = Items()
    for name in "abc":
        array = np.full(200_000, number, np.float32)
        held.add(name, Entry("F32", array.shape), lambda a=array: a)
    saving.write_items(sys.argv[1], held)
"""


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    chance = random.Random(1)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + chance.random() * 0.15)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if path.exists():
            found = load(path)
            numbers = {float(v) for n in "abc" for v in np.unique(found[n])}
            assert len(numbers) == 1, "a mixture of two saves"


def test_a_full_disk_leaves_the_old_file_and_no_leftovers(tmp_path):
    path = tmp_path / "w.safetensors"
    saving.write_items(path, items())
    before = path.read_bytes()
    code = """
        import resource, signal, sys, numpy as np
        from slimkit.core.checkpoint import saving
        from slimkit.core.checkpoint.saving import Items
        from slimkit.core.checkpoint.weightfile import Entry
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        held = Items()
        held.add("w", Entry("F32", (1 << 20,)), lambda: np.zeros(1 << 20, np.float32))
        try:
            saving.write_items(sys.argv[1], held)
        except OSError as error:
            print("OSError", error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True)
    assert done.stdout.startswith("OSError"), done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    assert unchanged(load(path))
    with open_weights(path, refuse) as source:
        assert loading.check_manifest(source), "the older file lost its manifest"


def test_a_save_in_the_background_is_finished_when_the_program_ends(tmp_path):
    code = """
        import sys, numpy as np
        from pathlib import Path
        from slimkit.core.checkpoint import saving
        from slimkit.core.checkpoint.weightfile import Entry
        held = saving.Items()
        for name in "abc":
            held.add(name, Entry("F32", (1 << 20,)), lambda: np.full(1 << 20, 7, np.float32))
        saving.save(Path(sys.argv[1]), held, async_save=True, with_manifest=True)
    """
    path = tmp_path / "w.safetensors"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True)
    found = load(path)
    assert sorted(found) == ["a", "b", "c"]
    assert all((v == 7).all() for v in found.values())


@pytest.mark.parametrize("length", [0, 100, 300_000, 1_200_000, 2_500_000])
def test_digests_taken_beside_the_writing_are_those_of_the_file(tmp_path, length):
    # Below and above what is digested in a thread, and more chunks than there are buffers.
    array = np.arange(length, dtype=np.float64)
    held = Items()
    for name in "ab":
        held.add(name, Entry("F64", array.shape), lambda: array)
    saving.write_items(tmp_path / "a.safetensors", held)
    assert np.array_equal(load(tmp_path / "a.safetensors")["b"], array)
    with open_weights(tmp_path / "a.safetensors", refuse) as source:
        passed = Items(dict(source.entries), {n: lambda n=n: source.piece(n) for n in "ab"})
        saving.write_items(tmp_path / "b.ckpt", passed)
    assert np.array_equal(load(tmp_path / "b.ckpt")["a"], array)
    digests = []
    for name in ("a.safetensors", "b.ckpt"):
        with open_weights(tmp_path / name, refuse) as source:
            digests.append(manifest.Manifest(source).tensors)
    assert digests[0]
    assert digests[0] == digests[1]


def test_what_goes_wrong_beside_the_writing_is_raised(tmp_path):
    with BackgroundThread() as beside:
        beside.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            beside.settle()
        done = []
        beside.submit(lambda: done.append(1))
        beside.settle()
        assert done == [1]


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="proc"):
        saving.write_items("/proc/slimkit/w.ckpt", items())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        files.write_json(tmp_path / "file" / "w.json", {})


def test_tensors_that_were_not_announced_are_never_written(tmp_path):
    entries = {"a": Entry("F32", (1,)), "b": Entry("F32", (1,))}
    one = np.zeros(1, np.float32)
    for stream in ([("b", one)], [("a", one)], [("a", np.zeros(2, np.float32)), ("b", one)]):
        for writer, name in ((stream_safetensors, "w.safetensors"), (stream_ckpt, "w.ckpt")):
            with pytest.raises(ValueError, match="announced"):
                writer(tmp_path / name, entries, iter(stream))
    assert list(tmp_path.iterdir()) == []
