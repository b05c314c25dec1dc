"""Fixtures of the whole suite: one `kit` per framework, seeds, and no network."""

from __future__ import annotations

import gc
import importlib.util
import os

# Set before any framework is imported: tests are offline, and idle threads must not spin on a small machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by file
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from slimkit.core import onnxfile
from slimkit.core.jobs import measurement
from tests import kits
from tests.fast import is_fast
from tests.order import longest_first

# Timing a model takes half a second, and two files two: where speed is not what is tested, a few calls say as much.
measurement.fastest_ms = lambda calls, budget_s, timed=measurement.fastest_ms: timed(calls, budget_s / 50)
onnxfile.onnx_latency.__defaults__ = (0.05,)

INSTALLED = [name for name in kits.KITS if importlib.util.find_spec(name)]
_made: dict[str, object] = {}


@pytest.fixture(params=INSTALLED, scope="session")
def kit(request):
    """One framework behind the common face of tests/kits.py; the test runs once for each that is installed."""
    if request.param not in _made:
        _made[request.param] = kits.make(request.param)
    return _made[request.param]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes in one thread: a fork is only safe so, and the number of threads belongs to a job's identity."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeds():
    np.random.seed(0)
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "mindspore" in sys.modules:
        sys.modules["mindspore"].set_seed(0)


def pytest_collection_modifyitems(items):
    """Folders named after a framework need it; a run without it leaves them out and says so in the header.

    Files that take long are begun first, so that two workers end together.
    """
    for item in items:
        if is_fast(item.path.parent.name, item.path.name, getattr(item, "originalname", item.name)):
            item.add_marker("fast")
    missing = [folder for folder, name in (("only_torch", "torch"), ("only_ms", "mindspore")) if name not in INSTALLED]
    items[:] = [item for item in items if not any(folder in item.path.parts for folder in missing)]
    items[:] = [items[at] for at in longest_first(["/".join(item.path.parts[-2:]) for item in items])]


def pytest_collection_finish():
    """What collecting imported stays: MindSpore collects garbage before each compilation, and need not look there."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    return f"frameworks: {', '.join(INSTALLED) or 'none'}"
