"""Scripts run in processes of their own that find the frameworks imported: importing them takes seconds each."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What these import when they are first used is named too: every script would pay for it again.
FRAMEWORKS = (
    "numpy", "scipy.optimize", "torch", "torch.fx", "torch._dynamo", "torch.onnx.utils", "torch.optim",
    "transformers", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "onnx", "onnxruntime", "mindspore",
)  # fmt: skip


class Imported:
    """A process with the frameworks imported and nothing of slimkit; every script runs in a fork of it."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, script: Path, cwd: Path) -> tuple[int, str]:
        """Run a script; returns its exit code, and what it wrote to its standard streams."""
        said = cwd / f"{script.stem}.log"
        print(json.dumps([str(script), str(cwd), str(said)]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, said.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


def _serve() -> None:
    for name in FRAMEWORKS:
        try:
            __import__(name)
        except ImportError:
            pass  # the tests say which blocks run without it
    for line in sys.stdin:
        script, cwd, said = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(script, cwd, said)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(script: str, cwd: str, said: str) -> None:
    """Does not return."""
    os.chdir(cwd)
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv, code = [script], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001  (a page may fail in any way)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
