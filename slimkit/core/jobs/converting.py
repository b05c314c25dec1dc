"""Conversion of a whole model folder: its shards one by one, its index, and the model's other files as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.openweights import INDEXES, open_weights, read_index
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.torchfile import TorchFile
from slimkit.core.checkpoint.weightfile import Weights
from slimkit.core.convert.moves import Job, plan_conversion
from slimkit.core.convert.stream import ConvertReport, direction_of, prove
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.jobs import folders


def convert_folder(
    src: Path,
    out: Path,
    *,
    to: str | None,
    source_net: Any,
    result_net: Any,
    inputs: Any,
    with_manifest: bool,
    torch: Callable[[], Any],
    judge: Callable[[float], None] = lambda gap: None,
    plan_only: bool = False,
    **chosen: Any,
) -> ConvertReport:
    """Convert a folder of a model into a folder of the other framework; it appears whole or not at all.

    Weights become safetensors, in as many files as they were; configuration, tokenizer and the like come along.

    Args:
        src: a folder with weights, in one file or in shards with an index.
        out: the new folder.
        to, source_net, result_net, inputs, with_manifest, torch, judge: as in `stream.convert`.
        plan_only: say what would be done, and write nothing.
        chosen: name_map, choice_func and strict, as in `plan_conversion`.

    Raises:
        UnsupportedError: the folder holds a pruned model, whose plan is of its own framework.
    """
    if (src / folders.PLAN).exists():
        raise UnsupportedError(
            f"{src} holds the plan of a pruned model, which names the tensors of its own framework: convert the "
            "original, and prune it there"
        )
    with open_weights(src, lambda path: TorchFile(path, torch()), "src") as source:
        direction = direction_of(source, out, to, source_net, result_net)
        job = plan_conversion(source, direction, source_net, result_net, **chosen)
        if plan_only:
            return ConvertReport(direction, **job.report, path=str(out))
        home = _homes(source, job)
        for shard in {source.path, *(source.path.parent / name for name in _shards(source).values())}:
            if shard.suffix != ".json":
                with open_weights(shard, lambda path: TorchFile(path, torch())) as one:
                    loading.check_manifest(one)
        gap = prove(job, source, source_net, result_net, inputs)
        if gap is not None:
            judge(gap)
        with files.atomic_directory(out) as folder:
            _write(folder, source, job, home, direction, with_manifest)
            carried = folders.copy_companions(src, folder)
            if (src / "config.json").is_file():
                with files.atomic_file(folder / "config.json") as handle:
                    handle.write((src / "config.json").read_bytes())
                carried.append("config.json")
            written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    left = [file.name for file in sorted(src.iterdir()) if not (out / file.name).exists() and not _replaced(file)]
    return ConvertReport(
        direction, **job.report, largest_difference=gap, bytes_written=written, path=str(out),
        carried=sorted(carried), left=left,
    )  # fmt: skip


def _shards(source: Weights) -> dict[str, str]:
    """Tensor -> shard, or nothing where one file holds all."""
    return read_index(source.path) if source.path.suffix == ".json" else {}


def _homes(source: Weights, job: Job) -> dict[str, list[str]]:
    """File of the result -> its tensors, in the files of the source: what is made of several lies with the first."""
    shards = _shards(source)
    if not shards:
        return {"model.safetensors": list(job.moves)}
    found: dict[str, list[str]] = {}
    first = next(iter(shards.values()))
    for name, move in job.moves.items():
        shard = shards[move.source] if move.source else first
        found.setdefault(_named(shard), []).append(name)
    return found


def _named(shard: str) -> str:
    """A shard's name as one of safetensors: pytorch_model-00001-of-00002.bin is model-00001-of-00002.safetensors."""
    return Path(shard).stem.replace("pytorch_model", "model") + ".safetensors"


def _replaced(file: Path) -> bool:
    """Whether a file's content is in the result under another name."""
    return file.suffix in folders.WEIGHTS or file.name in INDEXES or file.name.endswith(".manifest.json")


def _write(
    folder: Path, source: Weights, job: Job, home: dict[str, list[str]], direction: str, with_manifest: bool
) -> None:
    entries, values = job.entries(source), loading.values_of(source)
    metadata = {"format": "pt" if direction == "torch" else "ms"}
    for at, (file, names) in enumerate(home.items()):
        items = Items({n: entries[n] for n in names}, {}, {} if at else values)
        items.fetch = {n: partial(job.piece, source, job.moves[n]) for n in names}
        saving.write_items(folder / file, items, with_manifest=with_manifest, metadata=metadata)
    if source.path.suffix != ".json":
        return
    told = files.read_json(source.path, "the index").get("metadata")
    if told is not None and not isinstance(told, dict):
        raise FileFormatError(f"{source.path}: metadata must be a mapping")
    table = {name: file for file, names in home.items() for name in names}
    about = {**(told or {}), "total_size": sum(entry.nbytes for entry in entries.values())}
    files.write_json(folder / INDEXES[0], {"metadata": about, "weight_map": dict(sorted(table.items()))})
