"""What a PEFT adapter of the LoRA family says: LoRA, AdaLoRA and VeRA as LoRAs, and what else is in their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta import ia3, miss, shira
from slimkit.core.delta.base import BaseValue
from slimkit.core.delta.bundle import compare_keys
from slimkit.core.delta.peft import KINDS, ROOT
from slimkit.core.delta.peft_held import gather_held, pattern_value, spec_of_held
from slimkit.core.delta.peft_summed import read_miss, read_shira
from slimkit.core.delta.peft_targets import in_modules
from slimkit.core.delta.spec import LoraSpec, Site, key
from slimkit.core.delta.tensors import wide
from slimkit.core.errors import FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]

# peft_type -> suffix of a key in its file -> what it is
_PARTS: dict[str, dict[str, str]] = {
    "LORA": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_B.bias": "bias",
        ".lora_embedding_A": "a",
        ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude",
    },
    "ADALORA": {".lora_A": "a", ".lora_B": "b", ".lora_E": "e", ".lora_embedding_A": "a", ".lora_embedding_B": "b"},
    "VERA": {".vera_lambda_b": "lambda_b", ".vera_lambda_d": "lambda_d"},
    "TRAINABLE_TOKENS": {},
    "IA3": {".ia3_l": "l"},
    "MISS": {".miss_block": "block"},
    "SHIRA": {".shira_weight": "values", ".shira_indices": "index"},
}
FAMILY = tuple(_PARTS)
# kind, where it is no LoRA -> part -> its name below a layer
_NAMES = {
    "ia3": {"l": ia3.PART},
    "miss": {"block": miss.PART},
    "shira": {"values": shira.VALUES, "index": shira.INDEX},
}
_ROWS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
# Options under which the numbers in the file mean something that slimkit has no layer for.
_FOREIGN = (
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "velora_config", "kasa_config", "monteclora_config", "arrow_config", "megatron_config",
)  # fmt: skip
# Starts that take something out of the base: what slimkit can work out again, and what it cannot.
_TAKES_OUT = ("pissa", "olora")
_CHANGES_BASE = ("corda", "loftq", "lora_ga")


@dataclass
class Adapter:
    """One file, in slimkit's words.

    Args:
        layers: path -> LoRA, or the options of another kind.
        kind: what they are.
        parts: tensors by slimkit's keys below a path.
        base: name of a base tensor -> its value.
        rows: path of an embedding -> (indices, values) of single rows.
        takes_out: path -> the start ("pissa", "olora") whose part the base is without.
        notes: what is worth a line in the report.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    kind: str = "lora"
    parts: dict[str, dict[str, Array]] = field(default_factory=dict)
    base: dict[str, BaseValue] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Array]] = field(default_factory=dict)
    takes_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, name: str) -> dict[str, Any]:
        """The delta's record, as a bundle holds it."""
        layers = {path: spec.to_dict() for path, spec in self.layers.items()}
        return {"name": name, "file_name": name, "kind": self.kind, "layers": layers}

    def tensors(self, name: str) -> dict[str, Array]:
        """The tensors by the names that a bundle gives them."""
        return {
            f"{path}.{_NAMES[self.kind][part] if self.kind in _NAMES else key('lora', part, name)}": value
            for path, parts in self.parts.items()
            for part, value in parts.items()
        }


def read_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Array], site_of: Callable[[str], Site | None] = lambda path: None
) -> Adapter:
    """What a file says.

    Args:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`.
        site_of: what the model has at a path of the file.

    Raises:
        UnsupportedError: an option that gives the numbers another meaning.
        FileFormatError: a factor without its other half, or a key of no known form.
    """
    foreign = [option for option in _FOREIGN if config.get(option)]
    if foreign:
        raise UnsupportedError(f"the adapter uses {', '.join(foreign)}, which slimkit does not read.")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"the adapter was made with init_lora_weights={config['init_lora_weights']!r}, which changes the base "
            f"itself; save it converted (path_initial_model_for_weight_conversion) and load that."
        )
    kind = str(config["peft_type"])
    suffixes = _PARTS[kind]
    adapter = Adapter()
    found: dict[str, dict[str, Array]] = {}
    for full, value in tensors.items():
        stem = full.removeprefix(ROOT)
        suffix = next((s for s in suffixes if stem.endswith(s)), None)
        row = next((s for s in _ROWS if stem.endswith(s)), None)
        if full in ("base_model.vera_A", "base_model.vera_B"):
            continue
        if stem == full:
            raise FileFormatError(f"the key {full!r} does not begin with {ROOT!r}.")
        if suffix is not None:
            found.setdefault(stem.removesuffix(suffix), {})[suffixes[suffix]] = value
        elif row is not None:
            path = stem.removesuffix(row)
            adapter.rows[path] = (_indices(config, path, len(value)), value)
        elif any(word in stem for word in (".lora_", ".vera_", ".ia3_", ".miss_", ".shira_")):
            raise FileFormatError(f"the key {full!r} is none that slimkit knows{check.near(stem, list(suffixes))}.")
        else:
            adapter.base[stem.replace(".base_layer.", ".")] = _base_value(config, stem, value)
    held = gather_held(config, found, site_of)
    if KINDS[kind] in _NAMES:
        _no_loras(config, found, adapter)
    if kind == "ADALORA":
        _singular_values(config, found, adapter)
    if kind == "VERA":
        _projections(config, tensors, found)
    embeddings = {k.removeprefix(ROOT).partition(".lora_embedding_")[0] for k in tensors if ".lora_embedding_" in k}
    for path, (parameters, parts) in held.items():
        adapter.layers[path] = spec_of_held(config, path, parameters)
        adapter.parts[path] = parts
    for path, parts in found.items():
        adapter.layers[path] = spec = _spec(config, path, parts, embedded=path in embeddings)
        adapter.parts[path] = {p: v.reshape(-1) if p in ("magnitude", "bias") else v for p, v in parts.items()}
        if init.startswith(_TAKES_OUT):
            adapter.takes_out[path] = "pissa" if init.startswith("pissa") else "olora"
            adapter.layers[path] = LoraSpec(**{**spec.to_dict(), "init": "pissa"})
    if init.startswith("pissa_niter"):
        adapter.notes.append(f"the base was taken apart by {init}, a random method; slimkit takes the exact one.")
    if not (adapter.layers or adapter.rows or adapter.notes):
        what = f"tensor of {kind}" if KINDS[kind] in _NAMES else "LoRA factor"
        raise FileFormatError(f"the adapter's file holds no {what}.")
    return adapter


def _base_value(config: Mapping[str, Any], stem: str, value: Array) -> BaseValue:
    """A whole tensor: a module's own copy (`modules_to_save`), a bias, or the table under a LoRA."""
    below = ".base_layer." in stem
    if not below and (config.get("ensure_weight_tying") or in_modules(stem, config.get("modules_to_save"))):
        return BaseValue(value, own=True, group="tied" if config.get("ensure_weight_tying") else "")
    # IA3 and SHiRA have no word for biases: one that is in their file was trained.
    mode = config.get("bias", "all" if config["peft_type"] in ("IA3", "SHIRA") else "none")
    trains = str(mode) != "none" and stem.endswith("bias")
    return BaseValue(value, trains=trains)


def _spec(config: Mapping[str, Any], path: str, parts: Mapping[str, Array], *, embedded: bool) -> LoraSpec:
    """One layer's LoRA, its parts checked against the configuration."""
    vera = config["peft_type"] == "VERA"
    dora, bias = bool(config.get("use_dora")), bool(config.get("lora_bias"))
    if bias and (embedded or dora):
        raise UnsupportedError(f"lora_bias on an embedding or with use_dora is not read: {path}.")
    wanted = {"a", "b"} | ({"magnitude"} if dora else set()) | ({"bias"} if bias else set())
    compare_keys({f"{path} {p}": 0 for p in parts}, {f"{path} {p}": 0 for p in wanted}, "the adapter's file")
    rank = int(parts["a"].shape[0])
    if config["peft_type"] == "LORA":
        said = pattern_value(config.get("rank_pattern"), path, config.get("r", rank))
        if said != rank:
            hint = "; it looks transposed" if parts["a"].ndim == 2 and parts["a"].shape[1] == said else ""
            raise FileFormatError(f"{path}: lora_A has {rank} rows, its configuration says rank {said}{hint}.")
    alpha = rank if vera else pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    alpha = float(check.number(alpha, f"lora_alpha of {path}"))
    if config["peft_type"] == "ADALORA":
        # AdaLoRA divides by the rank it began with, however many directions are left, and keeps clear of zero.
        begun = int(config.get("init_r") or rank)
        alpha = (alpha if alpha > 0 else float(rank)) * rank / (begun + 1e-5)
    return LoraSpec(
        rank=max(rank, 1),
        alpha=alpha,
        dropout=0.0 if embedded else float(config.get("lora_dropout") or config.get("vera_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=dora,
        bias=bias,
    )


def _no_loras(config: Mapping[str, Any], found: dict[str, dict[str, Array]], adapter: Adapter) -> None:
    """The layers of another kind out of what was found, in place."""
    adapter.kind = KINDS[str(config["peft_type"])]
    for path in list(found):
        parts = found.pop(path)
        if adapter.kind == "ia3":
            adapter.layers[path] = ia3.spec_of_file(config, path, tuple(parts["l"].shape))
            parts = {"l": parts["l"].reshape(-1)}
        else:
            read = read_miss if adapter.kind == "miss" else read_shira
            adapter.layers[path] = read(config, path, parts)
        adapter.parts[path] = parts


def _singular_values(config: Mapping[str, Any], found: dict[str, dict[str, Array]], adapter: Adapter) -> None:
    """AdaLoRA's diagonal into a, in place; a layer that lost all its directions is no LoRA any more."""
    for path in list(found):
        parts = found[path]
        compare_keys({f"{path} {p}": 0 for p in parts}, {f"{path} {p}": 0 for p in "abe"}, "the adapter's file")
        if parts["a"].shape[0] == 0:
            del found[path]
            adapter.notes.append(f"{path} has no direction left and changes nothing")
            continue
        e = parts.pop("e")
        parts["a"] = (wide(parts["a"]) * wide(e)).astype(parts["a"].dtype)


def _projections(config: Mapping[str, Any], tensors: Mapping[str, Array], found: dict[str, dict[str, Array]]) -> None:
    """VeRA's shared random matrices and the vectors around them as a and b, in place."""
    if not all(f"base_model.vera_{m}" in tensors for m in "AB"):
        raise UnsupportedError(
            "the adapter was saved with save_projection=False: its random matrices are not in the file, and which they "
            "are depends on the machine they were drawn on. Save it with save_projection=True."
        )
    shared = [wide(tensors[f"base_model.vera_{m}"]) for m in "AB"]
    for path, parts in found.items():
        wanted = {f"{path} lambda_b": 0, f"{path} lambda_d": 0}
        compare_keys({f"{path} {p}": 0 for p in parts}, wanted, "the adapter's file")
        first, last = wide(parts.pop("lambda_d")), wide(parts.pop("lambda_b"))
        parts["a"] = first[:, None] * shared[0]  # (r, widest input); cut to the layer where it is known
        parts["b"] = last[:, None] * shared[1][: len(last)]


def _indices(config: Mapping[str, Any], path: str, count: int) -> list[int]:
    said = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(said, Mapping):
        said = next((v for k, v in said.items() if path.endswith(k)), [])
    indices = [int(check.integer(i, f"token index of {path}", minimum=0)) for i in said]
    if len(indices) != count:
        raise FileFormatError(f"{path}: the file holds {count} rows, its configuration names {len(indices)} tokens.")
    return indices


def taken_out(start: str, weight: Array, spec: LoraSpec) -> tuple[Array, Array]:
    """a and b that a start took out of a weight (outputs, inputs): scaling * b @ a is what the base is without.

    Source:
        Meng et al. 2024, "PiSSA", sec. 3; Büyükakyüz 2024, "OLoRA", sec. 3.

    Example:
        >>> a, b = taken_out("olora", np.eye(3, dtype=np.float32), LoraSpec(3, 3.0))
        >>> np.allclose(b @ a, np.eye(3))
        True
    """
    matrix = weight.astype(np.float32)
    if start == "olora":
        q, r = np.linalg.qr(matrix)
        return r[: spec.rank], q[:, : spec.rank]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[: spec.rank] / spec.scaling)
    return root[:, None] * vt[: spec.rank], u[:, : spec.rank] * root
