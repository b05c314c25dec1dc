"""A device that is neither the CPU nor CUDA: the paths an NPU would take, on an open-registered device named npu."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.only_torch import fake_npu

ROOT = Path(__file__).parents[2]
SCENARIOS = Path(fake_npu.__file__).with_name("scenarios.py")


def names():
    """The scenarios, read from the source: importing them would import torch's extension into this process."""
    for node in ast.parse(SCENARIOS.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "SCENARIOS":
            return [element.id for element in node.value.elts]
    raise AssertionError("scenarios.py has no list SCENARIOS")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """scenario -> how it ended; all in one process, because a device once registered stays in it."""
    if (why := fake_npu.missing_tool()) is not None:
        pytest.skip(why)
    done = python("-m", "tests.only_torch.fake_npu.scenarios")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", names())
def test_on_a_third_device(found, scenario):
    assert found[scenario] is None, found[scenario]


def test_a_device_without_kernels_leaves_cpu_work_alone():
    code = """
        from tests.only_torch import fake_npu
        fake_npu.rename()
        import torch, slimkit
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        x = torch.randn(64, 8)
        slimkit.Compressor(net, slimkit.SparseConfig(method="hessian", min_tokens=1)).compress([x])
        print(torch.device("npu"), next(net.parameters()).device, slimkit.Pruner(net, x).prune(0.9)["version"])
        try:
            net.to("npu")
        except Exception as error:
            print("refused:", type(error).__name__)
    """
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("npu cpu 1")
    assert "refused:" in done.stdout


@pytest.fixture
def broken_torch_npu(tmp_path):
    """An installed torch_npu whose libraries are missing: torch's autoload finds its entry point and fails."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    about = tmp_path / "torch_npu-2.13.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (about / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def test_a_torch_npu_without_its_libraries_breaks_neither_import_nor_cpu_work(broken_torch_npu):
    path = f"{broken_torch_npu}{os.pathsep}{ROOT}"
    plain = python("-c", "import torch", PYTHONPATH=path)
    assert plain.returncode != 0, "the broken package must break torch itself, or the test shows nothing"
    code = "import slimkit; slimkit.SparseConfig; slimkit.Pruner; import torch; print(torch.ones(2).sum())"
    done = python("-c", code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "tensor(2.)" in done.stdout
    assert "working without an NPU" in done.stderr
