"""The slimkit delta bundle: a folder with one safetensors file and a manifest, which both wings read and write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta import tensors as arrays
from slimkit.core.errors import FileFormatError

FORMAT = "slimkit-delta"
VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "delta.safetensors"

Array = np.ndarray[Any, Any]

# What a manifest must hold, and of which type.
_MANIFEST_KEYS: dict[str, type] = {
    "format": str,
    "version": int,
    "deltas": list,
    "extra": list,
    "tensors": dict,
    "base": dict,
}


def write_bundle(
    directory: files.PathLike,
    deltas: list[dict[str, Any]],
    tensors: Mapping[str, Array],
    extra: list[str],
    base: Mapping[str, Any],
) -> Path:
    """Write a bundle so that the folder holds the old files or the new ones, never a mixture of them.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        deltas: one record per named delta, plain JSON values.
        tensors: name -> array; names are torch's, in either wing.
        extra: the tensors that belong to the base model itself and were trained with the delta.
        base: what the delta was trained on: {"fingerprint": ..., "layers": {path: shape}}.

    Returns:
        The folder.
    """
    folder = files.as_path(directory, "directory")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "deltas": deltas,
        "extra": sorted(extra),
        "base": dict(base),
        "tensors": {
            name: {"shape": list(value.shape), "dtype": value.dtype.name, "sha256": files.digest_array(value)}
            for name, value in sorted(tensors.items())
        },
    }
    with files.atomic_directory(folder, keep=True) as new:
        # One metadata key: the writer puts several into random order, and equal bundles would differ in their bytes.
        files.write_tensors(new / TENSORS, dict(sorted(tensors.items())), {"format": FORMAT})
        _write_manifest(new / MANIFEST, manifest)
    return folder


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    # A line per key: as readable as it needs to be, and written ten times as fast as indented JSON.
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in manifest.items())
    with files.atomic_file(path, "w") as handle:
        handle.write(f"{{\n{lines}\n}}\n")


def read_bundle(directory: files.PathLike) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a bundle and check every tensor against the manifest.

    Args:
        directory: the folder.

    Returns:
        The manifest and the tensors.

    Raises:
        FileFormatError: a file is missing or damaged, the version is unknown, or a tensor is not the one recorded.
    """
    folder = files.as_path(directory, "directory")
    manifest = files.read_json(folder / MANIFEST, "manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileFormatError(f"{folder / MANIFEST} is not the manifest of a {FORMAT} bundle.")
    for key, kind in _MANIFEST_KEYS.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest[key], bool):
            raise FileFormatError(f"{folder / MANIFEST}: {key!r} must be a {kind.__name__}.")
    if manifest["version"] != VERSION:
        raise FileFormatError(
            f"{folder} is a bundle of version {manifest['version']}; this slimkit reads version {VERSION}."
        )
    tensors = arrays.read(folder / TENSORS, "delta.safetensors")
    compare_keys(tensors, manifest["tensors"], str(folder / TENSORS))
    for name, facts in manifest["tensors"].items():
        value = tensors[name]
        if not isinstance(facts, dict) or list(value.shape) != facts.get("shape"):
            raise FileFormatError(f"{folder}: {name} has shape {list(value.shape)}, not the recorded one.")
        if files.digest_array(value) != facts.get("sha256"):
            raise FileFormatError(
                f"{folder}: {name} does not have the recorded digest; the file was changed or damaged."
            )
    return manifest, tensors


def compare_keys(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a file with a key missing or left over, naming them and the nearest known one."""
    missing, left_over = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or left_over:
        parts = [f"missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"] if missing else []
        if left_over:
            shown = ", ".join(name + check.near(name, missing) for name in left_over[:5])
            parts.append(f"left over: {shown}{' ...' if len(left_over) > 5 else ''}")
        raise FileFormatError(f"{where} does not hold the keys it should. {'; '.join(parts)}")


def compare_shapes(found: Mapping[str, Array], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a tensor of another shape, and say so when it looks transposed."""
    for name, shape in wanted.items():
        got = tuple(found[name].shape)
        if got != tuple(shape):
            hint = "; it looks transposed" if got == tuple(reversed(shape)) else ""
            raise FileFormatError(f"{where}: {name} must have shape {tuple(shape)}. Received: {got}{hint}")


def fingerprint(weights: Mapping[str, tuple[tuple[int, ...], Array]]) -> str:
    """A digest of the base layers under a delta: their paths, shapes and 64 values of each, evenly spaced.

    Whole weights would take longer to digest than the delta takes to save; values that differ anywhere in a
    fine-tuned base differ nearly everywhere.

    Args:
        weights: path -> shape and the values at `sample_places`, as float32.

    Returns:
        SHA-256 in hexadecimal.

    Example:
        >>> fingerprint({"q": ((2, 2), np.zeros(4, np.float32))})[:8]
        '7b4421c4'
    """
    digest = hashlib.sha256()
    for path in sorted(weights):
        shape, values = weights[path]
        digest.update(f"{path}{tuple(shape)}".encode())
        digest.update(np.ascontiguousarray(values, dtype=np.float32).tobytes())
    return digest.hexdigest()


def sample_places(size: int, count: int = 64) -> Array:
    """At most `count` flat indices, evenly spaced from the first to the last.

    Example:
        >>> sample_places(5, 3).tolist()
        [0, 2, 4]
    """
    if size <= count:
        return np.arange(size)
    return np.arange(count) * (size - 1) // (count - 1)
