"""Samples for training a network of one's own: arrays with labels, or ready batches from a function."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.jobs import sources
from slimkit.core.jobs.framework import JobFramework, Supervised
from slimkit.core.jobs.sources import DataPlace


def supervised(
    place: DataPlace, label_key: str, framework: JobFramework, *, labels: bool, option: str = "--data"
) -> Supervised:
    """Read the training data of a network that has no tokenizer.

    Args:
        place: a file of arrays, or a function that returns batches (or a recipe's mapping, whose "train" is taken).
        label_key: the array that holds the labels; one other array is the network's only argument, several are its
            keyword arguments.
        framework: makes tensors of the arrays.
        labels: whether labels are needed; otherwise the label array is left out.
        option: for messages.

    Returns:
        The samples.

    Raises:
        ConfigError: text, or a function that returns no batches, or no labels where they are needed.
        FileFormatError: the file is damaged, or its arrays disagree in length.
    """
    if place.kind == "text":
        raise ConfigError(
            f"{option}: text needs the tokenizer of a Hugging Face directory; give arrays (.npz, .safetensors) or a "
            "function that returns batches"
        )
    if place.kind == "function":
        return _made(place, framework, labels, option)
    arrays = sources.read_arrays(Path(place.reference))
    columns = dict(arrays) if isinstance(arrays, dict) else {"input": arrays}
    target = columns.pop(label_key, None)
    if labels and target is None:
        raise ConfigError(
            f"{option}: {place.reference} has no array {label_key!r}{check.near(label_key, list(columns))}; "
            f"--label-key names the labels. Its arrays: {sorted(columns)}"
        )
    if not columns:
        raise FileFormatError(f"{place.reference} holds labels and no inputs.")
    every = [*columns.values(), *([target] if target is not None else [])]
    if any(a.ndim == 0 or len(a) != len(every[0]) for a in every) or not len(every[0]):
        raise FileFormatError(f"{place.reference}: the arrays must have first axes of one length, at least 1.")
    count = min(len(every[0]), place.samples)
    integers = target is not None and target.dtype.kind in "iub"
    if target is not None and integers:
        target = target.astype(framework.class_dtype)
    alone = next(iter(columns.values())) if len(columns) == 1 else None

    def collate(rows: list[int]) -> Any:
        inputs = framework.tensors(alone[rows] if alone is not None else {name: a[rows] for name, a in columns.items()})
        return (inputs, framework.tensors(target[rows])) if labels and target is not None else inputs

    digest = hashlib.sha256()
    for array in every:
        digest.update(files.digest_array(array[:count]).encode())
    return Supervised(
        range(count),
        collate,
        count,
        {"arrays": sorted(columns), "digest": digest.hexdigest(), "samples": count},
        labels,
        labels and integers,
    )


def _made(place: DataPlace, framework: JobFramework, labels: bool, option: str) -> Supervised:
    made = sources.found(place.reference, option)()
    made = made.get("train") if isinstance(made, Mapping) else made
    if made is None or isinstance(made, (str, bytes)) or not hasattr(made, "__iter__"):
        raise ConfigError(f"{option}: {place.reference} must return batches, or a mapping with the key train")
    batches = [batch for _, batch in zip(range(max(1, place.samples // place.batch_size)), made)]
    if not batches:
        raise ConfigError(f"{option}: {place.reference} returned no batch")
    framework.agree(f"{option}: what {place.reference} returns", batches)
    pairs = all(isinstance(b, (tuple, list)) and len(b) == 2 for b in batches)
    if labels and not pairs:
        raise ConfigError(f"{option}: {place.reference} must return batches of (inputs, labels)")
    kind = str(getattr(batches[0][1], "dtype", "")).lower() if labels else ""
    identity = {"function": place.reference, "batches": len(batches)}
    return Supervised(batches, None, len(batches), identity, labels, "int" in kind)
