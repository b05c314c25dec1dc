"""The command under torchrun: what stops it says one line and leaves what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.only_torch.test_sparse_checkpoint import build
from tests.only_torch.test_sparse_processes import free_port

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="children are read from Linux's list"),
    pytest.mark.skipif(int(os.environ.get("SLIMKIT_KILLS", "2")) <= 2, reason="minutes of imports: SLIMKIT_KILLS=20"),
]


@pytest.mark.parametrize(("who", "number"), [("torchrun", signal.SIGTERM), ("rank", signal.SIGKILL)])
def test_one_line_says_what_stopped_it_and_the_same_command_goes_on(who, number, tmp_path):
    build("llama").save_pretrained(tmp_path / "src", max_shard_size="30KB")
    np.savez(tmp_path / "x.npz", input_ids=np.random.default_rng(0).integers(0, 64, (320, 16)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "slimkit", "sparsify", "--model", str(tmp_path / "src"), "--calib", str(tmp_path / "x.npz")]
    command += ["--method", "hessian", "--out", str(tmp_path / "out")]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(command, stderr=said, stdout=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        began = time.monotonic()
        while not (tmp_path / "out" / ".slimkit-sparse" / "block-00000.json").exists():
            assert job.poll() is None, (tmp_path / "said").read_text()[-2000:]
            assert time.monotonic() - began < 300
            time.sleep(0.01)
        victim = job.pid
        if who == "rank":
            with open(f"/proc/{job.pid}/task/{job.pid}/children") as children:
                victim = int(children.read().split()[-1])
        stopped = time.monotonic()
        os.kill(victim, number)
        assert job.wait(120) != 0
        assert time.monotonic() - stopped < 60  # torchrun itself ends after its processes
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("slimkit: ")]
    assert len(lines) == 1, lines
    assert "the same command goes on" in lines[0]
    assert (tmp_path / "out" / ".slimkit-sparse" / "block-00000.json").exists()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
