"""PEFT's LoRAs on parameters that a module reads itself: `nn.MultiheadAttention`, and `target_parameters`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta.bundle import compare_keys
from slimkit.core.delta.spec import LoraSpec, Site
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.match import bounded_regex

Array = np.ndarray[Any, Any]

BELOW = ".base_layer"
# PEFT adds the output projection's delta twice whenever it runs or merges a multi-head attention (0.14 to 0.21), in
# training as well; so its file means twice these numbers.
_TWICE = 2
Held = dict[str, tuple[tuple[str, ...], dict[str, Array]]]


def slug(parameter: str) -> str:
    """A parameter's name as part of an attribute's.

    Example:
        >>> slug("out_proj.weight")
        'out_proj_weight'
    """
    return parameter.replace(".", "_")


def gather_held(
    config: Mapping[str, Any], found: dict[str, dict[str, Array]], site_of: Callable[[str], Site | None]
) -> Held:
    """Take what belongs to such modules out of the factors by path, in place.

    PEFT writes the LoRA of a multi-head attention's input projection under the attention, and that of the output
    projection under its `base_layer.out_proj`. Of several parameters on one module it wraps one around the other, the
    first innermost: each further `base_layer` in a key is one step inwards.

    Returns:
        Path -> parameters, and the factors by slimkit's parts.

    Raises:
        FileFormatError: a module has more or fewer such factors than its configuration names.
        UnsupportedError: a parameter, or a module, that LoRA cannot go on.
    """
    held: Held = {}
    for path in sorted({p.partition(BELOW)[0] for p in found}):
        site = site_of(path)
        nested = [p for p in found if p == path or p.startswith(f"{path}{BELOW}")]
        if site is not None and site.kind == "multihead":
            keys = {"in_proj_weight": path, "out_proj.weight": f"{path}{BELOW}.out_proj"}
        elif site is not None and site.kind == "experts":
            chosen = targeted(config, path, site.parameters)
            keys = {p: path + BELOW * (len(chosen) - 1 - i) for i, p in enumerate(chosen)}
        elif nested == [path]:
            if site is not None and targeted(config, path, ("weight",)) and site.kind not in ("linear", ""):
                raise UnsupportedError(f"target_parameters on the weight of {path}, a {site.type_name}, is not read.")
            continue
        elif site is not None:
            raise UnsupportedError(
                f"the adapter's file has LoRA on parameters that {path} reads itself (multi-head attention, or "
                f"target_parameters); a {site.type_name} takes none of that here."
            )
        else:
            raise FileFormatError(f"the model reads no parameters itself at {path!r}, as the adapter's file wants it.")
        compare_keys(dict.fromkeys(nested, 0), dict.fromkeys(keys.values(), 0), "the adapter's file")
        parts: dict[str, Array] = {}
        for parameter, spelled in keys.items():
            pair = found.pop(spelled)
            if "bias" in pair:
                raise UnsupportedError(f"lora_bias on the {site.kind} parameters of {path} is not read.")
            compare_keys({f"{spelled} {p}": 0 for p in pair}, {f"{spelled} {p}": 0 for p in "ab"}, "the adapter's file")
            b = pair["b"] * pair["b"].dtype.type(_TWICE if parameter == "out_proj.weight" else 1)
            parts |= {f"a_{slug(parameter)}": pair["a"], f"b_{slug(parameter)}": b}
        held[path] = tuple(keys), parts
    return held


def targeted(config: Mapping[str, Any], path: str, parameters: Sequence[str]) -> list[str]:
    """Which of a module's parameters `target_parameters` names, by the whole path or an ending.

    Example:
        >>> targeted({"target_parameters": ["experts.up"]}, "layers.0.experts", ["up", "down"])
        ['up']
    """
    said = [str(t) for t in config.get("target_parameters") or ()]
    keys = {p: f"{path}.{p}" for p in parameters}
    return [p for p, k in keys.items() if any(k == t or k.endswith(f".{t}") for t in said)]


def spec_of_held(config: Mapping[str, Any], path: str, parameters: Sequence[str]) -> LoraSpec:
    """The LoRA on parameters of one module."""
    ends = [path, *(f"{path}.{p}" for p in parameters)]
    options = []
    for field, default in (("rank_pattern", config.get("r", 8)), ("alpha_pattern", config.get("lora_alpha", 8))):
        values = {p: pattern_value(config.get(field), p, default) for p in ends}
        chosen = {v for v in values.values() if v != default} or {default}
        if len(chosen) > 1:
            raise UnsupportedError(f"{field} gives the parameters of {path} different values, which is not read.")
        options.append(chosen.pop())
    rank, alpha = check.positive(options[0], f"r of {path}"), check.number(options[1], f"lora_alpha of {path}")
    return LoraSpec(rank, float(alpha), rslora=bool(config.get("use_rslora")), parameters=tuple(parameters))


def spell_held(path: str, site: Site, spec: LoraSpec, parts: Mapping[str, Array]) -> dict[str, Array]:
    """Such a LoRA's factors by PEFT's paths and suffixes."""
    if site.kind == "multihead":
        keys = {"in_proj_weight": path, "out_proj.weight": f"{path}{BELOW}.out_proj"}
    else:
        order = [p for p in site.parameters if p in spec.parameters]
        keys = {p: path + BELOW * (len(order) - 1 - i) for i, p in enumerate(order)}
    spelled = {}
    for parameter in spec.parameters:
        b = parts[f"b_{slug(parameter)}"]
        spelled[f"{keys[parameter]}.lora_A.weight"] = parts[f"a_{slug(parameter)}"]
        spelled[f"{keys[parameter]}.lora_B.weight"] = b / b.dtype.type(_TWICE if parameter == "out_proj.weight" else 1)
    return spelled


def lacking_held(config: Mapping[str, Any], sites: Mapping[str, Site], found: Iterable[str]) -> list[str]:
    """Paths of modules whose parameters `target_parameters` names and that the file has nothing for."""
    there = set(found)
    lacking = []
    for path, site in sites.items():
        parameters = site.parameters if site.kind == "experts" else ("weight",) if site.kind == "linear" else ()
        if path not in there and targeted(config, path, parameters):
            lacking.append(path)
    return lacking


def pattern_value(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: a regular expression over the end of a path, from a dot on.

    Example:
        >>> pattern_value({"layers.1.q": 4}, "model.layers.1.q", 8), pattern_value({}, "k", 8)
        (4, 8)
    """
    for pattern, value in (patterns or {}).items():
        test = bounded_regex(str(pattern).removeprefix("^"))
        parts = path.split(".")
        ends = [path] if str(pattern).startswith("^") else [".".join(parts[i:]) for i in range(len(parts))]
        if any(test.fullmatch(end) for end in ends):
            return value
    return default
