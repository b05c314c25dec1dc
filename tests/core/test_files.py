"""Files that are whole or absent: atomic writes under faults, refused paths, damaged content."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core import files
from slimkit.core.errors import AbsolutePathError, FileFormatError, LinkPathError


def leftovers(folder):
    return sorted(p.name for p in folder.rglob(".*"))


def test_text_is_written_with_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    """Windows would make "\\r\\n" of it, and opens no folder to sync it."""
    real, told = os.open, []

    def opened(path, flags, *more, **how):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **how)

    def handle(descriptor, mode, **how):
        told.append(how)
        return fdopen(descriptor, mode, **how)

    fdopen = os.fdopen
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fdopen", handle)
    files.write_json(tmp_path / "a.json", {"a": 1})
    with files.atomic_file(tmp_path / "b.csv", "w") as out:
        out.write("a\n")
    assert [how.get("newline", "bytes") for how in told][-1] == "\n"
    assert (tmp_path / "b.csv").read_bytes() == b"a\n"


def test_a_file_appears_whole_and_keeps_ordinary_rights(tmp_path):
    target = tmp_path / "deep" / "a.json"
    files.write_json(target, {"b": 1, "ä": [1.5, None]})
    assert files.read_json(target) == {"b": 1, "ä": [1.5, None]}
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask
    assert leftovers(tmp_path) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(target, "w") as handle:
        handle.write("new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), files.atomic_file(target, "w") as handle:
        handle.write("new")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with files.atomic_directory(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.atomic_directory(target) as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["one"]
    with files.atomic_directory(target) as folder:
        (folder / "three").write_text("3")
    assert [p.name for p in target.iterdir()] == ["three"]
    assert leftovers(tmp_path) == []


def test_kill_at_any_moment_leaves_old_or_new_never_a_mixture(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, {"round": -1, "fill": [0] * 20_000})
    code = f"""
        from slimkit.core import files
        print("ready", flush=True)
        for n in range(10**6):
            files.write_json({str(target)!r}, {{"round": n, "fill": [n] * 20_000}})
    """
    for wait in (0.01, 0.05, 0.11, 0.2):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = json.loads(target.read_text())
        assert set(found["fill"]) == {max(found["round"], 0)}


def test_links_are_refused_for_writing_and_reading(tmp_path):
    real = tmp_path / "real"
    real.write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(real)
    with pytest.raises(LinkPathError), files.atomic_file(link):
        pass
    with pytest.raises(LinkPathError), files.atomic_directory(link):
        pass
    with pytest.raises(LinkPathError):
        files.read_json(link)
    assert real.read_text() == "{}"


def test_save_directory_says_what_is_wrong(tmp_path):
    assert files.save_directory(str(tmp_path / "new")) == tmp_path / "new"
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LinkPathError):
        files.save_directory(tmp_path / "link")
    with pytest.raises(AbsolutePathError):
        files.save_directory("relative/folder")
    for empty in (None, ""):
        with pytest.raises(ValueError):
            files.save_directory(empty)
    with pytest.raises(TypeError):
        files.save_directory(3)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ""])
def test_names_from_data_cannot_leave_their_folder(tmp_path, name):
    with pytest.raises(ValueError):
        files.inside(tmp_path, name, "shard")
    assert files.inside(tmp_path, "a/b", "shard") == (tmp_path / "a" / "b").resolve()


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, "{'a': 1}"])
def test_damaged_json_is_a_format_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError):
        files.read_json(tmp_path / "a.json")


def test_json_refuses_nan_and_missing_and_huge_files(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(FileFormatError):
        files.read_json(tmp_path / "missing.json")
    files.write_json(tmp_path / "b.json", list(range(100)))
    with pytest.raises(FileFormatError):
        files.read_json(tmp_path / "b.json", limit_bytes=10)


def test_tensors_survive_with_metadata_in_any_memory_order(tmp_path, rng):
    arrays = {"a": rng.standard_normal((3, 4)).T, "b": np.arange(5, dtype=np.int8), "c": np.float16([[1.5]])}
    arrays["scalar"] = np.asarray(2.5)
    files.write_tensors(tmp_path / "t.safetensors", arrays, {"note": "x"})
    found, metadata = files.read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"note": "x"}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_never_read_as_tensors(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "t.safetensors"
    file.write_bytes(data)
    with pytest.raises(FileFormatError):
        files.read_tensors(file)


@given(st.integers(0, 250), st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_one_changed_byte_is_an_error_or_still_well_formed(tmp_path_factory, at, value):
    file = tmp_path_factory.mktemp("flip") / "t.safetensors"
    files.write_tensors(file, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)})
    data = bytearray(file.read_bytes())
    data[at % len(data)] = value
    file.write_bytes(data)
    try:
        found, _ = files.read_tensors(file)
    except FileFormatError:
        return
    assert sum(a.nbytes for a in found.values()) <= len(data)


def test_digests_tell_dtype_shape_and_value_apart():
    base = np.arange(6, dtype=np.float32)
    others = [base.reshape(2, 3), base.astype(np.float64), base + 1, base.view(np.int32), np.zeros(0)]
    digests = {files.digest_array(a) for a in [base, *others]}
    assert len(digests) == 1 + len(others)
    assert files.digest_array(base[::-1][::-1]) == files.digest_array(base.copy())


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.digest_file(tmp_path / "a") == expected
    with open(tmp_path / "a", "rb") as handle:
        assert files._stream(handle) == expected
