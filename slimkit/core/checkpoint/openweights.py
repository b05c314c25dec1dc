"""Finding and opening weight files: single files, sharded indexes, Hugging Face directories; paths are checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from slimkit.core import files
from slimkit.core.checkpoint.ckpt import Ckpt
from slimkit.core.checkpoint.weightfile import Safetensors, Sharded, Weights
from slimkit.core.errors import FileFormatError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Commands write the last one of a MindSpore model.
WHOLE = ("model.safetensors", "pytorch_model.bin", "model.ckpt")


def open_weights(path: files.PathLike, torch_reader: Callable[[Path], Weights], name: str = "path") -> Weights:
    """Open whatever holds weights: safetensors, .ckpt, a torch file, a sharded index, or a Hugging Face directory.

    Args:
        path: the file or folder.
        torch_reader: opens .pt .pth .pkl .bin files, which need PyTorch.
        name: the argument's name, for the message.

    Returns:
        The open weights; names and shapes are known, no value is read.

    Raises:
        FileFormatError: missing, damaged, or not what its name says.
        LinkPathError: a symbolic link, or an index that leads outside its folder.
    """
    found = locate(path, name)
    if not found.name.endswith(".json"):
        return _open_one(found, torch_reader)
    table = read_index(found)
    shards: dict[str, Weights] = {}
    try:
        for shard in shard_names(table):
            shards[shard] = _open_one(plain_file(found.parent / shard), torch_reader)
        return Sharded(found, shards, table)
    except BaseException:
        for opened in shards.values():
            opened.close()
        raise


def _open_one(path: Path, torch_reader: Callable[[Path], Weights]) -> Weights:
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix == ".ckpt":
        with open(path, "rb") as handle:
            # Some PyTorch trainers also write .ckpt: a zip, or a pickle of protocol 2 and up.
            if handle.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04"):
                return Ckpt(path)
    elif path.suffix not in (".pt", ".pth", ".pkl", ".bin"):
        raise FileFormatError(
            f"{path}: a weight file ends in .safetensors, .ckpt, .pt, .pth, .pkl, .bin or .index.json. "
            f"Received: {path.suffix or 'no ending'}"
        )
    return torch_reader(path)


def locate(path: files.PathLike, name: str = "weight_file_path") -> Path:
    """The file that holds or indexes the weights of a path, which may be a Hugging Face directory.

    Args:
        path: a file, or a folder with model.safetensors, pytorch_model.bin, the index of either, or model.ckpt.
        name: the argument's name, for the message.

    Returns:
        The file, as transformers chooses it: safetensors before .bin, a whole file before an index.

    Raises:
        FileFormatError: there is no such file.
        LinkPathError: it is a symbolic link that no Hugging Face cache made.
    """
    found = files.as_path(path, name)
    if found.is_dir():
        candidates = [found / n for n in (WHOLE[0], INDEXES[0], WHOLE[1], INDEXES[1], *WHOLE[2:])]
        whole = next((c for c in candidates if c.is_file() or c.is_symlink()), None)
        if whole is None:
            raise FileFormatError(
                f"{name} is a folder without {', '.join((*WHOLE, *INDEXES))}. Received: {str(found)!r}"
            )
        found = whole
    elif not (found.is_file() or found.is_symlink()):
        raise FileFormatError(
            f"{name} must be an existing file or folder. Received: {str(found)!r}{files.meant(found)}"
        )
    plain_file(found)
    return found


def plain_file(path: Path) -> Path:
    """A weight file as `files.readable_file` takes it: no symbolic link, save those that a Hugging Face cache is of."""
    return files.readable_file(path, "a weight file")


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a sharded index: tensor name -> file name, each a plain name beside the index."""
    index = files.read_json(plain_file(path), "the index")
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) and v for v in table.values()):
        raise FileFormatError(f"{path} holds no weight_map from tensor names to file names.")
    for name in dict.fromkeys(table.values()):
        if os.path.basename(name) != name or name in (".", "..") or "\0" in name or "\\" in name:
            raise FileFormatError(f"{path} names {name!r}, which leads outside its folder.")
    return table


def source_config(path: files.PathLike) -> dict[str, Any]:
    """What config.json beside a weight file says of the model, or nothing."""
    found = Path(path)
    config = (found if found.is_dir() else found.parent) / "config.json"
    if not config.is_file():
        return {}
    value = files.read_json(plain_file(config), "config.json")
    return value if isinstance(value, dict) else {}


def base_config(config: Mapping[str, Any] | files.PathLike | None, name: str = "config") -> dict[str, Any]:
    """What is known of a base: a mapping, a Hugging Face folder or its config.json, or nothing.

    Args:
        config: one of these.
        name: the argument's name, for the message.

    Raises:
        FileFormatError: the file is missing, damaged, or no JSON object.
    """
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    path = files.as_path(config, name)
    found = files.read_json(path / "config.json" if path.is_dir() else path, "config.json")
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} is not a JSON object.")
    return found


def shard_names(table: Mapping[str, str]) -> list[str]:
    """The files of a weight map, each once, in order."""
    return list(dict.fromkeys(table.values()))


def refuse_torch(path: Path) -> NoReturn:
    """The reader of torch files where PyTorch is not used."""
    raise FileFormatError(
        f"{path} is a PyTorch file; MindSpore reads .ckpt and .safetensors. convert_checkpoint makes one of the other."
    )
