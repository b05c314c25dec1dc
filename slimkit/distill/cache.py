"""The teacher cache for PyTorch: how the teacher answers, and tensors to arrays and back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core.batch import Call
from slimkit.core.distill.config import SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.distill.teacher_cache import TeacherFiles
from slimkit.distill import taps
from slimkit.replay import replaying

import torch


class TeacherCache(TeacherFiles):
    """A teacher's answers on disk, to be distilled from without the teacher in memory.

    Args:
        directory: a folder that `TeacherCache.build` finished.

    Example:
        >>> import tempfile
        >>> from slimkit.core.distill.config import KnowledgeDistillConfig
        >>> config = KnowledgeDistillConfig().add_output_soft_label({
        ...     "t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDMse", "func_weight": 1}]})
        >>> batches, folder = [torch.ones(2, 3)], tempfile.mkdtemp()
        >>> cache = TeacherCache.build(torch.nn.Linear(3, 4), batches, config, folder)
        >>> tuple(cache.lookup((batches[0],), {})[1][0].shape)
        (2, 4)
    """

    @staticmethod
    def _numpy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    @staticmethod
    def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(array).to(like.device)

    @staticmethod
    def _digest(teacher: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in bridge.check_model(teacher, "teacher").state_dict().items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    @contextlib.contextmanager
    def _answering(teacher: torch.nn.Module, labels: tuple[SoftLabel, ...]) -> Iterator[Callable[..., Any]]:
        store = taps.Store()

        def answer(args: Any, kwargs: Any) -> list[np.ndarray]:
            device = bridge.device_of(teacher)
            store.listening, store.seen = True, {}
            output = run(Call(bridge.to_device(args, device), bridge.to_device(kwargs, device)))
            store.listening = False
            found = [
                store.seen[place] if label.t_module else pick(output, label.t_output_idx, "teacher")
                for place, label in enumerate(labels)
            ]
            return [tensor.float().cpu().numpy() for tensor in found]

        taps.attach(teacher, store, labels, "t")
        try:
            with replaying(teacher) as run:
                yield answer
        finally:
            taps.detach(teacher, store)
