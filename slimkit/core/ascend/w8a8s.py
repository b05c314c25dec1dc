"""W8A8S folders: sparse int8 weights, static int8 inputs, as vLLM-Ascend and MindIE read them for the 310P."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimkit.core import check, files, match
from slimkit.core.ascend import folder as folders
from slimkit.core.ascend.entropy import lzma_bits, mean_entropy
from slimkit.core.ascend.folder import DENSE, Array
from slimkit.core.ascend.inputs import RANGES, input_error, inputs_of
from slimkit.core.ascend.int8 import PARTS, Int8Layer, int8_layer, on_grid
from slimkit.core.ascend.w16a16s import as_halves
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.log import logger
from slimkit.core.showing import Shown
from slimkit.core.sparse.framework import SparseFramework

WEIGHTS = "quant_model_weight_w8a8s.safetensors"
KIND = "W8A8S"

# A layer stays float16 where rounding its inputs changes more of its answers.
MOST_ERROR = 0.1

# Parameters of nn.MultiheadAttention, which multiplies with them and with its output layer's weight itself.
_READ = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# Layers that servers join into one, which then has one input step: all of them are int8, or none.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, repr=False)
class W8A8SReport(Shown):
    """What was written.

    Args:
        directory: the folder.
        layers: layer -> {"zeros": share, "low", "high": of its inputs, "input_scale", "input_offset", "input_error":
            the share of its answers that rounding its inputs changes}.
        kept_float: layer on the grid -> the same share, for those that stay float16 because one step for all their
            inputs loses too much, and those that are served as one with them.
        dense: tensors that stay floats.
        zero_ratio: share of zeros over all int8 weights.
        weight_bytes: bytes of all tensors.
        entropy_bits: bits a weight that the int8 weights hold, of 8: what a codec of single bytes needs at least.
        lzma_bits: the same as LZMA packs them, a general packer that may find what single bytes do not show.
        copied: files copied beside them.
        tied: tensor that is not written -> the one that it is.
    """

    directory: str
    layers: dict[str, dict[str, float]]
    kept_float: dict[str, float]
    dense: list[str]
    zero_ratio: float
    weight_bytes: int
    entropy_bits: float
    lzma_bits: float
    copied: list[str]
    tied: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class W8A8S(Shown):
    """A W8A8S folder in memory.

    Args:
        tensors: name -> array.
        kinds: name -> "W8A8S" or "FLOAT".
        config: what config.json says.
    """

    tensors: dict[str, Array]
    kinds: dict[str, str]
    config: dict[str, Any]

    @property
    def layers(self) -> dict[str, Int8Layer]:
        """The int8 layers by name."""
        names = [n.removesuffix(".weight") for n, kind in self.kinds.items() if kind == KIND and n.endswith(".weight")]
        return {name: Int8Layer(**{part: self.tensors[f"{name}.{part}"] for part in PARTS}) for name in names}


def save(
    directory: files.PathLike,
    host: SparseFramework,
    arrays: Mapping[str, Array],
    dataset: Any,
    config: Any,
    *,
    targets: Sequence[str] | None = None,
    ranges: str = "minmax",
    most_error: float = MOST_ERROR,
    tied: Mapping[str, str] | None = None,
    named: Mapping[str, str] | None = None,
) -> W8A8SReport:
    """Write a model on the int8 grid as a W8A8S folder; the wings' `save_w8a8s` says the rest.

    Args:
        directory: the folder.
        host: the model.
        arrays: tensor's name in the folder -> array.
        dataset: batches.
        config: what config.json shall say, or a folder.
        targets: globs over layer names; None takes every linear layer whose weight is on the grid.
        ranges: "minmax" or "percentile".
        most_error: the largest share of a layer's answers that rounding its inputs may change.
        tied: name -> the name of the same tensor, which stands before it.
        named: layer -> its name in the folder, where that is another.
    """
    folder = files.as_path(directory, "directory")
    check.choice(ranges, RANGES, "ranges")
    check.number(most_error, "most_error", minimum=0.0)
    settings, companions = folders.settings_of(config, KIND)
    called = dict(named or {})
    known, _ = host.layers(dataset)
    # An attention that reads its weights itself is no layer that a reader of the folder calls.
    read = {n.partition("[")[0].rpartition(".")[0] for n in known if n.partition("[")[0].endswith(_READ)}
    linear = {
        n: called.get(n, n)
        for n, layer in known.items()
        if layer.kind == "linear" and not (n.endswith("out_proj") and n.rpartition(".")[0] in read)
    }
    linear = {n: name for n, name in linear.items() if f"{name}.weight" in arrays}
    if targets is None:
        chosen = [n for n, name in linear.items() if on_grid(arrays[f"{name}.weight"])]
    else:
        found = match.match(list(linear), check.strings(targets, "targets"), whole_modules=True)
        match.demand(found, list(linear), "targets")
        chosen = list(found.names)
    if not chosen:
        raise ArgumentError(
            f"model must hold a linear layer on the int8 grid. Received: none among {len(linear)}. Compress it with "
            "SparseConfig(weight_bits=8)."
        )
    _demand_whole_groups(linear, set(chosen))
    inputs = inputs_of(host, dataset, chosen, ranges)
    if missing := [n for n in chosen if n not in inputs]:
        raise ArgumentError(f"calibration must reach every layer: none of its batches reached {', '.join(missing[:3])}")
    once = dict(tied or {}) if settings.get("tie_word_embeddings") is True else {}
    layers, rows = dict[str, Int8Layer](), dict[str, dict[str, float]]()
    for layer in chosen:
        weight, shown = arrays[f"{linear[layer]}.weight"], inputs[layer]
        layers[layer] = int8_layer(layer, weight, arrays.get(f"{linear[layer]}.bias"), shown.low, shown.high)
        rows[layer] = {
            "zeros": 1 - np.count_nonzero(layers[layer].weight) / layers[layer].weight.size,
            "low": shown.low,
            "high": shown.high,
            "input_scale": float(layers[layer].input_scale[0]),
            "input_offset": int(layers[layer].input_offset[0]),
            "input_error": input_error(layers[layer], weight, shown.rows),
        }
    kept = _too_rough(linear, {n: row["input_error"] for n, row in rows.items()}, most_error)
    _demand_allowed(kept, targets, len(chosen), most_error)
    chosen = [n for n in chosen if n not in kept]
    made = {linear[n]: layers[n] for n in chosen}
    tensors, kinds = dict[str, Array](), dict[str, str]()
    halves, _ = as_halves({n: v for n, v in arrays.items() if n not in once})
    for name, value in halves.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in made:
            for own in PARTS:
                tensors[f"{layer}.{own}"], kinds[f"{layer}.{own}"] = getattr(made[layer], own), KIND
        else:
            tensors[name], kinds[name] = value, DENSE
    copied = folders.write(folder, WEIGHTS, tensors, settings, companions, KIND, kinds, once)
    sizes = [made[linear[n]].weight.size for n in chosen]
    return W8A8SReport(
        directory=str(folder),
        layers={n: rows[n] for n in chosen},
        kept_float=kept,
        dense=[name for name, kind in kinds.items() if kind == DENSE],
        zero_ratio=float(np.average([rows[n]["zeros"] for n in chosen], weights=sizes)),
        weight_bytes=sum(v.nbytes for v in tensors.values()),
        entropy_bits=mean_entropy(layer.weight for layer in made.values()),
        lzma_bits=lzma_bits([layer.weight for layer in made.values()]),
        copied=copied,
        tied=once,
    )


def joined(linear: Mapping[str, str]) -> Iterator[list[str]]:
    """Layers that a server joins into one, together.

    Args:
        linear: layer -> its name in the folder.
    """
    for name in linear.values():
        head, _, own = name.rpartition(".")
        for group in JOINED:
            if own == group[0]:
                yield [n for n, other in linear.items() if other in {f"{head}.{part}" for part in group}]


def _demand_whole_groups(linear: Mapping[str, str], chosen: set[str]) -> None:
    """Layers that a server joins must all be int8 or all be floats."""
    for beside in joined(linear):
        left = [n for n in beside if n not in chosen]
        if left and len(left) < len(beside):
            raise ArgumentError(
                f"{beside[0]!r} and its like are served as one layer, so all must be int8 or none. Received: "
                f"{left[0]!r} is not on the int8 grid, or not among targets"
            )


def _too_rough(linear: Mapping[str, str], errors: Mapping[str, float], most: float) -> dict[str, float]:
    """The layers that rounding their inputs, or those of one that is served with them, changes too much."""
    rough = {n for n, error in errors.items() if error > most}
    for beside in joined({n: linear[n] for n in errors}):
        if rough & set(beside):
            rough |= set(beside)
    return {n: error for n, error in errors.items() if n in rough}


def _demand_allowed(kept: Mapping[str, float], targets: Any, number: int, most: float) -> None:
    """Say which layers stay float16; refuse where they were asked for by name, or none is left."""
    if not kept:
        return
    worst = max(kept, key=lambda n: kept[n])
    said = f"one step for all inputs of {worst!r} changes {kept[worst]:.3g} of its answers, more than most_error={most}"
    if targets is not None:
        raise ArgumentError(
            f"{said}; {len(kept)} of the {number} targets are such. Leave them out of targets, to stay float16, or "
            "allow more by most_error"
        )
    if len(kept) == number:
        raise ArgumentError(f"{said}; no layer is left to write. Allow more by most_error")
    logger.warning("%d of %d layers on the int8 grid stay float16: %s", len(kept), number, said)


def demand_linear(name: str, layer: Int8Layer, shape: Sequence[int] | None) -> None:
    """Refuse to put an int8 layer in the place of what is no linear layer of its shape; None is such a thing."""
    if shape is None or tuple(shape) != layer.weight.shape:
        what = "no linear layer" if shape is None else f"one of shape {tuple(shape)}"
        raise ArgumentError(f"model must hold a linear layer {name!r} of shape {layer.weight.shape}. Received: {what}")


def load_w8a8s(directory: files.PathLike) -> W8A8S:
    """Read a W8A8S folder and check that its files agree and every layer is whole.

    Args:
        directory: the folder.

    Returns:
        Tensors, their kinds, the config, and `layers`, which compute as the device does.

    Raises:
        FileFormatError: a file is missing or damaged, the description is of another kind, the two disagree, or a
            layer's tensors are not those that the device reads.
        LinkPathError: a file is a symbolic link.

    Source:
        MindIE's documentation of W8A8SC sparse quantization and vLLM-Ascend's W8A8S scheme for the 310P.

    Example:
        >>> from slimkit.core.ascend.folder import write
        >>> layer = int8_layer("fc", np.eye(2), None, 0.0, 1.0)
        >>> parts = {f"fc.{part}": getattr(layer, part) for part in PARTS}
        >>> from pathlib import Path
        >>> _ = write(Path("/tmp/w8a8s"), WEIGHTS, parts, {}, [], KIND, dict.fromkeys(parts, KIND))
        >>> load_w8a8s("/tmp/w8a8s").layers["fc"](np.array([[1.0, 0.5]], np.float32)).round(2)
        array([[1. , 0.5]], dtype=float32)
    """
    folder, tensors, kinds, config = folders.read(directory, WEIGHTS, KIND)
    for name, kind in kinds.items():
        layer, _, part = name.rpartition(".")
        if kind != KIND:
            if tensors[name].dtype.kind == "f" and tensors[name].dtype != np.float16:
                raise FileFormatError(f"{folder / WEIGHTS}: {name} must be float16. Received: {tensors[name].dtype}")
            continue
        if part not in PARTS:
            raise FileFormatError(f"{folder / WEIGHTS}: {name} is no tensor of a {KIND} layer: {', '.join(PARTS)}")
        rows = len(tensors[f"{layer}.weight"]) if kinds.get(f"{layer}.weight") == KIND else None
        wanted = {"input_scale": (1,), "input_offset": (1,), "quant_bias": (rows,), "deq_scale": (rows,)}
        value = tensors[name]
        lacks = [own for own in PARTS if kinds.get(f"{layer}.{own}") != KIND]
        if lacks:
            raise FileFormatError(f"{folder / WEIGHTS}: layer {layer} has no {', '.join(lacks)}")
        if value.dtype != PARTS[part] or (value.ndim != 2 if part == "weight" else value.shape != wanted[part]):
            raise FileFormatError(
                f"{folder / WEIGHTS}: {name} must be {PARTS[part]} of shape {wanted.get(part, '(n, k)')}. Received: "
                f"{value.dtype} {value.shape}"
            )
    found = W8A8S(tensors, kinds, config)
    for name, int8 in found.layers.items():
        scales = np.concatenate([int8.scale, int8.input_scale.astype(np.float32)])
        inside = (int8.deq_scale >= 0) & (int8.deq_scale < 2**32)
        if not (np.all(inside) and np.all(np.isfinite(scales)) and np.all(scales > 0)):
            raise FileFormatError(f"{folder / WEIGHTS}: the scales of {name} must be positive float32 bits.")
    return found
