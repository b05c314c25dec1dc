"""Weights of a MindSpore model that stay in their files, and what every batch gives its blocks, in files too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files, traffic
from slimkit.core.checkpoint import openweights
from slimkit.core.checkpoint.ckpt import Ckpt, stream_ckpt
from slimkit.core.checkpoint.weightfile import Safetensors, Sharded, Weights, decode, encode, stream_safetensors
from slimkit.core.convert.names import mapped
from slimkit.core.errors import PlanError, UnsupportedError
from slimkit.core.weights.names import pair_names
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]

# MindSpore's own index of a folder of .safetensors.
MAP = "param_name_map.json"
# A parameter's ending in a cell, and what files of other frameworks call it.
_ENDINGS = (("", ""), (".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight"))


def open_folder(source: Path) -> tuple[Weights, list[Path]]:
    """The weights of a file or folder, and the files that hold them.

    Args:
        source: a .safetensors or .ckpt file, or a folder with one, with Hugging Face's index or with MindSpore's
            param_name_map.json.
    """
    if source.is_dir() and (source / MAP).is_file():
        table = files.read_json(source / MAP)
        table = table.get("weight_map", table) if isinstance(table, dict) else {}
        shards: dict[str, Weights] = {}
        for name in sorted(set(map(str, table.values()))):
            shards[name] = Safetensors(files.readable_file(files.inside(source, name, "a shard's name"), "a shard"))
        return Sharded(source / MAP, shards, table), [shard.path for shard in shards.values()]
    found = openweights.open_weights(source, openweights.refuse_torch, "src")
    place = openweights.locate(source, "src")
    if place.suffix != ".json":
        return found, [place]
    names = openweights.shard_names(openweights.read_index(place))
    return found, sorted(place.parent / name for name in names)


class StoredCells:
    """Puts the values of files into cells, and gives them back in the types of the files.

    Args:
        weights: the files, open.
        names: parameter name -> tensor name; or a map as `convert_checkpoint` takes it, from the files' names to the
            cells'; or None.
    """

    def __init__(self, weights: Weights, names: Callable[[str], str] | Mapping[str, str] | None) -> None:
        self.weights, self._told = weights, names if callable(names) else None
        self._pairs: dict[str, str] = {}
        self._files: dict[str, str] = {}  # what the map makes of a name -> the name
        for name, new in mapped(weights.entries, None if callable(names) else names).items():
            if new in self._files:
                raise PlanError(f"names: {self._files[new]!r} and {name!r} of src would both become {new!r}.")
            self._files[new] = name

    def pair(self, parameters: Iterable[str]) -> None:
        """Find the tensors of parameters, all of the model's that will be asked for: by the rules of `convert`."""
        self._pairs = {ours: self._files[theirs] for ours, theirs in pair_names(parameters, self._files).items()}

    def key(self, name: str) -> str:
        """The tensor of the files that a parameter is.

        Raises:
            UnsupportedError: there is none.
        """
        if self._told is None:
            if name in self._pairs:
                return self._pairs[name]
        else:
            name = self._told(name)
            for ours, theirs in _ENDINGS:
                if name.endswith(ours) and name.removesuffix(ours) + theirs in self.weights.entries:
                    return name.removesuffix(ours) + theirs
        raise UnsupportedError(f"src must hold a tensor for {name!r}; pass `names` for files that name it otherwise.")

    def fill(self, cell: nn.Cell, path: str) -> nn.Cell:
        """Give a cell that `build` made for a path its values, in place."""
        for parameter, places in bridge.parameter_paths(cell):
            name = f"{path}.{places[0]}" if path else places[0]
            key = self.key(name)
            values = self.weights.read(key)
            if tuple(values.shape) != tuple(parameter.shape):
                raise UnsupportedError(
                    f"build({path!r}) must make {places[0]!r} of shape {tuple(values.shape)}, as src holds it. "
                    f"Received: {tuple(parameter.shape)}"
                )
            parameter.set_data(ms.Tensor(np.ascontiguousarray(values, np.float32)).astype(parameter.dtype))
        return cell

    def rounded(self, name: str, parameter: ms.Parameter) -> Array:
        """A parameter's values as the files will hold them, stored."""
        values = parameter.astype(ms.float32).asnumpy()
        return encode(values, self.weights.entries[self.key(name)].dtype)

    def round(self, name: str, parameter: ms.Parameter) -> None:
        """Leave in a parameter what the files will hold, in place."""
        dtype = self.weights.entries[self.key(name)].dtype
        if dtype in ("F16", "BF16"):
            values = decode(self.rounded(name, parameter), dtype).astype(np.float32)
            parameter.set_data(ms.Tensor(values).astype(parameter.dtype))

    def rewrite(self, file: Path, target: Path, replaced: Mapping[str, Path]) -> None:
        """Write a file of weights anew, tensor by tensor, with some taken from other files."""
        with Ckpt(file) if file.suffix == ".ckpt" else Safetensors(file) as old:

            def tensors() -> Iterator[tuple[str, Any]]:
                for name in old.entries:
                    if name not in replaced:
                        yield name, old.piece(name)
                        continue
                    with Safetensors(replaced[name]) as other:
                        yield name, other.raw(name)

            if file.suffix == ".ckpt":
                stream_ckpt(target, old.entries, tensors(), old.values)
            else:
                stream_safetensors(target, old.entries, tensors(), old.metadata)

    def save(self, file: Path, parameters: Mapping[str, ms.Parameter]) -> None:
        """Write parameters, by their whole names, in the types of the files."""
        keys = {self.key(name): (name, parameter) for name, parameter in parameters.items()}
        entries = {key: self.weights.entries[key] for key in keys}
        stream_safetensors(file, entries, ((key, self.rounded(*found)) for key, found in keys.items()))


class _Spilled:
    """Hidden states of batches by number, in files named by the batches' numbers among those of all processes."""

    def __init__(self, folder: Path, name: str, numbers: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._numbers = folder, name, numbers

    def _file(self, index: int) -> Path:
        return self._folder / f"{self._name}-{self._numbers[index]:06d}.npy"

    def __getitem__(self, index: int) -> ms.Tensor:
        values = np.load(self._file(index))
        traffic.read(self._file(index), values.nbytes)
        return ms.Tensor(values)

    def __setitem__(self, index: int, value: ms.Tensor) -> None:
        values = bridge.as_numpy(value)
        np.save(self._file(index), values)
        traffic.wrote(values.nbytes)


class StoredChain:
    """What every batch gives every block: hidden states, which move on, and what the stem gives besides.

    Args:
        folder: scratch.
        numbers: the number of each of this process's batches among all.
        paired: keep the hidden states of the dense model too.

    Attributes:
        aims: number -> what training draws a block's output to.
    """

    def __init__(self, folder: Path, numbers: Sequence[int], paired: bool) -> None:
        self.valid: list[Array | None] = []
        self._others: list[tuple[Any, ...]] = []
        self._numbers = numbers
        kinds = (False, True) if paired else (False,)
        self.hidden: dict[bool, Any] = {k: _Spilled(folder, "dense" if k else "sparse", numbers) for k in kinds}
        self.aims: Any = _Spilled(folder, "aim", numbers)

    def add(self, valid: Array | None, hidden: ms.Tensor, others: tuple[Any, ...]) -> None:
        """A batch, as it enters the first block."""
        for kept in self.hidden.values():
            kept[len(self.valid)] = hidden
        self.valid.append(valid)
        self._others.append(others)

    def call(self, path: str, index: int, dense: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One batch's call of a block."""
        return (self.hidden[dense and True in self.hidden][index], *self._others[index]), {}

    def save(self, folder: Path) -> None:
        """Write the hidden states of every batch, one file each."""
        for index, number in enumerate(self._numbers):
            found = {"dense" if k else "sparse": bridge.as_numpy(kept[index]) for k, kept in self.hidden.items()}
            files.write_tensors(folder / f"{number:06d}.safetensors", found)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, whatever the number of processes was."""
        for index, number in enumerate(self._numbers):
            found, _ = files.read_tensors(folder / f"{number:06d}.safetensors")
            for k, kept in self.hidden.items():
                kept[index] = ms.Tensor(found["dense" if k else "sparse"])
