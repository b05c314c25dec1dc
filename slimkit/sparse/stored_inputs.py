"""What every batch gives the blocks of a model of which one block is in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import traffic
from slimkit.core.batch import Call
from slimkit.core.errors import UnsupportedError
from slimkit.replay import replaying
from slimkit.sparse.inputs import HIDDEN, BlockInputs, Enough, Others
from slimkit.sparse.residual import input_of

import torch


class Spilled:
    """Tensors by number that lie in files, and in memory only while one is used.

    Args:
        folder: where; made if need be. Scratch: nothing here outlives a killed run.
        name: how the files' names begin.
        numbers: the number in each tensor's file name: other processes have other numbers in the same folder.
    """

    def __init__(self, folder: Path, name: str, numbers: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._numbers = folder, name, numbers

    def _file(self, index: int) -> Path:
        return self._folder / f"{self._name}-{self._numbers[index]:06d}"

    def __getitem__(self, index: int) -> torch.Tensor:
        return _load(self._file(index))["x"]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        _save(self._file(index), {"x": value.detach().clone().contiguous()})


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    raw = file.read_bytes()
    traffic.read(file, len(raw))
    return load(raw)


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file)
    traffic.wrote(file.stat().st_size)


class StoredInputs(BlockInputs):
    """What this process's batches give every block: hidden states out of the device's memory, the other arguments in.

    Args:
        blocks: the blocks' paths, a chain.
        numbers: the number of each of this process's batches among all.
        valid: which tokens of each are no padding.
        paired: keep the hidden states of the dense model too.
        folder: scratch for the hidden states; None keeps them in main memory.
        device: where blocks compute.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        numbers: Sequence[int],
        valid: Sequence[torch.Tensor | None],
        paired: bool,
        folder: Path | None,
        device: torch.device,
    ) -> None:
        super().__init__(blocks)
        self.valid, self.paired, self._numbers, self._device = list(valid), paired, numbers, device
        self.wraps = False  # whether blocks give a tuple
        self._dense_others = self._others  # what comes before the blocks is dense in both
        self._hidden = {}
        for dense in (False, True) if paired else (False,):
            name = "dense" if dense else "sparse"
            self._hidden[dense] = {} if folder is None else Spilled(folder, name, numbers)
        self._aims = {} if folder is None else Spilled(folder, "aim", numbers)

    def capture_stubs(self, model: torch.nn.Module, calls: Sequence[Call]) -> None:
        """Note how a model calls its blocks, of which only the first is in memory: the others pass their input on.

        Args:
            model: the model, ready to run up to and including its first block.
            calls: the batches.
        """
        blocks = self._blocks
        modules = {b: bridge.get_module(model, b) for b in blocks}

        def look(_path: str, _args: Any, _kwargs: Any, output: Any) -> None:
            self.wraps = isinstance(output, (tuple, list))
            raise Enough

        for call in calls[:1]:
            head = bridge.hooked({blocks[0]: modules[blocks[0]]}, look)
            with replaying(model) as run, head, contextlib.suppress(Enough):
                run(call)
        for index, call in enumerate(calls):
            others: Others = {}
            first: list[torch.Tensor] = []

            def stub(path: str, *args: Any, **kwargs: Any) -> Any:
                x = input_of(args, kwargs)
                first.append(x)  # noqa: B023
                blank = {k: HIDDEN if v is x else v for k, v in kwargs.items()}
                others[path] = (tuple(HIDDEN if a is x else a for a in args), blank)  # noqa: B023
                if path == blocks[-1]:
                    raise Enough
                return (x,) if self.wraps else x

            try:
                for path, module in modules.items():
                    module.__dict__["forward"] = partial(stub, path)
                with replaying(model) as run, contextlib.suppress(Enough):
                    run(call)
            finally:
                for module in modules.values():
                    module.__dict__.pop("forward", None)
            if len(others) != len(blocks) or any(x is not first[0] for x in first):
                raise UnsupportedError("src must be a model whose blocks pass hidden states straight to the next.")
            self._others.append(others)
            for hidden in self._hidden.values():
                hidden[index] = first[0]

    def call(self, path: str, index: int, dense: bool = False) -> Any:
        """One batch's call of a block, on its device."""
        found: Call = super().call(path, index, dense)
        if self._device.type == "cpu":
            return found
        return Call(*bridge.to_device((found.args, found.kwargs), self._device))

    def dense_hidden(self, index: int) -> torch.Tensor:
        """The hidden states of the dense model as they stand, on the device."""
        return super().dense_hidden(index).to(self._device)

    def aim(self, index: int) -> torch.Tensor:
        """What training draws the block's output to, on the device."""
        return super().aim(index).to(self._device)

    def put_aim(self, index: int, aim: torch.Tensor) -> None:
        """Keep what training draws the block's output to."""
        super().put_aim(index, aim.detach().cpu())

    def put(self, index: int, hidden: torch.Tensor, dense: bool = False) -> None:
        """The hidden states that the next block gets."""
        super().put(index, hidden.detach().cpu(), dense)

    def hidden(self, index: int) -> torch.Tensor:
        """The hidden states of the sparse model as they stand."""
        found: torch.Tensor = self._hidden[False][index]
        return found

    def save(self, folder: Path) -> None:
        """Write the hidden states of every batch, one file each."""
        for index, number in enumerate(self._numbers):
            states = {"sparse": self._hidden[False][index].contiguous()}
            if self.paired:
                states["dense"] = self._hidden[True][index].contiguous()
            _save(folder / f"{number:06d}.safetensors", states)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, whatever the number of processes was."""
        for index, number in enumerate(self._numbers):
            found = _load(folder / f"{number:06d}.safetensors")
            self._hidden[False][index] = found["sparse"]
            if self.paired:
                self._hidden[True][index] = found["dense"]
