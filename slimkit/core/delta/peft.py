"""Hugging Face PEFT's adapter files: what their keys and options mean, read and written without PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.delta.bundle import compare_keys, compare_shapes
from slimkit.core.delta.spec import LoraSpec, Site
from slimkit.core.errors import FileFormatError, PatternError, UnsupportedError
from slimkit.core.match import bounded_regex

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_ROOT = "base_model.model."
KINDS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}

Array = np.ndarray[Any, Any]

# suffix of a key in the file -> our part of the delta
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
}
# Options under which the numbers in the file mean something else than scaling * B @ A on an untouched base.
_FOREIGN = (
    "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "velora_config", "kasa_config", "monteclora_config", "arrow_config", "megatron_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    tensors, _ = files.read_tensors(folder / TENSORS, TENSORS)
    return config, tensors


def read_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Array], name: str = "default"
) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """What a LoRA adapter says, in slimkit's words.

    Args:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`.
        name: the delta's name here.

    Returns:
        The delta's record, the tensors by slimkit's keys, and whole base tensors (`modules_to_save`) by their names.

    Raises:
        UnsupportedError: an option that gives the numbers another meaning.
        FileFormatError: a factor without its other half, or a key of no known form.
    """
    foreign = [option for option in _FOREIGN if config.get(option)]
    if foreign:
        raise UnsupportedError(f"the adapter uses {', '.join(foreign)}, which slimkit does not read.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"the adapter was made with init_lora_weights={init!r}, which changes the base itself; save it converted "
            f"(path_initial_model_for_weight_conversion) and load that."
        )
    found: dict[str, dict[str, Array]] = {}
    extra: dict[str, Array] = {}
    embeddings = set()
    for full, value in tensors.items():
        if not full.startswith(_ROOT):
            raise FileFormatError(f"the key {full!r} does not begin with {_ROOT!r}.")
        stem = full.removeprefix(_ROOT)
        suffix = next((s for s in _PARTS if stem.endswith(s)), None)
        if suffix is not None:
            path = stem.removesuffix(suffix)
            found.setdefault(path, {})[_PARTS[suffix]] = value
            if "embedding" in suffix:
                embeddings.add(path)
        elif ".lora_" in stem:
            raise FileFormatError(f"the key {full!r} is none that slimkit knows{check.near(stem, list(_PARTS))}.")
        elif ".base_layer." in stem and stem.partition(".base_layer.")[2] == "weight":
            continue  # PEFT adds an embedding's own table to the file; the base has it already
        else:
            extra[stem.replace(".base_layer.", ".")] = value
    dora = bool(config.get("use_dora"))
    layers, parts = {}, {}
    ours = "" if name == "default" else f"_{name}"
    for path, pair in found.items():
        wanted = {"a", "b", "magnitude"} if dora else {"a", "b"}
        compare_keys({f"{path} {p}": 0 for p in pair}, {f"{path} {p}": 0 for p in wanted}, "the adapter's file")
        rank = int(pair["a"].shape[0])
        alpha = _pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        spec = LoraSpec(
            rank=max(rank, 1),
            alpha=float(check.number(alpha, f"lora_alpha of {path}")),
            dropout=0.0 if path in embeddings else float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora")),
            dora=dora,
        )
        said = _pattern_value(config.get("rank_pattern"), path, config.get("r", rank))
        if said != rank:
            hint = "; it looks transposed" if pair["a"].ndim == 2 and pair["a"].shape[1] == said else ""
            raise FileFormatError(f"{path}: lora_A has {rank} rows, its configuration says rank {said}{hint}.")
        layers[path] = spec.to_dict()
        for part, value in pair.items():
            parts[f"{path}.mindpet_delta_lora_{part}{ours}"] = value.reshape(-1) if part == "magnitude" else value
    if not layers:
        raise FileFormatError("the adapter's file holds no LoRA factor.")
    return {"name": name, "file_name": name, "kind": "lora", "layers": layers}, parts, extra


def _pattern_value(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: a regular expression over the end of a path, from a dot on."""
    for pattern, value in (patterns or {}).items():
        test = bounded_regex(str(pattern).removeprefix("^"))
        parts = path.split(".")
        ends = [path] if str(pattern).startswith("^") else [".".join(parts[i:]) for i in range(len(parts))]
        if any(test.fullmatch(end) for end in ends):
            return value
    return default


def write_lora(
    folder: files.PathLike,
    specs: Mapping[str, LoraSpec],
    tensors: Mapping[str, Mapping[str, Array]],
    sites: Mapping[str, Site],
    extra: Mapping[str, Array],
    modules: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """Write a LoRA as PEFT's two files.

    Args:
        folder: where; made if missing.
        specs: path -> LoRA.
        tensors: path -> part ("a", "b", "magnitude", "a0", "b0") -> array.
        sites: every module path of the model.
        extra: whole base parameters that were trained, by their names.
        modules: the modules that these are, as `saved_modules` gives them.
        about: further configuration: task_type, base_model_name_or_path.

    Raises:
        UnsupportedError: something PEFT has no words for.
    """
    if any(s.keep_zeros for s in specs.values()):
        raise UnsupportedError("PEFT has no delta that keeps zeros; save this one with format='slimkit'.")
    first = next(iter(specs.values()))
    for field in ("dora", "rslora"):
        if len({getattr(s, field) for s in specs.values()}) > 1:
            raise UnsupportedError(f"PEFT takes {field} for all layers or for none.")
    ranks, alphas, arrays = {}, {}, {}
    for path, spec in specs.items():
        parts = tensors[path]
        a, b, rank, alpha = parts["a"], parts["b"], spec.rank, spec.alpha
        if spec.init == "pissa":
            # Base + s (B A - B0 A0) is a LoRA of twice the rank on the base as it is.
            a, b = np.concatenate((a, parts["a0"]), 0), np.concatenate((b, -parts["b0"]), 1)
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.rslora else 2)
        ranks[path], alphas[path] = rank, alpha
        embedding = sites[path].kind == "embedding"
        arrays[f"{_ROOT}{path}.lora_embedding_A" if embedding else f"{_ROOT}{path}.lora_A.weight"] = a
        arrays[f"{_ROOT}{path}.lora_embedding_B" if embedding else f"{_ROOT}{path}.lora_B.weight"] = b
        if spec.dora:
            arrays[f"{_ROOT}{path}.lora_magnitude_vector"] = parts["magnitude"]
    for module in modules:
        clash = [p for p in sites if p.endswith(module) and p not in modules and p not in specs]
        if not module or clash:
            raise UnsupportedError(
                f"PEFT would take {clash[0] if clash else 'the whole model'} for {module!r}: it matches endings. "
                f"Save with format='slimkit'."
            )
    arrays.update({f"{_ROOT}{name}": value for name, value in extra.items()})
    config = {
        **_with_head(about, modules),
        "peft_type": "LORA",
        "inference_mode": True,
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(alphas.values())),
        "lora_dropout": max(s.dropout for s in specs.values()),
        "bias": "none",
        "fan_in_fan_out": any(sites[p].kind == "conv1d" for p in specs),
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "init_lora_weights": True,
        "target_modules": _targets(list(specs), list(sites)),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != next(iter(ranks.values()))},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != next(iter(alphas.values()))},
        "modules_to_save": list(modules) or None,
    }
    write_files(folder, config, arrays)


def saved_modules(extra: Iterable[str], every: Iterable[str], taken: Iterable[str]) -> list[str]:
    """The modules that hold these tensors and nothing else: a head of several layers is named as one.

    Args:
        extra: names of the base tensors that travel.
        every: names of all base tensors.
        taken: paths of the layers that carry the delta; no module around one is named.

    Example:
        >>> names = ["body.weight", "head.dense.weight", "head.out.weight"]
        >>> saved_modules(names[1:], names, ["body"])
        ['head']
    """
    inside = set(extra)
    modules = {name.rpartition(".")[0] for name in inside}
    whole = {p for m in modules for p in _parents(m)}
    whole -= {p for name in every if name not in inside for p in _parents(name)}
    whole -= {p for path in taken for p in _parents(f"{path}.")}
    return sorted({next((p for p in _parents(m) if p in whole), m) for m in modules})


def _parents(path: str) -> list[str]:
    """Every path above this one, the topmost first, without the model itself.

    Example:
        >>> _parents("a.b.weight")
        ['a', 'a.b']
    """
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _with_head(about: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The task, unless PEFT would then look for a head that the file does not hold."""
    heads = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
    wanted = heads.get(str(about.get("task_type")))
    kept = wanted is None or any(m.rpartition(".")[2] in wanted for m in modules)
    return {**about, "task_type": about.get("task_type") if kept else None}


def _targets(paths: list[str], every: list[str]) -> list[str] | str:
    """PEFT's target_modules: the paths, or where an ending would match more, one regular expression."""
    chosen = set(paths)
    if all(p in chosen or not any(p.endswith(f".{t}") for t in paths) for p in every):
        return paths
    return "|".join(re.escape(p) for p in paths)


def write_files(folder: files.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Write the two files of an adapter: both are the old ones or the new ones, other files stay."""
    with files.atomic_directory(files.as_path(folder, "directory"), keep=True) as where:
        files.write_tensors(where / TENSORS, dict(sorted(tensors.items())), {"format": "pt"})
        files.write_json(where / CONFIG, dict(config))


def split_prompt(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """A prefix or prompt adapter's tensors: the prompt, and whole base tensors (`modules_to_save`) by their names."""
    prompt = {k: v for k, v in tensors.items() if not k.startswith("base_model.")}
    return prompt, {k.removeprefix("base_model."): v for k, v in tensors.items() if k not in prompt}


def write_prompt(
    folder: files.PathLike,
    rows: Array,
    extra: Mapping[str, Array],
    modules: Sequence[str],
    about: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write a prefix or prompt as PEFT's two files, with whole base parameters that were trained beside it."""
    tensors = {"prompt_embeddings": rows, **{f"base_model.{name}": value for name, value in extra.items()}}
    write_files(folder, {**_with_head(about, modules), **config, "modules_to_save": list(modules) or None}, tensors)


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


def rename_paths(values: Mapping[str, Any], rename: Any) -> dict[str, Any]:
    """Keys of a mapping under the names of another model: {beginning: beginning}, or a function of a path."""
    if rename is None:
        return dict(values)
    if not callable(rename):
        check.instance(rename, Mapping, "rename", "a mapping of beginnings or a function")
        pairs = dict(rename)
        for old in pairs:
            if values and not any(key.startswith(old) for key in values):
                raise PatternError(f"rename must name beginnings of paths in the file. Received: {old!r}")

        def rename(key: str) -> str:
            old = max((o for o in pairs if key.startswith(o)), key=len, default=None)
            return key if old is None else pairs[old] + key[len(old) :]

    renamed = {rename(key): value for key, value in values.items()}
    if len(renamed) != len(values):
        raise PatternError("rename must keep different paths apart; two of them became one.")
    return renamed


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


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).exists()
