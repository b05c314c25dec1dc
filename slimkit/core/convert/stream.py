"""Conversion of checkpoints between PyTorch and MindSpore: one file streamed into another, and the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files, naming
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.torchfile import TorchFile, restored, write_torch
from slimkit.core.checkpoint.weightfile import Array, Weights, decode
from slimkit.core.convert.moves import Job, plan_conversion
from slimkit.core.convert.slots import assign, difference, framework
from slimkit.core.errors import ArgumentError
from slimkit.core.showing import Shown


@dataclass(frozen=True, repr=False)
class ConvertReport(Shown):
    """What a conversion did.

    Args:
        to: "torch" or "mindspore".
        renamed: name in the source -> name in the result, where they differ.
        relaid: names in the result whose layout changed.
        dropped: tensors of the source that the other framework does not have (num_batches_tracked).
        initialised: tensors of the result that the source does not have, written as zeros.
        tied: name in the source -> the name under which the same tensor is written.
        split: fused tensor of the source -> the tensors of the result that are its rows.
        joined: fused tensor of the result -> the tensors of the source whose rows it holds.
        by_order: layers that were matched by their order and shapes because their names differ.
        unused: tensors of the source without a place (only with strict=False).
        missing: tensors of the network without a source (only with strict=False).
        largest_difference: between the outputs of the two networks, where inputs were given.
        path: the file that was written.
        bytes_written: its size; of a folder, that of its weights.
        carried: files of a folder that came along as they are.
        left: files of a folder that did not.
    """

    to: str
    renamed: dict[str, str] = field(default_factory=dict)
    relaid: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    split: dict[str, list[str]] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)
    by_order: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    largest_difference: float | None = None
    path: str = ""
    bytes_written: int = 0
    carried: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def convert(
    src: Any,
    dst: Any,
    *,
    to: str | None,
    source_net: Any,
    result_net: Any,
    name_map: Mapping[Any, Any] | None,
    choice_func: Callable[[str], bool] | None,
    inputs: Any,
    with_manifest: bool,
    strict: bool,
    torch: Callable[[], Any],
    judge: Callable[[float], None] = lambda gap: None,
) -> ConvertReport:
    """Convert one checkpoint; the wings' `convert_checkpoint` says what the arguments mean. `torch` imports PyTorch,
    and `judge` raises where the two networks differ too much, before anything is written."""
    path = files.as_path(dst, "dst")
    if path.is_dir():
        path = path / "model.safetensors"
    check.choice(path.suffix, (".ckpt", ".safetensors", ".pt", ".pth", ".bin"), "the ending of dst")
    check.boolean(strict, "strict")
    check.boolean(with_manifest, "manifest")
    if inputs is not None and (source_net is None or result_net is None):
        raise ArgumentError("inputs needs both networks, source_net and result_net, to run.")
    with open_weights(src, lambda p: TorchFile(p, torch()), "src") as source:
        if source.path.resolve() == path.resolve():
            raise ArgumentError(f"dst must be another file than src. Received: {str(path)!r}")
        loading.check_manifest(source)
        direction = direction_of(source, path, to, source_net, result_net)
        job = plan_conversion(source, direction, source_net, result_net, name_map, choice_func, strict=strict)
        items = Items(job.entries(source), {}, loading.values_of(source))
        writer = partial(_write_torch, torch) if path.suffix in (".pt", ".pth", ".bin") else None
        # torch.save wants every tensor at hand; the other formats take them chunk by chunk.
        one = job.piece if writer is None else job.one
        items.fetch = {n: partial(one, source, m) for n, m in job.moves.items()}
        metadata = {"format": "pt" if direction == "torch" else "ms"}
        largest = prove(job, source, source_net, result_net, inputs)
        if largest is not None:
            judge(largest)
        saving.write_items(path, items, with_manifest=with_manifest, writer=writer, metadata=metadata)
    return ConvertReport(
        direction, **job.report, largest_difference=largest, bytes_written=path.stat().st_size, path=str(path)
    )


def _write_torch(
    torch: Callable[[], Any],
    path: Path,
    items: Items,
    tensors: Iterable[tuple[str, Array]],
    before: Callable[[Path], object],
) -> None:
    library = torch()
    held = {n: restored(np.asarray(a, order="C"), items.entries[n].dtype, library) for n, a in tensors}
    write_torch(path, held, items.values, library, before)


def direction_of(source: Weights, path: Path, to: str | None, source_net: Any, result_net: Any) -> str:
    """'torch' or 'mindspore': what is said, what the networks are, what the files' endings and contents say."""
    if (source_net is None) != (result_net is None):
        raise ArgumentError("source_net and result_net must be given together, or neither.")
    told = None if to is None else check.choice(to, ("torch", "mindspore"), "to")
    if result_net is not None:
        own = framework(result_net, "result_net")
        if framework(source_net, "source_net") == own:
            raise ArgumentError(f"source_net and result_net must be of two frameworks. Received: both {own}")
        if told not in (None, own):
            raise ArgumentError(f"to is {told!r} and result_net is of {own}.")
        told = own
    if told is None:
        if path.suffix == ".ckpt" or source.path.suffix in (".pt", ".pth", ".bin", ".pkl"):
            told = "mindspore"
        elif source.path.suffix == ".ckpt" or path.suffix in (".pt", ".pth", ".bin"):
            told = "torch"
        elif source.metadata.get("format") in ("pt", "ms"):
            told = "mindspore" if source.metadata["format"] == "pt" else "torch"
        else:
            roles = {name.rpartition(".")[2] for name in source.entries}
            told = "torch" if roles & set(naming.TO_TORCH) else "mindspore"
    if told == "mindspore" and path.suffix in (".pt", ".pth", ".bin"):
        raise ArgumentError(f"dst must end in .ckpt or .safetensors for MindSpore. Received: {str(path)!r}")
    if told == "torch" and path.suffix == ".ckpt":
        raise ArgumentError(f"dst must end in .safetensors, .pt, .pth or .bin for PyTorch. Received: {str(path)!r}")
    return told


def prove(job: Job, source: Weights, source_net: Any, result_net: Any, inputs: Any) -> float | None:
    """The largest difference of the two networks' outputs, each with its weights; None without inputs."""
    if inputs is None:
        return None
    assign(source_net, {name: source.read(origin) for name, origin in job.origins.items()})
    entries = job.entries(source)
    assign(result_net, {n: decode(a, entries[n].dtype) for n, a in job.tensors(source)})
    return difference(source_net, result_net, inputs)
