"""TrainableParamsCheckPoint: what both frameworks' classes refuse, and the policy of when to save and what to keep."""

import os
import time

import pytest

from slimkit.core.checkpoint import manifest
from slimkit.core.checkpoint.savepolicy import CheckpointConfig, SavePolicy, appended
from slimkit.core.errors import AbsolutePathError, ArgumentError, ArgumentTypeError, LinkPathError


@pytest.mark.parametrize(
    ("directory", "error"),
    [(None, ValueError), ("", ValueError), ("relative/path", AbsolutePathError), (3, TypeError)],
)
def test_directories_of_the_seed_are_refused(kit, directory, error):
    with pytest.raises(error, match="directory"):
        kit.room("checkpoint").TrainableParamsCheckPoint(directory)


def test_a_linked_directory_is_refused(kit, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(LinkPathError, match="symbolic link"):
        kit.room("checkpoint").TrainableParamsCheckPoint(str(tmp_path / "link"))


def test_another_config_and_a_bad_prefix_are_refused(kit, tmp_path):
    make = kit.room("checkpoint").TrainableParamsCheckPoint
    with pytest.raises(TypeError, match="config"):
        make(str(tmp_path), config={"save_checkpoint_steps": 1})
    with pytest.raises(ArgumentError, match="prefix"):
        make(str(tmp_path), prefix="a/b")
    with pytest.raises(ArgumentTypeError, match="prefix"):
        make(str(tmp_path), prefix=3)
    with pytest.raises(ArgumentTypeError, match="optimizer_state"):
        make(str(tmp_path), optimizer_state=1)


def test_arguments_are_those_of_the_seed(kit, tmp_path):
    room = kit.room("checkpoint")
    config = room.CheckpointConfig(save_checkpoint_steps=2)
    saver = room.TrainableParamsCheckPoint(str(tmp_path / "new"), "MINE", config)
    assert (tmp_path / "new").is_dir()
    assert saver.latest_ckpt_file_name == ""


def policy(folder, **kw):
    given = {"steps": 1, "seconds": 0, "keep_max": 0, "keep_minutes": 0, **kw}
    return SavePolicy(folder, "P", ".ckpt", **given)


def test_every_so_many_steps_and_the_last(tmp_path):
    p = policy(tmp_path, steps=3)
    assert [s for s in range(1, 8) if p.due(s) and p.next_file(1, s, s)] == [3, 6]
    assert p.due(7, last=True)
    assert not p.due(6, last=True)


def test_every_so_many_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    p = policy(tmp_path, steps=0, seconds=10)
    saved = []
    for step in range(1, 8):
        now[0] += 4
        if p.due(step):
            p.next_file(1, step, step)
            saved.append(step)
    assert saved == [3, 6]


def test_only_the_newest_stay_and_their_manifests_go_with_the_old(tmp_path):
    p = policy(tmp_path, keep_max=2)
    for step in range(1, 5):
        path = p.next_file(1, step, step)
        path.write_text("x")
        manifest.sidecar(path).write_text("{}")
        os.utime(path, (step, step))
        p.tidy()
    assert sorted(n.name for n in tmp_path.iterdir() if n.suffix == ".ckpt") == ["P-1_3.ckpt", "P-1_4.ckpt"]
    assert len(list(tmp_path.iterdir())) == 4


def test_of_every_so_many_minutes_one_stays(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    p = policy(tmp_path, keep_minutes=2)
    for step in range(1, 9):
        now[0] += 30
        path = p.next_file(1, step, step)
        path.write_text("x")
        os.utime(path, (now[0], now[0]))
        p.tidy()
    assert len(list(tmp_path.iterdir())) < 8


def test_files_of_an_earlier_run_are_left_alone(tmp_path):
    (tmp_path / "P-1_1.ckpt").write_text("old")
    p = policy(tmp_path, keep_max=1)
    for step in (1, 2):
        p.next_file(1, step, step).write_text("new")
        p.tidy()
    assert sorted(n.name for n in tmp_path.iterdir()) == ["P-1_1.ckpt", "P_1-1_2.ckpt"]


def test_the_torch_config_has_mindspores_words_and_checks_them():
    assert CheckpointConfig().keep_checkpoint_max == 5
    for bad in (
        {"save_checkpoint_steps": -1},
        {"format": "ckpt"},
        {"save_checkpoint_steps": 0},
        {"append_info": ["x"]},
    ):
        with pytest.raises(ArgumentError):
            CheckpointConfig(**bad)
    with pytest.raises(ArgumentTypeError):
        CheckpointConfig(async_save=1)
    assert appended(["epoch_num", {"lr": 0.1}]) == {"epoch_num": 0, "lr": 0.1}
