"""Adapters on the disk: PEFT's folder, MindFormers' checkpoint, Megatron's shards; values in their stored form."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint import saving
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.torchfile import TorchFile, restored
from slimkit.core.checkpoint.weightfile import Entry, Weights
from slimkit.core.delta import peft
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.lazy import imported

Array = np.ndarray[Any, Any]

RECORD = "slimkit_adapter.json"
FORMAT = "slimkit-adapter"
VERSION = 1
LAYOUTS = ("peft", "mindformers", "megatron")
MINDFORMERS_TENSORS = "adapter_model.ckpt"
MEGATRON_TENSORS = "model_optim_rng.pt"
ITERATION = "iter_0000001"
# What stands behind a matrix's name, for a and for b.
SUFFIXES = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "mindformers": (".mindpet_delta_lora_a", ".mindpet_delta_lora_b"),
    "megatron": (".lora_A.default.weight", ".lora_B.default.weight"),
}
# Words around a model that training leaves in its names.
_ROOTS = (peft.ROOT, "module.", "base_model.")


@dataclass
class Stored:
    """One adapter as its files hold it.

    Args:
        layout: a word of LAYOUTS.
        shards: for each process: name of a matrix -> its a and b, in their stored form.
        dtype: the element type's name in weight files.
        config: PEFT's configuration, where there is one.
        record: what slimkit noted when it wrote the files, or None.
        left: tensors that are no factors.
    """

    layout: str
    shards: list[dict[str, tuple[Array, Array]]]
    dtype: str
    config: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    left: list[str] = field(default_factory=list)


def _torch() -> Any:
    """PyTorch, only where Megatron's files are read or written."""
    return imported("torch")


def layout_of(folder: Path) -> str:
    """Which layout a folder or file holds.

    Raises:
        FileFormatError: none that slimkit knows.
    """
    if peft.is_adapter(folder) and not (folder / RECORD).exists():
        return "peft"
    peft.refuse_bundle(folder)
    if shard_files(folder):
        return "megatron"
    if _mindformers_file(folder) is not None:
        return "mindformers"
    raise FileFormatError(
        f"{folder} holds no adapter: neither {peft.CONFIG} nor mp_rank_00/{MEGATRON_TENSORS} nor a .ckpt or "
        f".safetensors file{files.meant(folder)}"
    )


def _mindformers_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".ckpt", ".safetensors") else None
    found = sorted(p for p in path.glob("*") if p.suffix in (".ckpt", ".safetensors")) if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def shard_files(folder: Path) -> list[Path]:
    """The files of a Megatron folder, or of its newest iteration, in the order of the processes.

    Raises:
        UnsupportedError: shards of pipeline or expert parallelism.
        FileFormatError: a shard is missing.
    """
    iterations = sorted(p for p in folder.glob("iter_*") if p.is_dir())
    place = iterations[-1] if iterations else folder
    found = sorted(p for p in place.glob("mp_rank_*") if p.is_dir())
    for path in found:
        if not re.fullmatch(r"mp_rank_\d\d", path.name):
            raise UnsupportedError(
                f"{path} is a shard of pipeline or expert parallelism; slimkit joins those of tensor parallelism. "
                "Convert the checkpoint to one pipeline stage first."
            )
    wanted = [place / f"mp_rank_{i:02d}" for i in range(len(found))]
    if found != wanted:
        raise FileFormatError(f"{place} must hold mp_rank_00 to mp_rank_{len(found) - 1:02d}. One is missing.")
    return [path / MEGATRON_TENSORS for path in found]


def read(path: files.PathLike) -> Stored:
    """Read an adapter of any layout.

    Raises:
        FileFormatError: a file is missing or damaged, or a factor lacks its other half.
        UnsupportedError: factors of several element types, or tensors that belong to no LoRA.
    """
    place = files.as_path(path, "src")
    layout = layout_of(place)
    record = _record(place)
    if record is not None and record["layout"] != layout:
        raise FileFormatError(f"{place / RECORD} speaks of {record['layout']}, the files are {layout}'s.")
    config = None
    if layout == "peft":
        config = files.read_json(place / peft.CONFIG, peft.CONFIG)
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise UnsupportedError(f"{place / peft.CONFIG} must be of a LoRA.")
        sources = [place / peft.TENSORS]
    elif layout == "megatron":
        sources = shard_files(place)
    else:
        sources = [_mindformers_file(place) or place]
    shards, left, types = [], [], set()
    for source in sources:
        with _allowed(source), open_weights(source, lambda p: TorchFile(p, _torch()), "src") as weights:
            factors, rest = _factors(weights, layout)
            shards.append(factors)
            left += [n for n in rest if n not in left]
            types |= {weights.entries[n].dtype for n in weights.entries if n not in rest}
    if not shards[0]:
        raise FileFormatError(f"{place} holds no factor of a LoRA ({' or '.join(SUFFIXES[layout])}).")
    if any(set(s) != set(shards[0]) for s in shards):
        raise FileFormatError(f"{place}: the shards hold different matrices.")
    if len(types) > 1:
        raise UnsupportedError(f"{place} holds factors of several element types: {', '.join(sorted(types))}.")
    return Stored(layout, shards, types.pop(), config, record, left)


@contextlib.contextmanager
def _allowed(source: Path) -> Iterator[None]:
    """Megatron stores the options of its command beside the weights: plain values in a plain holder."""
    if source.suffix != ".pt":
        yield
        return
    with _torch().serialization.safe_globals([argparse.Namespace]):
        yield


def _factors(weights: Weights, layout: str) -> tuple[dict[str, tuple[Array, Array]], list[str]]:
    halves: dict[str, dict[int, Array]] = {}
    rest = []
    for full in weights.entries:
        half = next((i for i, suffix in enumerate(SUFFIXES[layout]) if full.endswith(suffix)), None)
        if half is None:
            rest.append(full)
            continue
        name = full.removesuffix(SUFFIXES[layout][half])
        for root in _ROOTS if layout == "megatron" else (peft.ROOT,) if layout == "peft" else ():
            name = name.removeprefix(root)
        if len(weights.entries[full].shape) != 2:
            raise UnsupportedError(f"{weights.path}: {full} is no matrix; slimkit converts LoRAs of linear layers.")
        halves.setdefault(name, {})[half] = weights.raw(full)
    for name, found in halves.items():
        if len(found) != 2:
            raise FileFormatError(f"{weights.path}: {name} lacks {SUFFIXES[layout][1 - next(iter(found))]}.")
        if found[0].shape[0] != found[1].shape[1]:
            raise FileFormatError(
                f"{weights.path}: {name} has {found[0].shape[0]} rows in a and {found[1].shape[1]} columns in b."
            )
    return {name: (found[0], found[1]) for name, found in halves.items()}, rest


def _record(place: Path) -> dict[str, Any] | None:
    path = (place if place.is_dir() else place.parent) / RECORD
    if not path.exists():
        return None
    record = files.read_json(path, RECORD)
    wanted = {"layout": str, "rank": int, "alpha": (int, float), "config": dict, "modules": dict, "groups": int}
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a record of {FORMAT}.")
    if record.get("version") != VERSION:
        raise FileFormatError(f"{path} is of version {record.get('version')}; this slimkit reads {VERSION}.")
    for key, kind in {**wanted, "heads": int}.items():
        if not isinstance(record.get(key), kind):  # type: ignore[arg-type]
            raise FileFormatError(f"{path}: {key!r} is missing or of the wrong type.")
    rank, heads, groups = record["rank"], record["heads"], record["groups"]
    if min(rank, heads, groups) < 1 or heads % groups:
        raise FileFormatError(f"{path}: rank, heads and groups must be at least 1, and heads a multiple of groups.")
    for name, held in record["modules"].items():
        whole = isinstance(held, list) and len(held) == 2 and all(type(n) is int and n >= 0 for n in held)
        if not whole or not 1 <= held[0] <= rank - held[1]:
            raise FileFormatError(f"{path}: modules[{name!r}] must be a rank and a place.")
    return record


def write(folder: Path, stored: Stored) -> list[str]:
    """Write an adapter's files; the folder appears whole, and other files in it are left alone.

    Returns:
        The files, by their paths in the folder.

    Raises:
        ArgumentError: the folder holds files of an adapter that would stay and be read together with the new ones.
    """
    _refuse_mixed(folder, stored)
    low, high = SUFFIXES[stored.layout]
    root = peft.ROOT if stored.layout == "peft" else ""
    named = [
        {
            f"{root}{name}{suffix}": array
            for name, pair in sorted(shard.items())
            for suffix, array in zip((low, high), pair)
        }
        for shard in stored.shards
    ]
    made = []
    with files.atomic_directory(folder, keep=True) as new:
        if stored.layout == "megatron":
            library = _torch()
            for i, shard in enumerate(named):
                path = new / ITERATION / f"mp_rank_{i:02d}" / MEGATRON_TENSORS
                path.parent.mkdir(parents=True)
                tensors = {n: restored(np.ascontiguousarray(a), stored.dtype, library) for n, a in shard.items()}
                with files.atomic_file(path) as handle:
                    library.save({"model": tensors, "iteration": 1, "checkpoint_version": 3.0}, handle)
                made.append(str(path.relative_to(new)))
            with files.atomic_file(new / "latest_checkpointed_iteration.txt", "w") as handle:
                handle.write("1")
            made.append("latest_checkpointed_iteration.txt")
        else:
            name = peft.TENSORS if stored.layout == "peft" else MINDFORMERS_TENSORS
            saving.write_items(
                new / name, _items(named[0], stored.dtype), with_manifest=False, metadata={"format": "pt"}
            )
            made.append(name)
        for name, value in ((peft.CONFIG, stored.config), (RECORD, stored.record)):
            if value is not None:
                files.write_json(new / name, value)
                made.append(name)
    return made


def _refuse_mixed(folder: Path, stored: Stored) -> None:
    """Refuse to leave another adapter's files beside the new ones: shards of more processes, another layout's."""
    new = {ITERATION, *(f"{ITERATION}/mp_rank_{i:02d}" for i in range(len(stored.shards)))}
    if stored.layout != "megatron":
        new = {peft.TENSORS if stored.layout == "peft" else MINDFORMERS_TENSORS}
    new |= {name for name, value in ((peft.CONFIG, stored.config), (RECORD, stored.record)) if value is not None}
    patterns = ("mp_rank_*", "iter_*", "iter_*/mp_rank_*", peft.CONFIG, peft.TENSORS, MINDFORMERS_TENSORS, RECORD)
    here = sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern))
    if old := [name for name in here if name not in new]:
        raise ArgumentError(
            f"dst holds another adapter's {old[0]}, which would be read together with the new files; take it away or "
            f"choose another folder. Received: {str(folder)!r}"
        )


def _items(tensors: Mapping[str, Array], dtype: str) -> Items:
    items = Items()
    for name, array in tensors.items():
        items.add(name, Entry(dtype, tuple(array.shape)), lambda array=array: np.ascontiguousarray(array))  # type: ignore[misc]
    return items
