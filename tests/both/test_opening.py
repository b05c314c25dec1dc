"""`load`: every kind of folder that slimkit writes says what it is, and gives its model where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimkit.core.checkpoint.maker import checked, read_maker, write_maker
from slimkit.core.errors import ConfigError, FileFormatError, PlanError
from slimkit.core.jobs import folders
from slimkit.core.run.opening import Loaded
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import parse_recipe
from slimkit.core.run.stages import Stages

ROOT = Path(__file__).parents[2]

MAKER = """
import numpy as np
from tests import kits

def net(width=32):
    kit = kits.make({name!r})
    return kit.named(a=kit.linear(8, width), b=kit.relu(), c=kit.linear(width, 4))

def data():
    return {{"train": [], "example": kits.make({name!r}).tensor(np.ones((1, 8), np.float32))}}
"""


def net(kit, width=32, seed=1):
    return kit.fill(kit.named(a=kit.linear(8, width), b=kit.relu(), c=kit.linear(width, 4)), seed)


def same(kit, one, other):
    here, there = kit.values(one), kit.values(other)
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)
    return True


@pytest.fixture
def maker(kit, tmp_path):
    """A file whose function makes the net."""
    file = tmp_path / f"made_{kit.name}.py"
    file.write_text(MAKER.format(name=kit.name))
    return f"{file}:net"


def pruned(kit, folder, **more):
    model = net(kit)
    kit.slim.save_pruned(folder, model, kit.slim.Pruner(model).prune(0.5, []), **more)
    return model


def test_a_pruned_folder_takes_a_fresh_network(kit, tmp_path):
    model = pruned(kit, tmp_path / "small")
    found = kit.slim.load(tmp_path / "small")
    assert (found.kind, found.model, found.facts["tensors"]) == ("pruned", None, 4)
    assert "fresh network" in found.next
    fresh = net(kit, seed=2)
    found = kit.slim.load(tmp_path / "small", fresh)
    assert found.model is fresh
    assert same(kit, model, fresh)
    assert not kit.is_training(fresh)
    with pytest.raises(PlanError):
        kit.slim.load(tmp_path / "small", net(kit, 16))


def test_a_recorded_factory_is_called_when_it_is_trusted_and_only_then(kit, tmp_path, maker):
    model = pruned(kit, tmp_path / "small", factory=maker, arguments={"width": 32})
    found = kit.slim.load(tmp_path / "small")
    assert found.model is None
    assert maker in found.next
    assert "trust_factory=True" in found.next
    assert same(kit, model, kit.slim.load(tmp_path / "small", trust_factory=True).model)


def test_a_sparse_folder_of_a_network_brings_weights_and_made_zeros(kit, tmp_path, maker):
    model, folder = net(kit), tmp_path / "sparse"
    folder.mkdir()
    report = kit.slim.Compressor(model, kit.slim.SparseConfig(method="magnitude")).compress([])
    kit.slim.save_checkpoint(model, folder / "model.safetensors")
    (folder / folders.SPARSE_REPORT).write_text(json.dumps(report))
    write_maker(folder, maker)
    found = kit.slim.load(folder, trust_factory=True)
    assert found.kind == "sparse"
    assert same(kit, model, found.model)
    assert kit.room("bridge").has_made_zeros(kit.room("bridge").get_module(found.model, "a"))


def test_a_student_is_known_by_its_report_and_a_file_of_weights_by_its_ending(kit, tmp_path):
    model, folder = net(kit), tmp_path / "student"
    folder.mkdir()
    kit.slim.save_checkpoint(model, folder / "model.safetensors")
    folders.write_report(folder, "distill", {"steps": 1})
    assert kit.slim.load(folder).kind == "student"
    for place in (folder, folder / "model.safetensors"):
        fresh = net(kit, seed=2)
        assert same(kit, kit.slim.load(place, fresh).model, model)


def test_a_delta_goes_on_its_base_given_as_a_model_or_a_folder(kit, tmp_path, maker):
    base = net(kit)
    (tmp_path / "base").mkdir()
    kit.slim.save_checkpoint(base, tmp_path / "base" / "model.safetensors")
    kit.slim.apply_delta(base, "lora", ["a"], rank=2)
    kit.fill(base, 3)
    kit.slim.save_delta(base, tmp_path / "delta")
    found = kit.slim.load(tmp_path / "delta")
    assert (found.kind, found.model) == ("bundle", None)
    assert "load(folder, base)" in found.next
    fresh = net(kit, seed=1)
    kit.assign(kit.params(fresh)["a.weight"], kit.values(base)["a.weight"])
    found = kit.slim.load(tmp_path / "delta", fresh)
    lora = {name for name in kit.values(found.model) if "lora" in name}
    assert len(lora) == 2
    assert all(np.array_equal(kit.values(found.model)[name], kit.values(base)[name]) for name in lora)
    with pytest.raises(ConfigError, match=r"network: .*gives no model by itself"):
        kit.slim.load(tmp_path / "delta", tmp_path / "base")


def test_a_pruned_network_is_saved_to_a_place_seen_from_here(kit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = kit.fill(kit.named(one=kit.linear(8, 32), act=kit.relu(), two=kit.linear(32, 4)))
    x = kit.tensor(np.ones((2, 8), np.float32))
    desc = kit.slim.Pruner(model, x).prune(0.6, [])
    kit.slim.save_pruned("small", model, desc)
    fresh = kit.named(one=kit.linear(8, 32), act=kit.relu(), two=kit.linear(32, 4))
    assert kit.slim.load("small", fresh).kind == "pruned"
    np.testing.assert_allclose(kit.array(fresh(x)), kit.array(model(x)), rtol=1e-6)


def test_a_w16a16s_folder_fills_a_network(kit, tmp_path):
    model = net(kit)
    kit.slim.Compressor(model, kit.slim.SparseConfig(method="magnitude")).compress([])
    kit.slim.save_w16a16s(tmp_path / "npu", model, {"model_type": "none"})
    found = kit.slim.load(tmp_path / "npu")
    assert (found.kind, found.model) == ("w16a16s", None)
    fresh = net(kit, seed=2)
    kit.slim.load(tmp_path / "npu", fresh)
    for name, value in kit.values(model).items():
        assert np.array_equal(kit.values(fresh)[name], value.astype(np.float16).astype(np.float32))


def test_a_run_gives_the_model_of_its_last_stage(kit, tmp_path, maker):
    name = Path(maker).name
    content = {"version": 1, "name": "small", "framework": kit.name, "model": name, "data": name[:-3] + "data"}
    stages = [{"prune": {"reserved_ratio": 0.5, "alignment": 4, "un_prune_list": []}}]
    face = Stages(getattr(kit.room("jobs"), {"torch": "TorchJobs", "mindspore": "MindSporeJobs"}[kit.name])())
    report = run_recipe(parse_recipe({**content, "stages": stages}), tmp_path, face, tmp_path / "run")
    told = kit.slim.load(tmp_path / "run")
    assert (told.kind, told.model, told.facts["stages"]) == ("run", None, ["00-load", "01-prune"])
    assert "trust_factory=True" in told.next
    made = kit.slim.load(tmp_path / "run", trust_factory=True).model
    assert face.digest(made) == report["stages"][1]["digest"]
    assert tuple(kit.params(made)["a.weight"].shape) != (32, 8)


def test_what_is_no_model_says_what_reads_it(kit, tmp_path):
    model = net(kit)
    _, desc = kit.slim.Pruner(model).analysis(0.5, [])
    (tmp_path / "desc.json").write_text(json.dumps(desc))
    for name in ("trainer.json", "cache.json"):
        (tmp_path / name[:-5]).mkdir()
        (tmp_path / name[:-5] / name).write_text("{}")
    told = {name: kit.slim.load(tmp_path / name) for name in ("desc.json", "trainer", "cache")}
    assert [found.kind for found in told.values()] == ["desc", "trainer checkpoint", "teacher cache"]
    assert all(found.next and found.model is None for found in told.values())
    assert "prune_by_desc" in str(told["desc.json"])


def test_what_slimkit_did_not_write_is_refused_in_one_line(kit, tmp_path):
    (tmp_path / "other").mkdir()
    for place in ("other", "missing"):
        with pytest.raises(FileFormatError) as caught:
            kit.slim.load(tmp_path / place)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="folder"):
        kit.slim.load(5)


@pytest.mark.parametrize("text", ["nets", ":net", "nets:", "nets:a b"])
def test_a_factory_has_a_module_and_a_function(text):
    with pytest.raises(ValueError, match="factory must be"):
        checked(text)


def test_a_maker_is_plain_data(tmp_path):
    with pytest.raises(TypeError, match="arguments"):
        checked("nets:net", {"width": object()})
    write_maker(tmp_path, "nets:net", {"width": 8})
    assert read_maker(tmp_path) == ("nets:net", {"width": 8})
    assert checked("nets.py:net")["factory"] == f"{Path.cwd() / 'nets.py'}:net"
    (tmp_path / "network.json").write_text('{"format": "slimkit-network", "version": 2}')
    with pytest.raises(FileFormatError, match=r"network\.json"):
        read_maker(tmp_path)


def test_a_folder_opens_in_a_fresh_process(kit, tmp_path, maker):
    model = pruned(kit, tmp_path / "small", factory=maker)
    code = (
        f"import {kit.package} as sk\n"
        f"found = sk.load({str(tmp_path / 'small')!r}, trust_factory=True)\n"
        "print(found.kind, type(found.model).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["pruned", type(model).__name__], run.stderr[-2000:]


def test_what_was_found_shows_a_table():
    found = Loaded("small", "pruned", None, "load(folder, network)", {"tensors": 4})
    assert str(found).splitlines() == [
        "pruned in small",
        "  model    not made",
        "  next     load(folder, network)",
        "  tensors  4",
    ]
    assert repr(found) == str(found)
    assert found._repr_html_().startswith("<table>")
