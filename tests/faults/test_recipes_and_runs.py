"""Recipes, run folders, W16A16S folders and name patterns under damage: one error that says what is wrong, soon."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.ascend.w16a16s import load_w16a16s, save_arrays
from slimkit.core.convert.names import mapped
from slimkit.core.errors import ConfigError, LinkPathError, PatternError, SlimkitError
from slimkit.core.match import match
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import load_recipe
from slimkit.core.weights.blocks import PruneConfig
from tests.core.test_pipeline import NumpyWing, folder, pictures, recipe  # noqa: F401  # two are fixtures

RECIPE = """
version: 1
name: tiny
model: task.py:model
data: task.py:data
stages:
  - train: {epochs: 1}
  - prune: {reserved_ratio: 0.5}
"""
# Ten aliases of ten aliases, nine deep: a billion strings if anything walks them.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def damaged(good, chance):
    bad = bytearray(good)
    for _ in range(chance.choice((1, 2, 6))):
        at = chance.randrange(len(bad))
        action = chance.randrange(3)
        if action == 0:
            bad[at] = chance.randrange(256)
        elif action == 1:
            del bad[at : at + chance.randrange(1, 12)]
        else:
            bad[at:at] = bytes(chance.randrange(32, 127) for _ in range(chance.randrange(1, 6)))
        bad = bad or bytearray(b"x")
    return bytes(bad)


def test_a_fuzzed_recipe_is_read_or_refused(tmp_path):
    file, chance, refused = tmp_path / "recipe.yaml", random.Random(0), 0
    for _ in range(300):
        file.write_bytes(damaged(RECIPE.encode(), chance))
        try:
            load_recipe(file)
        except SlimkitError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + RECIPE,
        RECIPE + LAUGHS.replace("a9:", "title:"),
        RECIPE.replace("name: tiny", "name: &n {n: [*n]}"),
        "[" * 20_000,
        "{a: " * 20_000,
        "? " * 5_000,
        "!!python/object/apply:os.system [echo]",
        "\x00",
        RECIPE + "name: again\n",
    ],
    ids=["laughs", "laughs in a key", "a loop", "deep lists", "deep maps", "deep keys", "an object", "a nul", "twice"],
)
def test_a_hostile_recipe_is_refused_in_one_short_message(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(SlimkitError) as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 4000
    assert time.process_time() - began < 30, "a bomb went off"


def test_a_linked_or_missing_recipe_is_refused(tmp_path):
    (tmp_path / "real.yaml").write_text(RECIPE)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    for name in ("link.yaml", "none.yaml", ""):
        with pytest.raises(SlimkitError):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize("name", ["run.json", "stages/01-train/stage.json"])
def test_a_damaged_run_folder_is_refused_or_gives_the_same_numbers(folder, name):  # noqa: F811
    whole = run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    good = (folder / "run" / name).read_bytes()
    chance, refused = random.Random(0), 0
    for turn in range(8):
        (folder / "run" / name).write_bytes(good[: len(good) // 2] if turn == 0 else damaged(good, chance))
        # Only the last stage is left to do, so that the records before it are read again.
        last = folder / "run" / "stages" / "04-sparsify"
        (last / "stage.json").unlink(missing_ok=True)
        try:
            found = run_recipe(recipe(), folder, NumpyWing(), folder / "run")
        except SlimkitError:
            refused += 1
        else:
            assert found["stages"][-1]["digest"] == whole["stages"][-1]["digest"]
    assert refused > 1


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_weights_in_a_run_folder_are_refused(folder, cut):  # noqa: F811
    run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    stages = folder / "run" / "stages"
    for file in (stages / "04-sparsify").iterdir():
        file.unlink()
    (stages / "04-sparsify").rmdir()
    weights = stages / "03-finetune" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(SlimkitError, match="safetensors"):
        run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    assert not (stages / "04-sparsify").exists()


@pytest.mark.parametrize("output", ["/proc/slimkit", "/dev/null/run"])
def test_a_run_that_cannot_be_written_says_so(folder, output):  # noqa: F811
    from pathlib import Path

    with pytest.raises(ConfigError, match="output: cannot use"):
        run_recipe(recipe(), folder, NumpyWing(), Path(output))


def test_a_report_is_not_written_through_a_link(folder):  # noqa: F811
    run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    (folder / "run" / "report.html").unlink()
    (folder / "run" / "report.html").symlink_to(folder / "precious")
    (folder / "run" / "stages" / "04-sparsify" / "stage.json").unlink()
    with pytest.raises(LinkPathError):
        run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    assert not (folder / "precious").exists()


def test_changed_weights_in_a_run_folder_are_noticed(folder):  # noqa: F811
    run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    stages = folder / "run" / "stages"
    (stages / "04-sparsify" / "stage.json").unlink()
    weights = stages / "03-finetune" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    with pytest.raises(SlimkitError, match=r"03-finetune.*other weights"):
        run_recipe(recipe(), folder, NumpyWing(), folder / "run")


def w16a16s(place):
    tensors = {"a.weight": np.eye(32, dtype=np.float16), "a.bias": np.ones(32, np.float16)}
    save_arrays(place, tensors, {"hidden_size": 32})
    return tensors


def test_a_fuzzed_w16a16s_folder_is_read_or_refused(tmp_path):
    tensors = w16a16s(tmp_path / "m")
    chance, refused = random.Random(0), 0
    for file in sorted((tmp_path / "m").iterdir()):
        good = file.read_bytes()
        for _ in range(60):
            # Damage where the structure is; a changed number within a tensor is a number still.
            file.write_bytes(damaged(good[:200], chance) + good[200:])
            try:
                found = load_w16a16s(tmp_path / "m")
            except SlimkitError:
                refused += 1
            else:
                assert set(found.tensors) == set(tensors)
        file.write_bytes(good)
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SlimkitError):
            load_w16a16s(tmp_path / "m")
        file.unlink()
        (tmp_path / "elsewhere").rename(file)
    assert refused > 40
    assert set(load_w16a16s(tmp_path / "m").tensors) == set(tensors)


BOMBS = [
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    "([a-z]+)*[0-9]",
    r"(\w+\s?)*$",
    "(a*)*(b*)*",
    "(" * 400,
    "x" * 600,
    "[",
    "(?P<n>",
    r"\9",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_pattern_backtracks_without_bound(bomb):
    names = ["a" * 40 + "!", "layer.0.weight"]
    began = time.monotonic()
    with pytest.raises(PatternError):
        match(names, [f"re:{bomb}"])
    with pytest.raises(PatternError):
        mapped(names, {f"re:{bomb}": "x"})
    with pytest.raises(SlimkitError):
        PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(bomb, {0: 0})
    assert time.monotonic() - began < 10


def test_a_glob_costs_little_whatever_it_says():
    names = ["a" * 400 + ".weight"] * 50
    began = time.monotonic()
    assert match(names, ["*a" * 40 + "*b"]).names == ()
    assert time.monotonic() - began < 10


def test_tensors_never_come_from_a_pickle(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "gone off"), "w"))

    file = tmp_path / "model.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    for read in (files.read_tensors, files.read_json, load_recipe):
        with pytest.raises(SlimkitError):
            read(file)
    assert not (tmp_path / "gone off").exists()
