"""A third device for tests, called npu: PyTorch's open slot, filled by device.cpp or merely renamed."""

from __future__ import annotations

import shutil
import types
from pathlib import Path
from typing import Any


def missing_tool() -> str | None:
    """What building needs and this machine lacks; None when it can be built."""
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None:
            return f"building the device needs {tool}, which is not installed"
    return None


def rename() -> None:
    """Call PyTorch's open device slot npu, as torch_npu does, with nothing behind it."""
    import torch

    torch.utils.rename_privateuse1_backend("npu")


def build() -> Any:
    """Compile device.cpp (about half a minute; PyTorch keeps the result) and load it into this process, for good."""
    import torch
    from torch.utils import cpp_extension

    source = str(Path(__file__).parent / "device.cpp")
    device = cpp_extension.load(name="slimkit_fake_npu", sources=[source], extra_cflags=["-O0"])
    rename()
    # The Python side of a device, as torch.cuda is CUDA's.
    module = types.ModuleType("torch.npu")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    torch._register_device_module("npu", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return device
