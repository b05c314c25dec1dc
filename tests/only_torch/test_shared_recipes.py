"""`slimkit run` in several processes: what one writes, a lost process ends all, what cannot be shared is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from slimkit.core.errors import ConfigError
from slimkit.core.jobs import crew
from slimkit.core.jobs.status import status
from slimkit.core.run.stages import Stages
from slimkit.loading import in_pieces
from tests.only_torch import shared_recipes
from tests.only_torch.test_sparse_checkpoint_processes import LOST, processes

import torch

FOLDER = Path(__file__).parent
MANY = pytest.mark.skipif(int(os.environ.get("SLIMKIT_KILLS", "2")) <= 2, reason="seconds of imports: SLIMKIT_KILLS=20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("recipes")
    shared_recipes.write(made)
    return made


def torchrun(*arguments, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "shared_recipes.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return done


def stages(out):
    return {f.parent.name: json.loads(f.read_text()) for f in sorted((out / "stages").glob("*/stage.json"))}


def weights(out):
    return {f.parent.name: f.read_bytes() for f in sorted((out / "stages").glob("*/model.safetensors"))}


@pytest.mark.parametrize("name", ["smaller", "measured"])
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_two_processes_write_the_bytes_of_one(folder, name):
    assert processes(2, lambda: shared_recipes.run(folder, name, f"{name}-2"))[0] == [0, 0]
    shared_recipes.run(folder, name, f"{name}-1")
    one, two = (stages(folder / f"{name}-{n}") for n in (1, 2))
    assert weights(folder / f"{name}-2") == weights(folder / f"{name}-1")
    for stage in one:
        for key in ("digest", "metrics", "seed", "options"):
            assert two[stage][key] == one[stage][key], (stage, key)
        assert set(two[stage]["files"]) == set(one[stage]["files"])
    told = json.loads((folder / f"{name}-2" / "report.json").read_text())
    assert told["complete"]
    assert (folder / f"{name}-2" / "report.html").exists()
    assert status(folder / f"{name}-2")["state"] == "finished"
    # a run that two began is read by one
    assert shared_recipes.run(folder, name, f"{name}-2")["stages"] == told["stages"]


@pytest.fixture(scope="module")
def trained(folder):
    torchrun(folder, "run", "trained", "trained-2")
    threads = torch.get_num_threads()
    shared_recipes.run(folder, "trained", "trained-1")
    torch.set_num_threads(threads)
    return folder


def test_training_in_parts_gives_what_one_process_gives(trained):
    one, two = (stages(trained / f"trained-{n}") for n in (1, 2))
    assert list(two) == list(one)
    for name, stage in one.items():
        assert set(two[name]["files"]) == set(stage["files"])
        assert two[name]["measurement"]["parameters"] == stage["measurement"]["parameters"]
        for key, curve in stage["curves"].items():  # the same updates: a batch is shared out, not taken twice
            np.testing.assert_allclose(two[name]["curves"][key], curve, rtol=1e-2, err_msg=f"{name} {key}")
    for name in one:
        if name == "00-load":
            continue
        first, second = (load_file(trained / f"trained-{n}" / "stages" / name / "model.safetensors") for n in (1, 2))
        assert set(first) == set(second)
        for key, value in first.items():
            # AdamW's first steps are as long for the smallest gradient
            np.testing.assert_allclose(second[key], value, atol=2e-3, err_msg=f"{name} {key}")
    tuned = two["05-finetune"]["measurement"]
    assert tuned["zeros"] == two["04-sparsify"]["measurement"]["zeros"] > 0


@MANY
def test_a_killed_process_ends_the_run_and_one_goes_on(trained):
    done = torchrun(trained, "dies", "trained", "killed", "finetune", code=1)
    assert "Traceback" not in done.stderr or "ProcessLostError" in done.stderr or "Signal 9" in done.stderr
    left = status(trained / "killed")
    assert (left["state"], left["done"], left["processes"]) == ("stopped", {"stages": [4, 6]}, 2)
    before = weights(trained / "killed")
    shared_recipes.run(trained, "trained", "killed")
    after = weights(trained / "killed")
    assert {key: after[key] for key in before} == before
    one, gone = stages(trained / "trained-2"), stages(trained / "killed")
    assert set(gone) == set(one)
    for stage in ("05-finetune", "06-adapt"):
        np.testing.assert_allclose(gone[stage]["curves"]["loss"], one[stage]["curves"]["loss"], rtol=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_an_error_in_a_stage_of_one_ends_all(folder, capfd):
    def work():
        try:
            shared_recipes.run(folder, "smaller", "broken", metrics="tiny_task.py:broken")
        except Exception as error:  # noqa: BLE001 - the parent reads it
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(LOST)

    assert processes(2, work)[0] == [LOST, LOST]
    assert capfd.readouterr().err.count("no such metric") == 2  # either may be the one that speaks
    assert status(folder / "broken")["why"].endswith("no such metric")
    assert not list((folder / "broken" / "stages").glob(".*.part"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "tiny_task.py:other_data"}, "data must be the same in every process"),
        (
            {"stages": [{"train": {"batch_size": 7}}]},
            r"stages[0].train.batch_size must be a multiple of the 2 processes",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(folder, changes, message, capfd):
    def work():
        try:
            shared_recipes.run(folder, "smaller", f"refused {len(message)}", metrics=None, **changes)
        except ConfigError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(LOST)

    assert processes(2, work)[0] == [LOST, LOST]
    assert message in capfd.readouterr().err


def test_a_ready_batch_is_shared_out_by_its_samples():
    batch = ({"x": torch.arange(5), "n": 3}, torch.arange(10).reshape(5, 2))
    pieces = list(in_pieces([batch, batch], 2))
    assert [p[0]["x"].tolist() for p in pieces] == [[0, 1, 2], [3, 4, 0]] * 2
    assert pieces[1][1].tolist() == [[6, 7], [8, 9], [0, 1]]
    assert len(in_pieces([batch, batch], 2)) == 4
    one = torch.utils.data.TensorDataset(torch.arange(5))
    assert in_pieces(one, 2) is one
    loader = torch.utils.data.DataLoader(one, 2, shuffle=True)
    assert in_pieces(loader, 2).sampler is loader.sampler
    with pytest.raises(ConfigError, match=r"by its samples, 5 here, and a batch holds \(1, 5\)"):
        list(in_pieces([(torch.arange(5), torch.ones(1, 5))], 2))


def test_mindspore_recipes_are_for_one_process(monkeypatch):
    class OneProcess(crew.CrewFramework):
        """As MindSpore's jobs are."""

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="in this framework one does it: leave torchrun out"):
        Stages(OneProcess()).join()
