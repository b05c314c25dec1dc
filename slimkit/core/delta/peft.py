"""Hugging Face PEFT's adapter files: what their keys and options mean, read and written without PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta import bundle
from slimkit.core.delta import tensors as arrays
from slimkit.core.delta.bundle import compare_keys, compare_shapes
from slimkit.core.errors import FileFormatError, PatternError, UnsupportedError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."  # before a path in a key
# peft_type -> the kind of delta that it becomes
KINDS = {
    "LORA": "lora",
    "ADALORA": "lora",
    "VERA": "lora",
    "TRAINABLE_TOKENS": "lora",
    "IA3": "ia3",
    "MISS": "miss",
    "SHIRA": "shira",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
}

Array = np.ndarray[Any, Any]


def read_files(directory: files.PathLike) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter's configuration and tensors; FileFormatError when a file is missing or damaged."""
    folder = files.as_path(directory, "directory")
    config = files.read_json(folder / CONFIG, "adapter_config.json")
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FileFormatError(f"{folder / CONFIG} is not the configuration of a PEFT adapter.")
    if config["peft_type"] not in KINDS:
        raise UnsupportedError(
            f"{folder} is a PEFT adapter of type {config['peft_type']}; slimkit reads {', '.join(KINDS)}."
        )
    if not (folder / TENSORS).exists():
        raise FileFormatError(f"{folder} holds no {TENSORS}; other file types are not read.")
    return config, arrays.read(folder / TENSORS, TENSORS)


def write_files(folder: files.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Write the two files of an adapter: both are the old ones or the new ones, other files stay."""
    with files.atomic_directory(files.as_path(folder, "directory"), keep=True) as where:
        files.write_tensors(where / TENSORS, dict(sorted(tensors.items())), {"format": "pt"})
        files.write_json(where / CONFIG, dict(config))


def split_prompt(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """A prefix or prompt adapter's tensors: the prompt, and whole base tensors (`modules_to_save`) by their names."""
    prompt = {k: v for k, v in tensors.items() if not k.startswith("base_model.")}
    return prompt, {k.removeprefix("base_model."): v for k, v in tensors.items() if k not in prompt}


def read_prompt(prompt: Mapping[str, Array], shape: Sequence[int], where: str) -> Array:
    """The one tensor of a prefix or prompt adapter, its shape checked."""
    compare_keys(prompt, {"prompt_embeddings": 0}, where)
    compare_shapes(prompt, {"prompt_embeddings": tuple(shape)}, where)
    return prompt["prompt_embeddings"]


def split_prefix(flat: Array, n_layers: int) -> list[tuple[Array, Array]]:
    """PEFT's flat prefix (tokens, layers * 2 * width) as keys and values (tokens, width) by layer.

    Example:
        >>> [k.shape for k, v in split_prefix(np.zeros((4, 12)), 3)]
        [(4, 2), (4, 2), (4, 2)]
    """
    parts = np.split(flat, 2 * n_layers, axis=1)
    return [(parts[2 * i], parts[2 * i + 1]) for i in range(n_layers)]


def read_rows(
    prompt: Mapping[str, Array], tokens: int, width: int, config: Mapping[str, Any], where: str
) -> tuple[Array, tuple[str, ...]]:
    """The rows of a prompt (tokens, width), and notes: an encoder-decoder model's file holds as many again.

    PEFT puts the first half in front of the encoder's input and reads the second half nowhere.
    """
    twice = int(config.get("num_transformer_submodules") or 1)
    rows = read_prompt(prompt, (tokens * twice, width), where)
    if twice == 1:
        return rows, ()
    return rows[:tokens], (f"rows {tokens} to {len(rows)} of the prompt are read by no model, as in PEFT",)


def read_cached(
    prompt: Mapping[str, Array], tokens: int, width: int, layers: int, config: Mapping[str, Any], where: str
) -> tuple[list[tuple[Array, Array]], tuple[str, ...]]:
    """Keys and values of a prefix in a decoder's cache, and notes.

    PEFT writes its n pairs twice, one run after the other, and gives a decoder's layer i the pair that then stands at
    2 i: pair 2 i modulo n.

    Raises:
        FileFormatError: the decoder has more layers than the file says.
    """
    count = int(config.get("num_layers") or layers)
    pairs = split_prefix(read_prompt(prompt, (tokens, 2 * count * width), where), count)
    if count < layers or config.get("num_transformer_submodules") != 2:
        raise FileFormatError(
            f"{where} holds a prefix for {count} layers of {config.get('num_transformer_submodules')} part(s); the "
            f"model's decoder has {layers} layers and wants one of 2."
        )
    used = [2 * i % count for i in range(layers)]
    idle = sorted(set(range(count)) - set(used))
    notes = (f"pairs {', '.join(map(str, idle))} of the prefix are read by no layer, as in PEFT",) if idle else ()
    return [pairs[i] for i in used], notes


def cached_pairs(pairs: Sequence[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """The pairs in the order in which PEFT finds them (see `read_cached`): an odd number, so that none stands for two.

    Example:
        >>> one, two = (np.full((1, 1), i) for i in (1, 2))
        >>> [int(k.item()) for k, v in cached_pairs([(one, one), (two, two)])]
        [1, 0, 2]
    """
    count = len(pairs) + (len(pairs) + 1) % 2
    placed = {2 * i % count: pair for i, pair in enumerate(pairs)}
    empty = (np.zeros_like(pairs[0][0]), np.zeros_like(pairs[0][1]))
    return [placed.get(i, empty) for i in range(count)]


def rename_paths(values: Mapping[str, Any], rename: Any) -> dict[str, Any]:
    """Keys of a mapping under the names of another model: {beginning: beginning}, or a function of a path."""
    if rename is not None and not callable(rename):
        check.instance(rename, Mapping, "rename", "a mapping of beginnings or a function")
        for old in rename:
            if values and not any(key.startswith(old) for key in values):
                raise PatternError(f"rename must name beginnings of paths in the file. Received: {old!r}")
    to = renamer(rename)
    renamed = {to(key): value for key, value in values.items()}
    if len(renamed) != len(values):
        raise PatternError("rename must keep different paths apart; two of them became one.")
    return renamed


def renamer(rename: Any) -> Callable[[str], str]:
    """How a path in the file is called here.

    Example:
        >>> renamer({"model.": ""})("model.layers.0")
        'layers.0'
    """
    if rename is None:
        return lambda key: key
    if callable(rename):
        return rename
    pairs = dict(rename)

    def to(key: str) -> str:
        old = max((o for o in pairs if key.startswith(o)), key=len, default=None)
        return key if old is None else str(pairs[old]) + key[len(old) :]

    return to


def task_type(class_name: str) -> str | None:
    """PEFT's word for what a Hugging Face model is for, by its class.

    Example:
        >>> task_type("LlamaForCausalLM"), task_type("BertModel")
        ('CAUSAL_LM', 'FEATURE_EXTRACTION')
    """
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "Model": "FEATURE_EXTRACTION",
    }
    return next((word for ending, word in endings.items() if class_name.endswith(ending)), None)


def refuse_bundle(folder: Path) -> None:
    """An error that says how PEFT's files are made of slimkit's own, where a folder holds these and not those."""
    if (folder / bundle.TENSORS).exists() and not is_adapter(folder):
        raise UnsupportedError(
            f"{folder} is a bundle of slimkit's: load_delta(base, {str(folder)!r}) and save_delta(base, DIR, "
            'format="peft") make PEFT\'s files of it, as slimkit adapt --format peft does at once.'
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).exists()
