"""The teacher cache for MindSpore: how the teacher answers, and tensors to arrays and back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slimkit.core.batch import Call
from slimkit.core.distill.config import SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.distill.teacher_cache import TeacherFiles
from slimkit_ms import bridge
from slimkit_ms.distill import taps
from slimkit_ms.replay import replaying

import mindspore as ms
from mindspore import nn


class TeacherCache(TeacherFiles):
    """A teacher's answers on disk, to be distilled from (in PyNative) without the teacher in memory.

    Args:
        directory: a folder that `TeacherCache.build` finished.
    """

    @staticmethod
    def _numpy(value: Any) -> Any:
        if not isinstance(value, ms.Tensor):
            return value if isinstance(value, np.ndarray) else None
        return (value.astype(ms.float32) if value.dtype == ms.bfloat16 else value).asnumpy()

    @staticmethod
    def _tensor(array: np.ndarray, like: ms.Tensor) -> ms.Tensor:
        return ms.Tensor(array)

    @staticmethod
    def _digest(teacher: nn.Cell) -> str:
        digest = hashlib.sha256()
        for parameter in bridge.check_model(teacher, "teacher").get_parameters():
            digest.update(f"{parameter.name}{parameter.dtype}{tuple(parameter.shape)}".encode())
            digest.update(parameter.astype(ms.float32).asnumpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    @contextlib.contextmanager
    def _answering(teacher: nn.Cell, labels: tuple[SoftLabel, ...]) -> Iterator[Callable[..., Any]]:
        seen: dict[int, ms.Tensor] = {}
        wrapped = []

        def answer(args: Any, kwargs: Any) -> list[np.ndarray]:
            seen.clear()
            output = run(Call(args, kwargs))
            found = [
                seen[place] if label.t_module else pick(output, label.t_output_idx, "teacher")
                for place, label in enumerate(labels)
            ]
            return [bridge.as_numpy(tensor.astype(ms.float32)) for tensor in found]

        found = taps.children(labels, "t")
        with replaying(teacher) as run:
            try:
                for path in sorted(found, key=lambda p: -p.count(".")):
                    cell = taps.find(teacher, path, "t_module")
                    wants = [(place, label.t_side, label.t_output_idx, path) for place, label in found[path]]
                    taps.replace(teacher, path, taps.Noted(cell, wants, seen))
                    wrapped.append((path, cell))
                yield lambda calls: (answer(*call) for call in calls)
            finally:
                for path, cell in reversed(wrapped):
                    taps.replace(teacher, path, cell)
