"""The weights that the cube unit multiplies with: which they are, their padding, row bytes and zeros."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.ascend.findings import Finding
from slimkit.core.ascend.onnxgraph import OnnxGraph, OnnxNode, Weight
from slimkit.core.ascend.padding import LayerWaste, layer_waste
from slimkit.core.ascend.shapes import Shape
from slimkit.core.ascend.targets import ITEM_BYTES, AscendTarget

Array = np.ndarray[Any, Any]

# Padding is worth a warning from this share of the layer and this share of the model.
_NOTABLE_WASTE = 0.1
_NOTABLE_SHARE = 0.01
# Fewer zeros than this is chance or initialisation, not a sparsity pattern.
_NOTABLE_ZEROS = 0.25


@dataclass(frozen=True)
class WeightedNode:
    """A node with the weight it multiplies by; `order` turns the weight to (out, in, kernel ...)."""

    node: OnnxNode
    weight: Weight
    order: tuple[int, ...]
    shape: tuple[int, ...]
    groups: int
    rows: int | None

    @property
    def name(self) -> str:
        return self.node.name or self.weight.name


def layers_of(graph: OnnxGraph) -> list[WeightedNode]:
    """Every MatMul, Gemm, Conv and ConvTranspose whose second input is a weight."""
    found = []
    for node in graph.nodes:
        weight = graph.weights.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if node.domain or weight is None or len(weight.shape) < 2 or 0 in weight.shape:
            continue
        order = _order(node, len(weight.shape))
        if order is not None:
            groups = max(node.numbers.get("group", 1), 1) if node.operator.startswith("Conv") else 1
            shape = tuple(weight.shape[i] for i in order)
            found.append(WeightedNode(node, weight, order, shape, groups, _rows(node, graph)))
    return found


def _order(node: OnnxNode, axes: int) -> tuple[int, ...] | None:
    if node.operator == "Conv" and axes > 2:
        return tuple(range(axes))
    if node.operator == "ConvTranspose" and axes > 2:
        return (1, 0, *range(2, axes))
    if node.operator == "Gemm" and axes == 2:
        return (0, 1) if node.numbers.get("transB") else (1, 0)
    if node.operator == "MatMul" and axes == 2:
        return (1, 0)
    return None


def _rows(node: OnnxNode, graph: OnnxGraph) -> int | None:
    """How many vectors meet the weight in one run: batch times positions."""
    transposed = node.operator == "ConvTranspose"
    shape: Shape | None = graph.shapes.get(node.inputs[0] if transposed else node.outputs[0]) if node.outputs else None
    if not shape:
        return None
    sizes = (shape[0], *shape[2:]) if node.operator.startswith("Conv") else shape[:-1]
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def dtype_on(device: AscendTarget, weight: Weight, precision: str) -> str:
    """What the layer is computed in: float16 for every float unless the file's own types are kept."""
    if weight.dtype in ("float32", "float64") and precision == "fp16":
        return "float16"
    return weight.dtype


def lint_padding(
    layers: list[WeightedNode], device: AscendTarget, precision: str, wastes: list[LayerWaste]
) -> Iterator[Finding]:
    """Widths that do not fill whole blocks, and rows that are no multiple of 512 bytes; fills `wastes`."""
    counted = []
    for layer in layers:
        dtype = dtype_on(device, layer.weight, precision)
        if layer.groups > 1:
            yield Finding(
                "info", "alignment", layer.name,
                f"{layer.groups} groups: no document says how their blocks are packed; left out of the sums",
            )  # fmt: skip
            continue
        waste = layer_waste(layer.name, layer.shape, dtype, device, layer.rows)
        if waste is not None:
            wastes.append(waste)
            counted.append((layer, waste))
    total = sum(waste.padded_bytes for waste in wastes)
    for layer, waste in counted:
        block = device.block(waste.dtype) or (1, 1)
        odd = [
            f"{size} {what} channels fill blocks of {step}"
            for size, step, what in zip(layer.shape[:2], block, ("output", "input"))
            if size % step
        ]
        if odd:
            # A first layer of three channels wastes most of itself and nothing of the model.
            padding = waste.padded_bytes - waste.weight_bytes
            grave = waste.wasted_bytes >= _NOTABLE_WASTE and padding >= _NOTABLE_SHARE * total
            yield Finding(
                "warning" if grave else "info", "alignment", layer.name,
                f"{' and '.join(odd)}: {waste.wasted_bytes:.0%} of its bytes are padding",
                f"choose widths that are multiples of {max(block)}; in pruning set_alignment({max(block)})",
                device.sources["blocks"].url,
            )  # fmt: skip
    for dtype in dict.fromkeys(waste.dtype for _, waste in counted):
        matrices = [layer for layer, waste in counted if waste.dtype == dtype and len(layer.shape) == 2]
        if device.row_bytes:
            yield from _short_rows(matrices, dtype, device, device.row_bytes)


def _short_rows(found: list[WeightedNode], dtype: str, device: AscendTarget, wanted: int) -> Iterator[Finding]:
    """The rows that layers read and write, where they are no multiple of what full bandwidth wants."""
    size = ITEM_BYTES[dtype]
    short = {layer.name: [w * size for w in layer.shape if w * size % wanted] for layer in found}
    names = [name for name, widths in short.items() if widths]
    if names:
        widths = sorted({w for widths in short.values() for w in widths})
        shown = ", ".join(map(str, widths[:6])) + (" ..." if len(widths) > 6 else "")
        yield Finding(
            "info", "row-bytes", names[0],
            f"{len(names)} layers read or write rows of {shown} bytes; full bandwidth wants multiples of {wanted}",
            f"widths that are multiples of {wanted // size}", device.sources["rows"].url,
        )  # fmt: skip


def legal_groups(nonzero: Array) -> tuple[int, int]:
    """Of all groups of four neighbouring input channels, how many hold at least two zeros.

    Args:
        nonzero: (out, in, kernel ...), True where a weight is not zero. A last group that is short is filled with
            zeros, as the padding fills it.

    Returns:
        Legal groups and all groups.

    Example:
        >>> legal_groups(np.array([[True, False, True, False, True]]))
        (2, 2)
        >>> legal_groups(np.array([[True, True, True, False]]))
        (0, 1)
    """
    moved = np.moveaxis(nonzero, 1, -1).reshape(-1, nonzero.shape[1])
    short = -moved.shape[1] % 4
    if short:
        moved = np.pad(moved, ((0, 0), (0, short)))
    kept = sum(moved[:, i::4].astype(np.uint8) for i in range(4))
    return int(np.count_nonzero(kept <= 2)), moved.size // 4


def lint_sparsity(layers: list[WeightedNode], device: AscendTarget, legal: list[str]) -> Iterator[Finding]:
    """Zeros that the target can use, and zeros that it cannot; fills `legal` with the layers that are 4:2."""
    zeros = entries = 0
    not_quantized = []
    for layer in layers:
        found = layer.weight.nonzero()
        if found is None:
            continue
        nonzero = found.transpose(layer.order)
        share = 1 - np.count_nonzero(nonzero) / nonzero.size
        zeros, entries = zeros + nonzero.size - np.count_nonzero(nonzero), entries + nonzero.size
        if device.sparsity != "4:2" or share < _NOTABLE_ZEROS:
            continue
        good, groups = legal_groups(nonzero)
        if good < groups:
            yield Finding(
                "warning", "sparsity", layer.name,
                f"{share:.0%} of its weights are zero, but only {good} of {groups} groups of four input channels hold "
                "two zeros: the target computes it as dense",
                "sparsify with pattern='4:2'", device.sources["sparsity"].url,
            )  # fmt: skip
        elif layer.groups > 1:
            yield Finding(
                "warning", "sparsity", layer.name, f"4:2, but in {layer.groups} groups: computed as dense",
                "leave grouped layers out of the sparsity", device.sources["sparsity-rule"].url,
            )  # fmt: skip
        else:
            legal.append(layer.name)
            if layer.weight.dtype not in ("int8", "uint8"):
                not_quantized.append(layer.name)
    if legal:
        yield Finding("info", "sparsity", legal[0], f"{len(legal)} layers are 4:2; the command says --sparsity=1",
                      "", device.sources["sparsity"].url)  # fmt: skip
    if not_quantized:
        yield Finding(
            "warning", "sparsity", not_quantized[0],
            f"{len(not_quantized)} layers are 4:2 in floating point; the documented fusion takes int8 or uint8 only",
            "quantize after sparsifying (AMCT), then convert", device.sources["sparsity-rule"].url,
        )  # fmt: skip
    if device.sparsity == "unstructured" and entries and zeros / entries >= _NOTABLE_ZEROS:
        yield Finding(
            "info", "sparsity", "",
            f"{zeros / entries:.0%} of the weights are zero; atc has no use for them on the {device.name}",
            "for language models, save_w16a16s writes what MindIE compresses for this device",
            device.sources["sparsity"].url,
        )  # fmt: skip
