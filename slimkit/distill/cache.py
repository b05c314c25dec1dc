"""The teacher cache for PyTorch: how the teacher answers, and tensors to arrays and back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core import files
from slimkit.core.batch import Call
from slimkit.core.checkpoint import shards
from slimkit.core.distill.config import SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.distill.teacher_cache import TeacherFiles
from slimkit.distill import taps
from slimkit.distill.stored_teacher import WALKED_TOGETHER, StoredTeacher
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
    def _digest(teacher: Any) -> str:
        digest = hashlib.sha256()
        if isinstance(teacher, (str, Path)):
            for file in TeacherCache._files(teacher):
                digest.update(f"{file.name}{files.digest_file(file)}".encode())
            return digest.hexdigest()
        for name, tensor in bridge.check_whole(teacher, "teacher").state_dict().items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _beside(teacher: Any) -> dict[str, Any]:
        config = Path(teacher) / "config.json" if isinstance(teacher, (str, Path)) else None
        return {"config": files.digest_file(config)} if config is not None and config.is_file() else {}

    @staticmethod
    def _files(teacher: Any) -> list[Path]:
        if not isinstance(teacher, (str, Path)):
            return []
        return sorted({place.file for place in shards.locate(Path(teacher)).values()})

    @staticmethod
    def _together(teacher: Any) -> int:
        # As many batches' hidden states are in memory while the folder is read once.
        return WALKED_TOGETHER if isinstance(teacher, (str, Path)) else 1

    @staticmethod
    @contextlib.contextmanager
    def _answering(teacher: Any, labels: tuple[SoftLabel, ...]) -> Iterator[Callable[..., Any]]:
        if isinstance(teacher, (str, Path)):
            yield StoredTeacher(Path(teacher), labels).answers
            return
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
                yield lambda calls: (answer(*call) for call in calls)
        finally:
            taps.detach(teacher, store)
