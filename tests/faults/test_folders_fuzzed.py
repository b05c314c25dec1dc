"""PEFT folders, teacher caches and YAML files under damage: fuzzed, cut short, linked, and made to grow."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.delta import peft
from slimkit.core.delta.peft_lora import read_lora
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.distill.teacher_cache import TeacherFiles
from slimkit.core.errors import FileFormatError, LinkPathError, SlimkitError
from slimkit.core.freeze import read_config
from slimkit.core.jobs.sources import read_arrays, settings
from slimkit.core.run.recipe import load_recipe

# More files: SLIMKIT_FUZZ=10000 python -m pytest tests/faults/test_folders_fuzzed.py
FUZZED = int(os.environ.get("SLIMKIT_FUZZ", "200"))

A = np.arange(8, dtype=np.float32).reshape(2, 4)
STEM = "base_model.model.q"


def peft_folder(folder):
    """A LoRA as PEFT saves it, and what reading it gives."""
    files.write_tensors(
        folder / peft.TENSORS, {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": A.T.copy()}
    )  # fmt: skip
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": ["q"], "init_lora_weights": True,
    }  # fmt: skip
    (folder / peft.CONFIG).write_text(json.dumps(config))

    def load():
        made = read_lora(*peft.read_files(folder))
        assert not made.base
        return {**made.parts["q"], "rank": made.layers["q"].rank}

    return load, (peft.CONFIG, peft.TENSORS)


class Cache(TeacherFiles):
    """A teacher cache of NumPy arrays, so that no framework is between the files and what reads them."""

    _numpy = staticmethod(lambda value: value if isinstance(value, np.ndarray) else None)
    _tensor = staticmethod(lambda array, like: array)
    _digest = staticmethod(lambda teacher: "teacher")

    @staticmethod
    @contextlib.contextmanager
    def _answering(teacher, labels):
        yield lambda calls: ([args[0] @ teacher for _ in labels] for args, _ in calls)


ROWS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
TEACHER = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)


def aims():
    term = {"func_name": "KDMse", "func_weight": 1}
    return KnowledgeDistillConfig().add_output_soft_label(
        {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]}
    )  # fmt: skip


def cache_folder(folder):
    """A teacher cache, and what looking its samples up gives."""
    Cache.build(TEACHER, [ROWS[:3], ROWS[3:]], aims(), folder)

    def load():
        cache = Cache(folder)
        cache.verify()
        return cache.lookup((ROWS,), {})[1]

    return load, ("cache.json", "shard-00000.safetensors")


KINDS = [peft_folder, cache_folder]


def same(found, wanted):
    return found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)


def damaged(good, chance):
    """A few bytes changed, taken away or put in."""
    bad = bytearray(good)
    for _ in range(chance.choice((1, 2, 8))):
        at = chance.randrange(len(bad) or 1)
        action = chance.randrange(3)
        if action == 0 and bad:
            bad[at] = chance.choice((0, 34, 44, 48, 57, 91, 93, 123, 125, 255, chance.randrange(256)))
        elif action == 1:
            del bad[at : at + chance.randrange(1, 16)]
        else:
            bad[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
    return bytes(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fuzzed_folder_is_refused_or_read_as_something_well_formed(tmp_path, kind):
    load, names = kind(tmp_path)
    wanted = load()
    chance = random.Random(0)
    refused = 0
    for name in names:
        good = (tmp_path / name).read_bytes()
        for _ in range(FUZZED):
            (tmp_path / name).write_bytes(damaged(good, chance))
            try:
                found = load()
            except SlimkitError:
                refused += 1
            else:
                # A PEFT folder has no digest: a changed number is another number. A cache has one.
                assert kind is peft_folder or same(found, wanted), name
        (tmp_path / name).write_bytes(good)
    assert refused > 0.3 * FUZZED * len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_cut_short_or_linked_is_refused(tmp_path, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    load, names = kind(folder)
    wanted = load()
    for name in names:
        good = (folder / name).read_bytes()
        for length in (0, 1, len(good) // 2, len(good.rstrip()) - 1):
            (folder / name).write_bytes(good[:length])
            with pytest.raises(SlimkitError):
                load()
        (folder / name).rename(tmp_path / "elsewhere")
        with pytest.raises(SlimkitError):
            load()
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SlimkitError, match=r"link|path inside"):
            load()
        (folder / name).unlink()
        (folder / name).write_bytes(good)
    assert same(load(), wanted)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "maps"])
@pytest.mark.parametrize("kind", KINDS)
def test_json_nested_without_end_is_refused(tmp_path, kind, deep):
    load, names = kind(tmp_path)
    (tmp_path / names[0]).write_text(deep)
    with pytest.raises(FileFormatError):
        load()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_a_cache_names_no_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    load, (facts, shard) = cache_folder(folder)
    (folder / shard).rename(tmp_path / "outside.safetensors")
    told = json.loads((folder / facts).read_text())
    told["shards"][0]["file"] = name
    (folder / facts).write_text(json.dumps(told))
    with pytest.raises(SlimkitError):
        load()


def test_a_rank_pattern_that_could_backtrack_without_end_is_refused(tmp_path):
    load, (config, _) = peft_folder(tmp_path)
    told = json.loads((tmp_path / config).read_text())
    for pattern in ("(a+)+$", "(.*)*x", "(" * 400, "x" * 600, "["):
        (tmp_path / config).write_text(json.dumps({**told, "rank_pattern": {pattern: 2}}))
        began = time.monotonic()
        with pytest.raises(SlimkitError):
            load()
        assert time.monotonic() - began < 10


# YAML ---------------------------------------------------------------------------------------------------------------

FREEZE = "freeze:\n  include: ['*', 'head.*']\n  exclude: [embed]\n"
LAUGHS = "a0: &a0 ['*']\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))


def test_a_fuzzed_freeze_file_is_read_or_refused(tmp_path):
    chance = random.Random(0)
    file = tmp_path / "freeze.yaml"
    refused = 0
    for _ in range(4 * FUZZED):
        file.write_bytes(damaged(FREEZE.encode(), chance))
        try:
            found = read_config(file)
        except SlimkitError:
            refused += 1
        else:
            assert all(part is None or all(isinstance(name, str) for name in part) for part in found)
    assert refused > FUZZED


def test_a_freeze_file_cut_short_is_read_or_refused(tmp_path):
    file = tmp_path / "freeze.yaml"
    read = 0
    for length in range(len(FREEZE)):
        file.write_text(FREEZE[:length])
        with contextlib.suppress(SlimkitError):
            read += len(read_config(file)[0] or ())
    assert 0 < read < len(FREEZE) * 2  # YAML has no end mark: a file cut behind a whole list is a shorter file


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + FREEZE.replace("['*', 'head.*']", "*a39"),
        "freeze: &f {include: *f}",
        "freeze: {include: " + "[" * 20_000,
        "{a: " * 20_000,
        "? " * 5_000,
        "\x00",
        FREEZE + FREEZE,
        FREEZE.replace("embed", "!!python/object/apply:os.system [echo]"),
    ],
    ids=["laughs", "a loop", "deep lists", "deep maps", "deep keys", "a nul", "twice", "an object"],
)
def test_a_hostile_freeze_file_is_refused_in_one_short_message(tmp_path, text):
    file = tmp_path / "freeze.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(SlimkitError) as caught:
        read_config(file)
    assert len(str(caught.value)) < 4000
    assert time.process_time() - began < 30, "a bomb went off"


@pytest.mark.parametrize(
    "value", ["2001-13-45", "!!int x", "!!float x", "!!timestamp x", "0x_", "0b_", "9" * 5000, "!!binary é"]
)
def test_yaml_that_its_own_reader_stumbles_over_is_one_error(tmp_path, value):
    file = tmp_path / "file.yaml"
    file.write_text(f"freeze: {{include: [{value}]}}")
    for read in (read_config, load_recipe):
        with pytest.raises(SlimkitError):
            read(file)
    with pytest.raises(SlimkitError, match="--arg"):
        settings([f"key={value}"], "--arg")


# Data files of the command line -------------------------------------------------------------------------------------


def array_file(folder, ending):
    file = folder / f"x{ending}"
    if ending == ".npy":
        np.save(file, A)
    elif ending == ".npz":
        np.savez(file, x=A)
    else:
        files.write_tensors(file, {"x": A})
    return file


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # NumPy parses a damaged header as Python's literals
@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_a_fuzzed_data_file_is_read_or_refused(tmp_path, ending):
    file = array_file(tmp_path, ending)
    good, chance = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(FUZZED):
        file.write_bytes(damaged(good, chance))
        try:
            found = read_arrays(file)
        except SlimkitError:
            refused += 1
        else:
            assert all(isinstance(a, np.ndarray) for a in (found.values() if isinstance(found, dict) else [found]))
    assert refused > 0.3 * FUZZED
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(good)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkPathError):
        read_arrays(file)


def test_a_data_file_that_claims_more_than_memory_holds_is_refused(tmp_path):
    file = tmp_path / "x.npy"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }".ljust(117) + b"\n"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(FileFormatError):
        read_arrays(file)


def test_a_data_file_with_a_pickle_inside_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "gone off"), "w"))

    for name, save in (("x.npy", np.save), ("x.npz", np.savez)):
        save(tmp_path / name, np.array([Bomb()], dtype=object))
        (tmp_path / "gone off").unlink(missing_ok=True)
        with pytest.raises(FileFormatError):
            read_arrays(tmp_path / name)
        assert not (tmp_path / "gone off").exists()
