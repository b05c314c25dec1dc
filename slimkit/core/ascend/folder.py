"""The folders that MindIE and vLLM-Ascend read: weights, a description with a word for each tensor, and the config."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.errors import FileFormatError

Array = np.ndarray[Any, Any]

DESCRIPTION = "quant_model_description.json"
CONFIG = "config.json"
DENSE = "FLOAT"
VERSION = "1.0.0"
KINDS = ("W16A16S", "W8A8S")
HEAD = ("model_quant_type", "version")
# What inference needs beside the weights, copied when the config comes from a folder.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "vocab.txt",
    "merges.txt", "added_tokens.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def config_told_by(model: Any, config: Any) -> Any:
    """The config that was given, or what a Hugging Face model says of itself.

    Args:
        model: the model; only `model.config.to_dict()` is asked.
        config: a dict, a folder, or None.

    Raises:
        ArgumentError: None was given and the model has no such config.
    """
    if config is not None:
        return config
    own: Any = getattr(model, "config", None)
    if not callable(getattr(own, "to_dict", None)):
        check.wrong_value("config", "a dict or a Hugging Face folder, as the model has no config of its own", config)
    # Through JSON, so that what cannot be written shows here and nothing of the model is shared.
    return json.loads(json.dumps(own.to_dict(), default=str))


def settings_of(config: Mapping[str, Any] | files.PathLike, kind: str) -> tuple[dict[str, Any], list[Path]]:
    """What config.json shall say, float16 being the only float, and the files to copy beside it.

    MindIE looks at the description only where "quantize" says of which kind the folder is, and loads it as a folder of
    floats otherwise; vLLM-Ascend does not ask.

    Args:
        config: a dict, or a Hugging Face folder.
        kind: the folder's own word.

    Raises:
        FileFormatError: the folder holds no readable config.json.
    """
    companions: list[Path] = []
    if isinstance(config, Mapping):
        settings = dict(config)
    else:
        folder = files.as_path(config, "config")
        settings = files.read_json(folder / CONFIG, "config.json")
        if not isinstance(settings, dict):
            raise FileFormatError(f"{folder / CONFIG} is not a JSON object.")
        companions = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    # float16 is the only float on the 310P; the words differ between releases of transformers.
    settings.update({key: "float16" for key in ("torch_dtype", "dtype") if key in settings})
    settings.setdefault("torch_dtype", "float16")
    settings["quantize"] = kind.lower()
    return settings, companions


def kind_of(folder: Path) -> str:
    """The word for the whole folder that its description says.

    Raises:
        FileFormatError: no readable description, or one of a kind that slimkit does not know.
    """
    description = files.read_json(folder / DESCRIPTION, DESCRIPTION)
    kind = description.get(HEAD[0]) if isinstance(description, dict) else None
    if kind not in KINDS:
        raise FileFormatError(f"{folder / DESCRIPTION} must describe a model of {' or '.join(KINDS)}. Received: {kind}")
    return str(kind)


def write(
    folder: Path,
    weights: str,
    tensors: Mapping[str, Array],
    settings: Mapping[str, Any],
    companions: Iterable[Path],
    kind: str,
    kinds: Mapping[str, str],
    tied: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a folder at once: a reader sees all of its old files or all of the new ones.

    Args:
        folder: made if missing; other files in it are left alone.
        weights: name of the file of the tensors.
        tensors: name -> array.
        settings: of config.json.
        companions: files to copy beside it.
        kind: the folder's own word.
        kinds: each tensor's word.
        tied: name of a tensor that is not written -> that of the same one, which is; it has a word all the same, since
            vLLM-Ascend asks for that of every layer that it builds.

    Returns:
        The names of the files that were copied.
    """
    copied = []
    words = {**kinds, **{name: kinds[first] for name, first in (tied or {}).items()}}
    with files.atomic_directory(folder, keep=True) as new:
        files.write_tensors(new / weights, dict(tensors), {"format": "pt"})
        files.write_json(new / CONFIG, dict(settings))
        for source in companions:
            if source.parent.resolve() != folder.resolve():
                with files.atomic_file(new / source.name) as handle, open(source, "rb") as reader:
                    shutil.copyfileobj(reader, handle)
            copied.append(source.name)
        files.write_json(new / DESCRIPTION, {"model_quant_type": kind, "version": VERSION, **words})
    return copied


def read(
    directory: files.PathLike, weights: str, kind: str
) -> tuple[Path, dict[str, Array], dict[str, str], dict[str, Any]]:
    """Read a folder, and check that its files agree.

    Args:
        directory: the folder.
        weights: name of the file of the tensors.
        kind: the folder's own word; its tensors have it, or `DENSE`.

    Returns:
        The folder, its tensors, each tensor's word, and what config.json says.

    Raises:
        FileFormatError: a file is missing or damaged, the description is of another kind, or the two disagree.
        LinkPathError: a file is a symbolic link.
    """
    folder = files.as_path(directory, "directory")
    description = files.read_json(folder / DESCRIPTION, DESCRIPTION)
    if not isinstance(description, dict) or description.get("model_quant_type") != kind:
        raise FileFormatError(f"{folder / DESCRIPTION} does not describe a {kind} model.")
    # Older tools leave the version out.
    if description.get("version", VERSION) != VERSION:
        raise FileFormatError(
            f"{folder / DESCRIPTION} is of version {description['version']!r}; this slimkit reads {VERSION}."
        )
    kinds = {name: word for name, word in description.items() if name not in HEAD}
    odd = next((name for name, word in kinds.items() if word not in (kind, DENSE)), None)
    if odd is not None:
        raise FileFormatError(f"{folder / DESCRIPTION}: {odd!r} must be {kind} or {DENSE}. Received: {kinds[odd]!r}")
    tensors, _ = files.read_tensors(folder / weights, weights)
    config = files.read_json(folder / CONFIG, CONFIG)
    if not isinstance(config, dict):
        raise FileFormatError(f"{folder / CONFIG} is not a JSON object.")
    missing, unknown = sorted(set(kinds) - set(tensors)), sorted(set(tensors) - set(kinds))
    # An output layer that is the table has a word and no tensor of its own; nothing inside a block is tied so.
    tied = config.get("tie_word_embeddings") is True
    if unknown or any(not tied or re.search(r"\.\d+\.", name) for name in missing):
        raise FileFormatError(
            f"{folder}: described but not there: {missing[:3]}; there but not described: {unknown[:3]}"
        )
    kinds = {name: word for name, word in kinds.items() if name in tensors}
    return folder, {name: tensors[name] for name in kinds}, kinds, config
