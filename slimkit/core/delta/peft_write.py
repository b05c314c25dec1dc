"""Writing deltas as Hugging Face PEFT's two files: LoRA, and what of the base travels with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.delta.ia3 import Ia3Spec, shape_in_file
from slimkit.core.delta.peft import ROOT, write_files
from slimkit.core.delta.peft_held import spell_held
from slimkit.core.delta.spec import LoraSpec, Site
from slimkit.core.errors import UnsupportedError

Array = np.ndarray[Any, Any]

# Tables that PEFT stores whole when a LoRA is on them, so that rows added to a vocabulary travel.
_STORED_TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class BaseFacts:
    """What the writer has to know of the base.

    Args:
        value: name of a tensor -> its values.
        names: every tensor.
        parameters: those an optimizer may touch.
        trained: those that train.
        held: those that came with a file and do not train.
        shared: of trained and held, those with several names: name -> the others.
    """

    value: Callable[[str], Array]
    names: Sequence[str]
    parameters: Collection[str]
    trained: Collection[str] = ()
    held: Collection[str] = ()
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)


def spell_base(
    facts: BaseFacts, taken: Collection[str], sites: Iterable[str], root: str
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Base tensors by PEFT's keys, and what its configuration says of them.

    Modules that were trained are `modules_to_save`, biases `bias="lora_only"` or `"all"`. What has no word there (the
    weight under a LoRA, a parameter whose module cannot be named) stands in the file under its own key, which PEFT
    puts into the base.

    Args:
        facts: of the base.
        taken: paths of the layers that carry the delta.
        sites: every module path of the model.
        root: what stands in front of a key.
    """
    below = {n for n in facts.names if n.rpartition(".")[0] in taken}
    below |= {n for n in facts.names if n.rpartition(".out_proj.")[0] in taken}
    trained = {*facts.trained, *(m for n in facts.trained for m in facts.shared.get(n, ()))}
    biases = {n for n in facts.parameters if n.rpartition(".")[2].endswith("bias")}
    mode, plain = "none", _once(facts, taken)
    if biases & trained and biases <= trained:
        mode, plain = "all", plain | biases
    elif biases & trained & below:
        mode, plain = "lora_only", plain | (biases & below)
    plain |= {n for n in below if n in trained}
    plain |= {f"{p}.weight" for p in taken if p.rpartition(".")[2] in _STORED_TABLES}
    rest = trained - plain
    modules = {n.rpartition(".")[0] for n in rest}
    kept = [n for n in facts.names if n.rpartition(".")[0] in modules]
    named = saved_modules(kept, facts.names, taken)
    unclear = {m for m in named if not m or any(_ends(p, m) and p not in named for p in sites)}
    named = [m for m in named if m not in unclear]
    plain |= {n for n in rest if not any(n.startswith(f"{m}.") for m in named)}
    stems = {n for n in kept if any(n.startswith(f"{m}.") for m in named)} | plain
    tied = any(set(facts.shared.get(n, ())) & rest and n in rest for n in facts.trained)
    spelled = {}
    for name in stems:
        path, _, last = name.rpartition(".")
        above = path.rpartition(".")[0]
        if path in taken:
            spelled[f"{root}{path}.base_layer.{last}"] = facts.value(name)
        elif above in taken and path.endswith(".out_proj"):
            # PEFT wraps the output projection of a multi-head attention inside the attention.
            spelled[f"{root}{above}.base_layer.out_proj.base_layer.{last}"] = facts.value(name)
        else:
            spelled[f"{root}{name}"] = facts.value(name)
    config: dict[str, Any] = {"modules_to_save": named or None}
    if root == ROOT:
        config |= {"bias": mode, **({"ensure_weight_tying": True} if tied else {})}
    return spelled, config


def _once(facts: BaseFacts, taken: Collection[str]) -> set[str]:
    """Names under which the values that came with a file are written: of a tied tensor the places that carry the delta,
    as PEFT does, or the first. The base ties the others where the file is read."""
    found: set[str] = set()
    for name in facts.held:
        places = [name, *facts.shared.get(name, ())]
        found.update([n for n in places if n.rpartition(".")[0] in taken] or [name])
    return found


def _tied_factors(facts: BaseFacts, specs: Mapping[str, LoraSpec], tensors: Mapping[str, Mapping[str, Array]]) -> bool:
    """Whether the LoRAs on the places of a tied table are one, read the other way: PEFT's `ensure_weight_tying`."""
    for name in facts.held:
        places = [n.rpartition(".")[0] for n in (name, *facts.shared.get(name, ()))]
        parts = [tensors[p] for p in places if p in specs]
        if len(parts) == 2 and all(
            {"a", "b"} <= part.keys() and part["a"].ndim == part["b"].ndim == 2 for part in parts
        ):
            one, other = parts
            if np.array_equal(one["a"], other["b"].T) and np.array_equal(one["b"], other["a"].T):
                return True
    return False


def _ends(path: str, module: str) -> bool:
    return path != module and path.endswith(module)


def write_lora(
    folder: files.PathLike,
    specs: Mapping[str, LoraSpec],
    tensors: Mapping[str, Mapping[str, Array]],
    sites: Mapping[str, Site],
    facts: BaseFacts,
    about: Mapping[str, Any],
) -> None:
    """Write a LoRA as PEFT's two files.

    Args:
        folder: where; made if missing.
        specs: path -> LoRA.
        tensors: path -> part ("a", "b", "magnitude", "a0", "b0") -> array.
        sites: every module path of the model.
        facts: of the base.
        about: further configuration: task_type, base_model_name_or_path.

    Raises:
        UnsupportedError: something PEFT has no words for.
    """
    if any(s.keep_zeros for s in specs.values()):
        raise UnsupportedError("PEFT has no delta that keeps zeros; save this one with format='slimkit'.")
    first = next(iter(specs.values()))
    for option in ("dora", "rslora", "bias"):
        if len({getattr(s, option) for s in specs.values()}) > 1:
            raise UnsupportedError(f"PEFT takes {option} for all layers or for none.")
    ranks, alphas, arrays = {}, {}, {}
    for path, spec in specs.items():
        parts = tensors[path]
        if spec.parameters:
            ranks[path], alphas[path] = spec.rank, spec.alpha
            spelled_held = spell_held(path, sites[path], spec, parts)
            arrays.update({f"{ROOT}{name}": value for name, value in spelled_held.items()})
            continue
        a, b, rank, alpha = parts["a"], parts["b"], spec.rank, spec.alpha
        if spec.init == "pissa":
            if spec.dora:
                raise UnsupportedError(
                    f"PEFT has no words for dora over init='pissa' ({path}); save with format='slimkit'."
                )
            # Base + s (B A - B0 A0) is a LoRA of twice the rank on the base as it is.
            a, b = np.concatenate((a, parts["a0"]), 0), np.concatenate((b, -parts["b0"]), 1)
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.rslora else 2)
        ranks[path], alphas[path] = rank, alpha
        embedding = sites[path].kind == "embedding"
        arrays[f"{ROOT}{path}.lora_embedding_A" if embedding else f"{ROOT}{path}.lora_A.weight"] = a
        arrays[f"{ROOT}{path}.lora_embedding_B" if embedding else f"{ROOT}{path}.lora_B.weight"] = b
        if spec.bias:
            arrays[f"{ROOT}{path}.lora_B.bias"] = parts["bias"]
        if spec.dora:
            length = parts["magnitude"]
            arrays[f"{ROOT}{path}.lora_magnitude_vector"] = (
                length.reshape(1, -1, 1, 1) if sites[path].kind == "conv2d" else length
            )
    spelled, of_base = spell_base(facts, specs, sites, ROOT)
    config = {
        **with_head(about, of_base["modules_to_save"] or ()),
        "peft_type": "LORA",
        "inference_mode": True,
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(alphas.values())),
        "lora_dropout": max(s.dropout for s in specs.values()),
        "fan_in_fan_out": any(sites[p].kind == "conv1d" for p in specs),
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        **({"lora_bias": True} if first.bias else {}),
        "init_lora_weights": True,
        "target_modules": target_modules([p for p in specs if sites[p].kind != "experts"], list(sites)) or None,
        "target_parameters": [f"{p}.{n}" for p in specs if sites[p].kind == "experts" for n in specs[p].parameters]
        or None,
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != next(iter(ranks.values()))},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != next(iter(alphas.values()))},
        **of_base,
        **({"ensure_weight_tying": True} if _tied_factors(facts, specs, tensors) else {}),
    }
    write_files(folder, config, {**spelled, **arrays})


def write_ia3(
    folder: files.PathLike,
    layers: Mapping[str, tuple[Ia3Spec, Array]],
    sites: Mapping[str, Site],
    facts: BaseFacts,
    about: Mapping[str, Any],
) -> None:
    """Write an IA3 as PEFT's two files; `layers` is path -> (options, factors), the rest as for `write_lora`."""
    arrays = {f"{ROOT}{p}.ia3_l": v.reshape(shape_in_file(sites[p].kind, spec)) for p, (spec, v) in layers.items()}
    inner = [p for p, (spec, _) in layers.items() if spec.feedforward]
    config = {
        "peft_type": "IA3",
        "init_ia3_weights": True,
        "fan_in_fan_out": any(sites[p].kind == "conv1d" for p in layers),
        # A regular expression: PEFT takes names here for endings of any kind.
        "feedforward_modules": "|".join(re.escape(p) for p in inner) if inner else [],
    }
    write_layers(folder, layers, arrays, sites, facts, about, config)


def write_layers(
    folder: files.PathLike,
    layers: Mapping[str, Any],
    arrays: Mapping[str, Array],
    sites: Mapping[str, Site],
    facts: BaseFacts,
    about: Mapping[str, Any],
    config: Mapping[str, Any],
    biases: Mapping[str, str] | None = None,
) -> None:
    """Write a delta on layers, other than a LoRA, as PEFT's two files.

    Args:
        folder: where; made if missing.
        layers: path -> anything.
        arrays: the delta's tensors by PEFT's keys.
        sites, facts, about: as for `write_lora`.
        config: what the kind says of itself.
        biases: where the kind has a word for trained biases: LoRA's word -> its own, those that differ.
    """
    spelled, of_base = spell_base(facts, layers, sites, ROOT)
    mode = {} if biases is None else {"bias": biases.get(of_base["bias"], of_base["bias"])}
    whole = {
        **with_head(about, of_base["modules_to_save"] or ()),
        **config,
        **mode,
        "inference_mode": True,
        "target_modules": target_modules(list(layers), list(sites)),
        "modules_to_save": of_base["modules_to_save"],
    }
    write_files(folder, whole, {**spelled, **arrays})


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
    whole = {p for m in modules for p in _parents(f"{m}.")}
    whole -= {p for name in every if name not in inside for p in _parents(name)}
    whole -= {p for path in taken for p in _parents(f"{path}.")}
    return sorted({next((p for p in _parents(f"{m}.") if p in whole), "") for m in modules})


def _parents(path: str) -> list[str]:
    """Every path above this one, the topmost first, without the model itself.

    Example:
        >>> _parents("a.b.weight")
        ['a', 'a.b']
    """
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def with_head(about: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The task, unless PEFT would then look for a head that the file does not hold."""
    heads = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
    wanted = heads.get(str(about.get("task_type")))
    kept = wanted is None or any(m.rpartition(".")[2] in wanted for m in modules)
    return {**about, "task_type": about.get("task_type") if kept else None}


def target_modules(paths: list[str], every: list[str]) -> list[str] | str:
    """PEFT's target_modules: the paths, or where an ending would match more, one regular expression."""
    chosen = set(paths)
    if all(p in chosen or not any(p.endswith(f".{t}") for t in paths) for p in every):
        return paths
    return "|".join(re.escape(p) for p in paths)


def write_prompt(
    folder: files.PathLike, rows: Array, facts: BaseFacts, about: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Write a prefix or prompt as PEFT's two files, with whole base parameters that were trained beside it."""
    spelled, of_base = spell_base(facts, (), (), "base_model.")
    tensors = {"prompt_embeddings": rows, **spelled}
    write_files(folder, {**with_head(about, of_base["modules_to_save"] or ()), **config, **of_base}, tensors)
