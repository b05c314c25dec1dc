"""When a training run saves a checkpoint, how the file is called, and which files stay."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.checkpoint import manifest
from slimkit.core.errors import ArgumentError
from slimkit.core.showing import Shown


@dataclass(frozen=True)
class CheckpointConfig(Shown):
    """When a checkpoint is saved, and which stay; the words and defaults of MindSpore's class of that name.

    Args:
        save_checkpoint_steps: save every so many steps; 0 leaves it to the seconds.
        save_checkpoint_seconds: save when so many seconds have passed; read only where the steps are 0.
        keep_checkpoint_max: so many files stay, the newest; 0 keeps all, or leaves it to the minutes.
        keep_checkpoint_per_n_minutes: one file of every so many minutes stays; read only where the maximum is 0.
        async_save: write in the background.
        saved_network: save this module's parameters instead of the trained model's.
        append_info: numbers and strings to save along; "epoch_num" and "step_num" in a list ask for the current ones.
        format: "safetensors" or "pt".

    Example:
        >>> CheckpointConfig(save_checkpoint_steps=100, keep_checkpoint_max=2).format
        'safetensors'
    """

    save_checkpoint_steps: int = 1
    save_checkpoint_seconds: int = 0
    keep_checkpoint_max: int = 5
    keep_checkpoint_per_n_minutes: int = 0
    async_save: bool = False
    saved_network: Any = None
    append_info: Any = None
    format: str = "safetensors"

    def __post_init__(self) -> None:
        for name in ("save_checkpoint_steps", "save_checkpoint_seconds"):
            check.integer(getattr(self, name), name, minimum=0)
        for name in ("keep_checkpoint_max", "keep_checkpoint_per_n_minutes"):
            check.integer(getattr(self, name), name, minimum=0)
        if not self.save_checkpoint_steps and not self.save_checkpoint_seconds:
            raise ArgumentError("save_checkpoint_steps and save_checkpoint_seconds must not both be 0.")
        check.boolean(self.async_save, "async_save")
        check.choice(self.format, ("safetensors", "pt"), "format")
        appended(self.append_info)


def appended(append_info: Any) -> dict[str, Any]:
    """`append_info` as a dict: None, a dict, or a list of "epoch_num", "step_num" and at most one dict."""
    found: dict[str, Any] = {}
    for item in append_info if isinstance(append_info, (list, tuple)) else [append_info] if append_info else []:
        if isinstance(item, Mapping):
            found.update(item)
        else:
            found[check.choice(item, ("epoch_num", "step_num"), "append_info")] = 0
    return found


class SavePolicy:
    """Decides at each step whether to save, names the file, and removes the files that are not to stay.

    Args:
        folder: where the files lie.
        prefix: how their names begin; a number is added where another run has used it.
        ending: ".ckpt", ".safetensors" or ".pt".
        steps, seconds, keep_max, keep_minutes: as in `CheckpointConfig`.
    """

    def __init__(
        self, folder: Path, prefix: str, ending: str, steps: int, seconds: int, keep_max: int, keep_minutes: int
    ) -> None:
        self.folder, self.ending = folder, ending
        self._steps, self._seconds = steps or 0, seconds or 0
        self._keep_max, self._keep_minutes = keep_max or 0, keep_minutes or 0
        self.last_step = 0
        self._gone: list[Path] = []
        self._last_time = self._last_kept = time.time()
        self.prefix = self._free(prefix)

    @classmethod
    def of(cls, directory: Any, prefix: Any, config: Any) -> SavePolicy:
        """The policy of a `CheckpointConfig` of slimkit or MindSpore, once directory and prefix are checked."""
        folder = files.save_directory(directory)
        if "/" in check.text(prefix, "prefix"):
            check.wrong_value("prefix", "a name without '/'", prefix)
        folder.mkdir(parents=True, exist_ok=True)
        steps, seconds = config.save_checkpoint_steps, config.save_checkpoint_seconds
        keep, minutes = config.keep_checkpoint_max, config.keep_checkpoint_per_n_minutes
        return cls(folder, prefix, f".{config.format}", steps, seconds, keep, minutes)

    def _free(self, prefix: str) -> str:
        """The prefix, or prefix_1, prefix_2 ... when files of an earlier run lie in the folder."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        for number in range(1 << 20):
            candidate = f"{prefix}_{number}" if number else prefix
            if not any(self._pattern(candidate).fullmatch(n) for n in names):
                return candidate
        raise ArgumentError(f"prefix {prefix!r} is used up in {str(self.folder)!r}.")

    def _pattern(self, prefix: str) -> re.Pattern[str]:
        return re.compile(re.escape(prefix) + r"-\d+_\d+" + re.escape(self.ending))

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether to save at this step (counted from 1 over the whole training); the last one is always saved."""
        if step == self.last_step:
            return False
        if self._steps:
            return last or step >= self.last_step + self._steps
        return last or time.time() - self._last_time > self._seconds

    def next_file(self, epoch: int, step_in_epoch: int, step: int) -> Path:
        """The file of this save; `tidy` removes the older ones that need not stay when it is written."""
        own = self._pattern(self.prefix)
        now = time.time()
        kept = [self.folder / n for n in os.listdir(self.folder) if own.fullmatch(n)] if self.folder.is_dir() else []
        kept.sort(key=lambda p: (p.stat().st_mtime, p.name))
        self._gone = []
        if self._keep_max:
            self._gone = kept[: max(0, len(kept) + 1 - self._keep_max)]
        elif self._keep_minutes and now - self._last_kept < self._keep_minutes * 60:
            # Of the files younger than the window only the oldest stays.
            self._gone = [p for p in kept if now - p.stat().st_mtime < self._keep_minutes * 60][1:]
        self.last_step, self._last_time, self._last_kept = step, now, now
        return self.folder / f"{self.prefix}-{epoch}_{step_in_epoch}{self.ending}"

    def tidy(self) -> None:
        """Remove the files that need not stay, once the new one is there: a kill in between leaves one too many."""
        for old in self._gone:
            manifest.forget(old)
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
        self._gone = []
