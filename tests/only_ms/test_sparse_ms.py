"""Sparsity under msrun: two processes find what one process finds, with split data and on a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slimkit.core.sparse import processes
from tests.only_ms import sparse_processes
from tests.only_ms.test_train_ms import free_port

FOLDER = Path(__file__).parent


def under_msrun(script, folder, *words):
    """Run a script of this folder in two workers; how it ended."""
    bin_folder = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER.parents[1]),
        "GLOG_v": "3",
        "OMP_NUM_THREADS": "1",
    }
    command = [f"{bin_folder}/msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}"]
    command += ["--join=True", f"--log_dir={folder / 'log'}", str(FOLDER / script), str(folder), *words]
    # In PyNative the scheduler may end with 1 though both workers are right, so the files tell.
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_two_processes_with_split_data_equal_one(kit, tmp_path, monkeypatch):
    assert kit.name == "mindspore"  # it has set the device of this process
    two = under_msrun("sparse_processes.py", tmp_path)
    assert (tmp_path / "2-1.npz").exists(), two.stdout[-2000:] + two.stderr[-2000:]
    first, second = (dict(np.load(tmp_path / f"2-{rank}.npz")) for rank in range(2))
    assert first["spread"] == second["spread"] > 0
    monkeypatch.setattr(processes, "SECONDS_PER_CALL", processes.SECONDS_PER_CALL)  # put back what the run changes
    monkeypatch.setattr(processes, "BYTES_PER_SECOND", processes.BYTES_PER_SECOND)
    single = sparse_processes.run(0, 1)
    assert single.keys() == first.keys() - {"spread"}
    for name in single:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)  # one model, to the bit
        if "/masks/" in name:
            # Sums in another order differ in their last bits, so only entries that nearly tie may change sides.
            assert (first[name] != single[name]).mean() <= 0.01, name
        else:
            np.testing.assert_allclose(first[name], single[name], atol=1e-3, rtol=1e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_two_workers_write_the_bytes_of_one_and_end_what_one_began(kit, tmp_path, monkeypatch):
    from slimkit_ms.sparse.checkpoint import CheckpointCells
    from tests.only_ms import stacks_ms, walked_workers
    from tests.only_ms.test_sparse_checkpoint_ms import saved, tree

    assert kit.name == "mindspore"  # it has set the device of this process
    saved(stacks_ms.filled(stacks_ms.Stack()), tmp_path / "src", "map")
    for case in walked_workers.CASES:
        report = walked_workers.walk(tmp_path, case)
        assert case != "block" or max(row["passes"] for row in report["layers"].values()) > 0
    alone = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    write = CheckpointCells._write

    def stop(self, index, *rest):
        write(self, index, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointCells, "_write", stop)
        walked_workers.walk(tmp_path, "par")
    two = under_msrun("walked_workers.py", tmp_path, ",".join(walked_workers.CASES))
    assert (tmp_path / "done-1").exists(), two.stdout[-2000:] + two.stderr[-2000:]
    assert tree(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_a_killed_worker_takes_the_other_down_and_the_same_command_goes_on(kit, tmp_path):
    from tests.only_ms import stacks_ms, walked_workers
    from tests.only_ms.test_sparse_checkpoint_ms import saved, tree

    assert kit.name == "mindspore"  # it has set the device of this process
    saved(stacks_ms.filled(stacks_ms.Stack()), tmp_path / "src", "map")
    walked_workers.walk(tmp_path, "par")
    alone = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    under_msrun("walked_workers.py", tmp_path, "par", "1")
    assert time.time() - float((tmp_path / "killed").read_text()) < 60  # and so no worker is left
    state = tmp_path / "out" / "par" / ".slimkit-sparse"
    assert (state / "block-00000.json").exists()
    assert not list(tmp_path.glob("done-*"))
    two = under_msrun("walked_workers.py", tmp_path, "par")
    assert (tmp_path / "done-1").exists(), two.stdout[-2000:] + two.stderr[-2000:]
    assert tree(tmp_path / "out") == alone
