"""The one block of a stored model whose weights are on the device, and its dense twin."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import traffic
from slimkit.core.checkpoint import shards
from slimkit.stored import StoredModel, fill, held, read_place, stored_dtype, to_meta, write_tensors

import torch


class StoredBlocks:
    """Loads a block, and lets it go.

    Args:
        stored: the model and its files.
        device: where a block computes. On another device than the CPU the next block is read into main memory by a
            thread while this one is worked on.
        scratch: a folder of this process's own, for what a block's weights were before they changed.
    """

    def __init__(self, stored: StoredModel, device: torch.device, scratch: Path) -> None:
        self._stored, self._device, self._scratch = stored, device, scratch
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[str, Callable[[], dict[str, torch.Tensor]]] | None = None
        self._before: dict[str, Path] = {}  # parameter that has changed -> where its values before that are
        self._twin_parts: list[tuple[torch.nn.Module, str]] = []  # of the dense twin, on the device now

    def load(self, path: str, following: str | None = None) -> torch.nn.Module:
        """Give a block its weights; begin to read the one that follows."""
        block = bridge.get_module(self._stored.model, path)
        values = self._taken(path)
        for name in list(values):
            values[name] = values[name].to(self._device)  # one by one: the last need not be in both memories
        fill(block, path, values)
        self._move_buffers(block, self._device)
        if following is not None and self._device.type != "cpu":
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "slimkit-reader")
            context = contextvars.copy_context()  # whoever counts what is read counts this, too
            self._ahead = following, self._reader.submit(context.run, self._read, following).result
        return block

    @contextlib.contextmanager
    def looked_at(self, path: str) -> Iterator[None]:
        """Have a block's weights in main memory; they stay there until a block is loaded, which may be this one."""
        block = bridge.get_module(self._stored.model, path)
        values = self._taken(path)
        fill(block, path, values)
        try:
            yield
        finally:
            to_meta(block)
        self._ahead = path, lambda: values

    def _taken(self, path: str) -> dict[str, torch.Tensor]:
        """A block's weights, read now or ahead."""
        ahead, self._ahead = self._ahead, None
        return ahead[1]() if ahead is not None and ahead[0] == path else self._read(path)

    def release(self, path: str) -> None:
        """Let a block's weights go."""
        block = bridge.get_module(self._stored.model, path)
        to_meta(block)
        self._move_buffers(block, torch.device("cpu"))
        self._before.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def keep(self, name: str) -> None:
        """Note a parameter's values, which are about to change: the files are read once."""
        value = held(self._stored.model, name).detach().cpu()
        value = value.to(stored_dtype(self._stored.places[self._stored.keys(name)[0]])).contiguous()
        self._scratch.mkdir(parents=True, exist_ok=True)
        file = self._scratch / f"{len(self._before):06d}"
        with open(file, "wb") as handle:
            write_tensors(handle, {"x": value})
            traffic.wrote(handle.tell())
        self._before[name] = file

    def _kept(self, name: str) -> torch.Tensor:
        value = read_place(shards.header(self._before[name])["x"])
        return value if self._stored.compute is None else value.to(self._stored.compute)

    def close(self) -> None:
        """No block will follow."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._reader, self._ahead = None, None

    def _read(self, path: str) -> dict[str, torch.Tensor]:
        block = bridge.get_module(self._stored.model, path)
        return self._stored.read(f"{path}.{n}" for n, _ in block.named_parameters())

    @staticmethod
    def _move_buffers(block: torch.nn.Module, device: torch.device) -> None:
        for module in block.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    @staticmethod
    def twin(block: torch.nn.Module) -> torch.nn.Module:
        """A copy of a block whose weights are shapes only."""
        meta = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), False) for p in block.parameters()}
        return copy.deepcopy(block, meta)

    @contextlib.contextmanager
    def lent(
        self, path: str, block: torch.nn.Module, dense: torch.nn.Module | None, changed: Collection[str]
    ) -> Iterator[None]:
        """Give a block's dense twin its weights: the block's own where they have not changed, else those kept.

        On a device other than the CPU the latter come module by module, each for its call only: two blocks need not
        be there at once.
        """
        if dense is None:
            yield
            return
        own = {f"{path}.{n}": p for n, p in block.named_parameters()}
        read = {n: self._kept(n) for n in own if n in changed}
        same = {n: p for n, p in own.items() if n not in changed}
        hooks = []
        try:
            if self._device.type == "cpu":
                fill(dense, path, same | read)
            else:
                fill(dense, path, same)
                parts: dict[str, dict[str, torch.Tensor]] = {}
                for name, value in read.items():
                    owner, _, key = name[len(path) + 1 :].rpartition(".")
                    parts.setdefault(owner, {})[key] = value
                for owner, values in parts.items():
                    module = bridge.get_module(dense, owner)
                    hooks.append(module.register_forward_pre_hook(partial(self._bring, values), prepend=True))
                    hooks.append(module.register_forward_hook(lambda *_: self._take(), always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._take()
            to_meta(dense)

    def _bring(self, values: dict[str, torch.Tensor], module: torch.nn.Module, _args: Any) -> None:
        self._take()  # a forward that ended early has left its last one
        for key, value in values.items():
            module._parameters[key] = torch.nn.Parameter(value.to(self._device), False)
            self._twin_parts.append((module, key))

    def _take(self) -> None:
        for module, key in self._twin_parts:
            module._parameters[key] = torch.nn.Parameter(torch.empty_like(held(module, key), device="meta"), False)
        self._twin_parts.clear()
