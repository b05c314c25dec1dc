"""The device that a command line names: the CPU, CUDA or an NPU, with a number or without."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os

from slimkit import bridge  # noqa: F401 - says in one line that torch is missing
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.device import parse_device

import torch


def choose_device(name: str | None) -> torch.device:
    """Make a device the one that models are opened on, trained and run on.

    Args:
        name: "cpu", "cuda" or "npu", with ":NUMBER" behind it or without; None: the CPU for everything but training,
            which goes where accelerate puts it.

    Returns:
        The device.

    Raises:
        ConfigError: it is none of these, or this machine has no such device.
    """
    if name is None:
        return torch.device("cpu")
    kind, number = parse_device(name)
    if kind == "cpu":
        # Otherwise accelerate would move training to the first accelerator that it finds.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return torch.device("cpu")
    if kind == "npu" and not hasattr(torch, "npu") and importlib.util.find_spec("torch_npu") is not None:
        # Without its CANN libraries it raises what the loader raises; what is missing is said below.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            importlib.import_module("torch_npu")
    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        more = "; torch_npu and CANN are needed" if kind == "npu" else ""
        raise ConfigError(f"--device {name}: this PyTorch finds no {kind} device here{more}")
    if number >= module.device_count():
        raise ConfigError(f"--device {name}: this machine has {module.device_count()} of them, counted from 0")
    torch.accelerator.set_device_index(number)  # where accelerate trains
    return torch.device(kind, number)
