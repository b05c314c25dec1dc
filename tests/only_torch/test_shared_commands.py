"""distill, train and adapt under torchrun: what one process writes, and a killed process stops none of it for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chain import tiny_models
from tests.only_torch import shared_commands

FOLDER = Path(__file__).parent
MANY = pytest.mark.skipif(int(os.environ.get("SLIMKIT_KILLS", "2")) <= 2, reason="seconds of imports: SLIMKIT_KILLS=20")
NAMES = ("cached", "online", "train", "adapt", "factory")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "shared_commands.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("commands")
    tiny_models.hugging_face(made, "llama")
    tiny_models.text(made / "plain.jsonl", count=26, labels=False)
    (made / "nets.py").write_text(tiny_models.TORCH_PLAIN)
    rng = np.random.default_rng(0)
    np.savez(made / "x.npz", x=rng.normal(size=(24, 5)).astype(np.float32), labels=rng.integers(0, 3, 24))
    sparsify = ["sparsify", "--model", str(made / "llama"), "--method", "magnitude", "--out", str(made / "sparse")]
    shared_commands.command(*sparsify)
    for name in NAMES:
        shared_commands.run(made, name)
    done = torchrun(made, *NAMES)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def told(folder, name, world):
    return json.loads((folder / f"{name}_{world}.json").read_text())


def tensors(folder):
    """Everything in the .safetensors files of a folder."""
    return {
        f"{f.relative_to(folder)}:{n}": v
        for f in sorted(folder.rglob("*.safetensors"))
        for n, v in load_file(f).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_write_what_one_does(folder, name):
    one, two = (told(folder, name, world) for world in (1, 2))
    assert one["samples"] % 8 == 0  # so that no sample is read again to fill an update
    assert two["steps"] == one["steps"]
    np.testing.assert_allclose(two["loss_by_epoch"], one["loss_by_epoch"], rtol=2e-5)  # float32, means of means
    assert two.get("evaluation") == pytest.approx(one.get("evaluation"), rel=1e-5) if "evaluation" in one else True
    places = [folder / f"{name}_{world}" for world in (1, 2)]
    files = [sorted(str(f.relative_to(place)) for f in place.rglob("*")) for place in places]
    assert files[0] == files[1]
    first, second = map(tensors, places)
    assert set(first) == set(second)
    for key in first:
        assert first[key].dtype == second[key].dtype
        # AdamW's first steps are as long for the smallest gradient: a rounding of one moves a weight by the rate
        np.testing.assert_allclose(second[key], first[key], atol=2e-4, err_msg=key)


def test_the_teacher_was_asked_as_in_one_process(folder):
    assert [told(folder, name, 2)["teacher"] for name in ("cached", "online")] == ["cached", "online"]


def test_the_zeros_of_a_sparse_folder_stay(folder):
    before, after = (tensors(folder / name) for name in ("sparse", "train_2"))
    layers = [n for n in before if n.endswith("q_proj.weight")]
    assert layers
    for name in layers:
        assert ((before[name] == 0) <= (after[name] == 0)).all()
        assert not (before[name] == after[name]).all()


@pytest.mark.parametrize("name", ["cached", "online", "train", "adapt"])
def test_transformers_opens_the_folder(folder, name):
    import torch
    import transformers

    place = folder / f"{name}_2" / ("merged" if name == "adapt" else "")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("who", ["last", pytest.param("first", marks=MANY)])
def test_what_a_killed_process_leaves_is_ended_by_one(folder, monkeypatch, who):
    kept = folder / f"kept_{who}"
    os.rename(folder / "online_2", kept)
    done = torchrun(folder, "dies", "online", who)
    assert done.returncode != 0
    left = json.loads((folder / "online_2" / ".slimkit-train" / "last" / "trainer.json").read_text())
    assert left["global_step"] == 2
    assert not (folder / "online_2" / "config.json").exists()
    before = tensors(kept)
    monkeypatch.setattr(shared_commands, "WORLD", 2)  # the folder's name
    shared_commands.run(folder, "online")
    for name, value in tensors(folder / "online_2").items():
        np.testing.assert_allclose(value, before[name], atol=2e-4, err_msg=name)


def test_samples_that_cannot_be_shared_out_are_refused(monkeypatch):
    from slimkit.core.errors import ConfigError
    from slimkit.core.jobs import crew

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="--batch-size must be a multiple of the 3 processes"):
        crew.share_of(16, "--batch-size")
