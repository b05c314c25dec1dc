"""Saving checkpoints: what is saved, in which format, at once or in the background."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.checkpoint import manifest
from slimkit.core.checkpoint.ckpt import stream_ckpt
from slimkit.core.checkpoint.weightfile import Array, Arrays, Entry, Weights, stream_safetensors, tag_of
from slimkit.core.errors import ArgumentError, ArgumentTypeError

# Numbers and strings lie in the metadata of a safetensors file under this key, as one JSON object.
VALUES = "slimkit.values"

Choice = Callable[[str], bool]


@dataclass
class Items:
    """What one checkpoint holds: tensors that are fetched when they are written, and numbers and strings."""

    entries: dict[str, Entry] = field(default_factory=dict)
    fetch: dict[str, Callable[[], Array]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, entry: Entry, fetch: Callable[[], Array]) -> None:
        """Add one tensor; a name must be new."""
        self._new(name)
        self.entries[name], self.fetch[name] = entry, fetch

    def add_value(self, name: str, value: Any) -> None:
        """Add a number or a string; a name must be new."""
        self._new(name)
        if not isinstance(value, (bool, int, float, str)):
            check.wrong_type(f"the value of {name!r}", "a tensor, an array, a number or a str", value)
        if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 63:
            check.wrong_value(f"the value of {name!r}", "an int of 64 bits", value)
        if isinstance(value, str) and value:
            check.text(value, f"the value of {name!r}")
        self.values[name] = value

    def extend(self, other: Items) -> None:
        """Add everything that another holds; every name must be new."""
        for name, entry in other.entries.items():
            self.add(name, entry, other.fetch[name])
        for name, value in other.values.items():
            self.add_value(name, value)

    def _new(self, name: Any) -> None:
        if name in self.entries or name in self.values:
            raise ArgumentError(f"save_obj names {name!r} twice.")
        if check.text(name, "a name in save_obj") == "__metadata__":  # the one name that safetensors keeps for itself
            check.wrong_value("a name in save_obj", "another name than '__metadata__'", name)

    def chosen(self, choice_func: Choice | None) -> Items:
        """Those that the function wants, by name."""
        if choice_func is None:
            return self
        check.function(choice_func, "choice_func")
        wanted = {n for n in (*self.entries, *self.values) if choice_func(n)}
        return Items(
            {n: e for n, e in self.entries.items() if n in wanted},
            {n: f for n, f in self.fetch.items() if n in wanted},
            {n: v for n, v in self.values.items() if n in wanted},
        )

    def snapshot(self) -> Items:
        """The same with every tensor copied now, so that training may go on."""
        copies = {name: fetch().copy() for name, fetch in self.fetch.items()}
        return Items(dict(self.entries), {n: partial(copies.__getitem__, n) for n in copies}, dict(self.values))

    def stream(self) -> Iterable[tuple[str, Array]]:
        """(name, stored array), fetched one at a time."""
        return ((name, fetch()) for name, fetch in self.fetch.items())


Described = Callable[[str, Any], "tuple[Entry, Callable[[], Array]] | None"]
Before = Callable[[Path], object]
Writer = Callable[[Path, Items, Iterable[tuple[str, Any]], Before], None]


def listed(save_obj: Any) -> list[tuple[str, Any]]:
    """The (name, value) pairs of a dict, or of a list of {"name": ..., "data": ...}.

    Example:
        >>> listed([{"name": "epoch_size", "data": 10}])
        [('epoch_size', 10)]
    """
    if isinstance(save_obj, Mapping):
        return list(save_obj.items())
    pairs = []
    for item in save_obj:
        if not isinstance(item, Mapping) or set(item) != {"name", "data"}:
            raise ArgumentTypeError(f'save_obj must be a list of {{"name": ..., "data": ...}}. Received: {item!r:.80}')
        pairs.append((item["name"], item["data"]))
    return pairs


def path_to_save(name: Any, endings: Sequence[str], words: str) -> Path:
    """The file to write, with the first ending where the name has none; ArgumentError for one that is not known."""
    path = files.as_path(name, "ckpt_file_name")
    if not path.suffix:
        path = path.with_name(path.name + endings[0])
    if path.suffix not in endings:
        raise ArgumentError(f"ckpt_file_name must end in {words}. Received: {str(path)!r}")
    return path


def gather(save_obj: Any, described: Described) -> Items:
    """Items out of a dict or list of pairs.

    Args:
        save_obj: name -> value, or a list of {"name": ..., "data": ...}; NumPy arrays, numbers and strings are known.
        described: a wing's answer to "is this a tensor?", by name and value: its entry and how to fetch it, or None for
            anything else.
    """
    items = Items()
    for name, value in listed(save_obj):
        if (found := described(name, value)) is not None:
            items.add(name, *found)
        elif isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            items.add(name, Entry(tag_of(array), tuple(array.shape)), partial(np.asarray, array))
        else:
            items.add_value(name, value)
    return items


def with_appended(items: Items, append_dict: Mapping[str, Any] | None, described: Described) -> Items:
    """The same items and those of the argument `append_dict`."""
    if append_dict is not None:
        check.instance(append_dict, dict, "append_dict", "a dict of names and values")
        items.extend(gather(append_dict, described))
    return items


def in_memory(parameter_dict: Mapping[str, Any], described: Described) -> Weights:
    """What `load_checkpoint` returned, as weights to load."""
    items = gather(parameter_dict, described)
    source = Arrays({name: (fetch(), items.entries[name].dtype) for name, fetch in items.fetch.items()})
    source.values = items.values
    return source


def save(
    path: Path,
    items: Items,
    *,
    async_save: bool,
    with_manifest: bool,
    writer: Writer | None = None,
    crc: bool = False,
    after: Callable[[], object] | None = None,
) -> Saving:
    """Write items now, or take a copy of them now and write it in the background; `after` is called when it is done."""
    check.boolean(async_save, "async_save")
    check.boolean(with_manifest, "manifest")
    if not items.entries and not items.values:
        raise ArgumentError("save_obj must hold at least one tensor, number or string. Received: nothing to save")
    held = items.snapshot() if async_save else items

    def work() -> None:
        write_items(path, held, with_manifest=with_manifest, writer=writer, crc=crc)
        if after is not None:
            after()

    return Saving(path, work, async_save)


def write_items(
    path: files.PathLike,
    items: Items,
    *,
    with_manifest: bool = True,
    crc: bool = False,
    writer: Writer | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one checkpoint atomically, then its manifest.

    Args:
        path: .ckpt or .safetensors, or what `writer` writes.
        items: what it holds.
        with_manifest: write FILE.manifest.json too.
        crc: for .ckpt, end it with MindSpore's own checksum.
        writer: writes another format; gets the path, the items, the stream of their tensors, and what to call just
            before the file takes the old one's place.
        metadata: more str -> str pairs for the header of a safetensors file.
    """
    target = Path(path)
    with manifest.Digests(items.entries) as digests:

        def before(finished: Path) -> None:
            if with_manifest:
                digests.announce(target, finished)
            else:
                manifest.announce_none(target)

        stream = digests.passing(items.stream()) if with_manifest else items.stream()
        if writer is not None:
            writer(target, items, stream, before)
        elif target.suffix == ".ckpt":
            stream_ckpt(target, items.entries, stream, items.values, crc=crc, before=before)
        else:
            held = {VALUES: json.dumps(items.values)} if items.values else {}
            stream_safetensors(target, items.entries, stream, {**(metadata or {}), **held}, before=before)
        manifest.confirm(target)


class Saving:
    """A checkpoint on its way to the disk.

    Args:
        path: the file.
        work: writes it.
        background: write in a thread of its own; the interpreter waits for it at exit.
    """

    def __init__(self, path: Path, work: Callable[[], None], background: bool) -> None:
        self.path = path
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, args=(work,), name=f"saving {path.name}")
            self._thread.start()
        else:
            work()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the caller waits
            self._error = error

    @property
    def done(self) -> bool:
        """Whether the file is on the disk, or failed to get there."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the file is on the disk.

        Returns:
            Its path.

        Raises:
            OSError: or whatever else went wrong while it was written.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.path
