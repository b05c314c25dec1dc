"""Long jobs on a full disk, killed, in a folder that cannot be written, and twice in one folder."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core import files
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError
from slimkit.core.locks import locked
from tests.chain import tiny_models
from tests.chain.test_cli_files import forked
from tests.conftest import INSTALLED

X = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)


class Disk:
    """A disk that is full after so many files: syncing one more fails, as it does where space ran out."""

    def __init__(self, room):
        self.room = room
        self._sync = os.fsync

    def __call__(self, handle):
        self.room -= stat.S_ISREG(os.fstat(handle).st_mode)  # a folder's names need no room of their own
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._sync(handle)


def on_a_disk(monkeypatch, room, work):
    """Run `work` where the disk takes `room` more files; whether it got through."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Disk(room))
        try:
            work()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
    return True


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def leftovers(folder):
    found = [f for f in folder.rglob("*") if f.name.endswith((".part", ".tmp", ".lock"))]
    # sparsify_checkpoint's lock stays beside its job.json
    return [f.name for f in found if (f.parent.name, f.name) != (".slimkit-sparse", ".lock")]


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


# a full disk --------------------------------------------------------------------------------------------------------


def network(kit):
    return kit.fill(kit.named(first=kit.linear(8, 16), act=kit.relu(), last=kit.linear(16, 4)))


def test_a_trainer_on_a_full_disk_keeps_the_checkpoint_before(kit, tmp_path, monkeypatch):
    def trainer():
        made = kit.room("train").Checkpoints(tmp_path / "kept", metric=None)
        return kit.slim.Trainer(
            network(kit), compute_loss=lambda model, batch: (model(batch) ** 2).mean(), callbacks=[made]
        )

    batches = [kit.tensor(X[i : i + 4]) for i in range(0, 12, 4)]
    whole = trainer().train(batches, 3, seed=0)
    wanted = whole.get_metric_values("train_loss_epoch")
    files_per_run = Disk(10**6)
    monkeypatch.setattr(os, "fsync", files_per_run)
    trainer().train(batches, 3, seed=0)
    monkeypatch.undo()
    used = 10**6 - files_per_run.room
    for room in random.Random(0).sample(range(used), 3):
        for leftover in (tmp_path / "kept").iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        assert not on_a_disk(monkeypatch, room, lambda: trainer().train(batches, 3, seed=0))
        assert leftovers(tmp_path) == []
        last = tmp_path / "kept" / "last"
        again = trainer().train(batches, 3, seed=0, resume_from=last if last.exists() else None)
        assert again.get_metric_values("train_loss_epoch") == wanted


def test_a_teacher_cache_on_a_full_disk_is_built_on_to_the_same_bytes(kit, tmp_path, monkeypatch):
    term = {"func_name": "KDMse", "func_weight": 1}
    config = KnowledgeDistillConfig().add_output_soft_label(
        {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]}
    )  # fmt: skip

    def build(folder):
        batches = [kit.tensor(X[i : i + 4]) for i in range(0, 12, 4)]
        return lambda: kit.slim.TeacherCache.build(network(kit), batches, config, folder)

    build(tmp_path / "whole")()
    tried = 0
    for room in range(20):
        if on_a_disk(monkeypatch, room, build(tmp_path / f"cut{room}")):
            break
        tried += 1
        assert leftovers(tmp_path) == []
        build(tmp_path / f"cut{room}")()
        assert tree(tmp_path / f"cut{room}") == tree(tmp_path / "whole")
    assert tried >= 2


def test_an_export_on_a_full_disk_leaves_the_old_pair_of_files(kit, tmp_path, monkeypatch):
    def export(seed):
        return lambda: kit.slim.export_onnx(
            kit.fill(network(kit), seed), kit.tensor(X[:2]), tmp_path / "net.onnx", external_data=True
        )

    export(0)()
    before = tree(tmp_path)
    assert len(before) >= 1
    tried = 0
    for room in range(20):
        if on_a_disk(monkeypatch, room, export(1)):
            break
        tried += 1
        # Either the old files or, where only the folder could not be synced any more, the new ones; never one of each.
        after = tree(tmp_path)
        assert after == before or all(after[name] != before[name] for name in before), room
        export(0)()
    assert tried >= 1
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny Hugging Face model, text for it, and a folder to work in."""
    if "torch" not in INSTALLED:
        pytest.skip("the commands' PyTorch side")
    folder = tmp_path_factory.mktemp("jobs")
    tiny_models.hugging_face(folder, "bert")
    tiny_models.hugging_face(folder, "llama")
    tiny_models.text(folder / "labelled.jsonl")
    (folder / "nets.py").write_text(tiny_models.TORCH_PLAIN)
    np.savez(folder / "x.npz", x=X[:, :6], labels=X[:, :3].argmax(1))
    return folder


JOBS = {
    "sparsify": ("sparsify", "-m", "llama", "--method", "wanda", "--calib", "labelled.jsonl", "--samples", 8),
    "distill": ("distill", "-m", "bert", "--layers", 2, "-d", "labelled.jsonl", "--batch-size", 8, "--save-every", 1),
    "adapt": (
        "adapt", "--factory", "nets.py:net", "-d", "x.npz", "--target", "fc1", "--rank", 2, "--batch-size", 4,
        "--epochs", 3, "--save-every", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_a_command_on_a_full_disk_goes_on_to_the_same_bytes(here, tmp_path, monkeypatch, one_thread, job):
    monkeypatch.chdir(here)
    command = JOBS[job] if job != "adapt" else (*JOBS[job], "--seed", 3)
    if job == "adapt":  # a factory draws its weights anew: here they come from a file
        run("sparsify", "--factory", "nets.py:net", "--method", "magnitude", "--sparsity", 0.1, "-o", tmp_path / "w")
        command = (*command, "-m", tmp_path / "w" / "model.safetensors")
    run(*command, "-o", tmp_path / "whole")
    out = tmp_path / "cut"
    stopped = 0
    for room in range(1, 40, 3):  # each goes on from where the one before was stopped
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Disk(room))
            done = CliRunner().invoke(app, [str(a) for a in (*command, "-o", out)])
        if done.exit_code == 0:
            break
        stopped += 1
        assert isinstance(done.exception, OSError), (room, done.exception)
        assert not (out / f"{job}_report.json").exists()
        assert leftovers(tmp_path) == []
    assert stopped >= 2
    assert tree(out) == tree(tmp_path / "whole")


# killed -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
@pytest.mark.parametrize("job", ["distill", "adapt"])
def test_a_killed_training_command_goes_on_to_the_same_bytes(here, tmp_path, monkeypatch, one_thread, job):
    monkeypatch.chdir(here)
    command = JOBS[job]
    if job == "adapt":
        run("sparsify", "--factory", "nets.py:net", "--method", "magnitude", "--sparsity", 0.1, "-o", tmp_path / "w")
        command = (*command, "-m", tmp_path / "w" / "model.safetensors")
    run(*command, "-o", tmp_path / "whole")
    out = tmp_path / "cut"
    child = forked([*command, "-o", out], tmp_path)
    end = time.monotonic() + 60
    while not (out / ".slimkit-train" / "last").exists() and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        assert (out / ".slimkit-train").exists() or (out / f"{job}_report.json").exists()
    run(*command, "-o", out) if (out / ".slimkit-train").exists() else None
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
def test_a_killed_conversion_leaves_no_half_file(here, tmp_path, monkeypatch, one_thread):
    big = {f"{i}.weight": np.random.default_rng(i).standard_normal((256, 256)).astype(np.float32) for i in range(40)}
    files.write_tensors(tmp_path / "a.safetensors", big)
    run("convert", tmp_path / "a.safetensors", tmp_path / "first.ckpt", "--no-manifest")  # loads what it needs
    began = time.monotonic()
    run("convert", tmp_path / "a.safetensors", tmp_path / "whole.ckpt", "--no-manifest")
    took = time.monotonic() - began
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for share in (0.1, 0.4, 0.7):
        child = forked(
            ["convert", tmp_path / "a.safetensors", tmp_path / "cut.ckpt", "--no-manifest"], tmp_path
        )  # fmt: skip
        time.sleep(took * share)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (tmp_path / "cut.ckpt").exists() or (tmp_path / "cut.ckpt").read_bytes() == whole
        if not (tmp_path / "cut.ckpt").exists():  # a child that was faster than its kill has ended well
            run("convert", tmp_path / "a.safetensors", tmp_path / "cut.ckpt", "--no-manifest")
        assert (tmp_path / "cut.ckpt").read_bytes() == whole
        (tmp_path / "cut.ckpt").unlink()


# folders ------------------------------------------------------------------------------------------------------------

WRITERS = {
    **JOBS,
    "prune": ("prune", "-m", "llama", "--alignment", 8, "--importance", "l1"),
    "export": ("export", "-m", "bert", "--length", 8),
}


@pytest.mark.parametrize("job", WRITERS)
def test_a_folder_that_cannot_be_made_is_one_error(here, monkeypatch, job):
    monkeypatch.chdir(here)
    nowhere = "/proc/slimkit/out" + (".onnx" if job == "export" else "")
    done = CliRunner().invoke(app, [str(a) for a in (*WRITERS[job], "-o", nowhere)])
    assert isinstance(done.exception, (OSError, ConfigError)), done.exception
    assert "/proc/slimkit" in str(done.exception)


@pytest.mark.parametrize("job", JOBS)
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(here, tmp_path, monkeypatch, job):
    monkeypatch.chdir(here)
    out = tmp_path / "out"
    with locked(out, "--out"):
        done = CliRunner().invoke(app, [str(a) for a in (*JOBS[job], "-o", out)])
        assert isinstance(done.exception, ConfigError), done.exception
        assert "another run is using" in str(done.exception)
        assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_two_builds_of_one_teacher_cache_are_refused(kit, tmp_path):
    term = {"func_name": "KDMse", "func_weight": 1}
    config = KnowledgeDistillConfig().add_output_soft_label(
        {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]}
    )  # fmt: skip
    with locked(tmp_path / "c", "directory"), pytest.raises(ConfigError, match="another run"):
        kit.slim.TeacherCache.build(network(kit), [kit.tensor(X)], config, tmp_path / "c")


def test_a_lock_goes_with_its_process(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("kills a process of its own")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "out", "--out"):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(ConfigError), locked(tmp_path / "out", "--out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "out", "--out"):
        pass
    assert list(tmp_path.iterdir()) == []
