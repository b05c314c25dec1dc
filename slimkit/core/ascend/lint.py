"""Operators, opsets, dtypes and shapes of an ONNX graph against what a target's documents allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from slimkit.core.ascend.findings import Finding
from slimkit.core.ascend.onnxgraph import OnnxGraph
from slimkit.core.ascend.operators import Generation, float_inputs
from slimkit.core.ascend.targets import AscendTarget

# Operators that the documents do not name, and what an exporter can write instead.
_INSTEAD = {
    "Attention": "export with plain attention at opset 17 or below",
    "Gelu": "export at opset 17 or below, where Gelu is written out with Erf",
    "GroupNormalization": "export at opset 17 or below, where it is written out with InstanceNormalization",
    "Loop": "unroll the loop before exporting",
    "Mish": "write it as x * tanh(softplus(x)), which exports to named operators",
    "QuantizeLinear": "quantize with AMCT, which writes AscendQuant and AscendDequant",
    "DequantizeLinear": "quantize with AMCT, which writes AscendQuant and AscendDequant",
    "RMSNormalization": "export at opset 18 or below, where it is written out with ReduceMean and Sqrt",
    "Scan": "unroll the loop before exporting",
    "SequenceAt": "index tensors, not Python lists of tensors, in the model",
    "Upsample": "export at opset 10 or above, where it becomes Resize",
}
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_UNKNOWN_TYPES = ("string", "complex64", "complex128", "undefined")


def operator_counts(graph: OnnxGraph) -> dict[str, int]:
    """Operator -> how many nodes; those of other domains carry their domain in front."""
    return dict(sorted(Counter(_full(n.domain, n.operator) for n in graph.nodes).items()))


def _full(domain: str, operator: str) -> str:
    return f"{domain}::{operator}" if domain else operator


def lint_operators(graph: OnnxGraph, generation: Generation) -> Iterator[Finding]:
    """Opset and operators against the table of the CANN version."""
    opset = graph.opsets[""]
    source = generation.sources[0]["url"]
    if opset not in generation.opsets:
        allowed = generation.range_text
        yield Finding(
            "error", "opset", "",
            f"opset {opset}; the documents of CANN {generation.cann} name {allowed}",
            f"export with an opset in {allowed}; 13 is in the range of every version", source,
        )  # fmt: skip
    first: dict[tuple[str, str], str] = {}
    count: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        first.setdefault((node.domain, node.operator), node.name or node.operator)
        count[node.domain, node.operator] += 1
    listed = generation.sources[1]["url"]
    for (domain, operator), nodes in count.items():
        where, label = first[domain, operator], f"{_full(domain, operator)} ({nodes} node{'s' if nodes > 1 else ''})"
        if (domain, operator) in graph.functions:
            yield Finding(
                "error", "function", where, f"{label} is a function defined inside the file",
                "inline the functions: onnx.inliner.inline_local_functions(model)",
            )  # fmt: skip
        elif domain:
            yield Finding(
                "error", "operator", where, f"{label} belongs to no domain that the documents name",
                "write it with standard operators, or give atc a plug-in for it", listed,
            )  # fmt: skip
        else:
            support = generation.support(operator)
            if not support.named:
                remedy = _INSTEAD.get(operator, "write it with operators of the list, or give atc a plug-in for it")
                text = f"{label} is not in the list of operators of CANN {generation.cann}"
                yield Finding("error", "operator", where, text, remedy, listed)
            elif support.opsets and opset in generation.opsets and opset not in support.opsets:
                yield Finding(
                    "warning", "operator-opset", where,
                    f"{label} is documented for opset {support.text}, the file has {opset}",
                    f"export with opset {_nearest(support.opsets & generation.opsets or support.opsets, opset)}",
                    listed,
                )  # fmt: skip


def _nearest(opsets: frozenset[int], opset: int) -> int:
    return min(opsets, key=lambda o: (abs(o - opset), -o))


def lint_dtypes(graph: OnnxGraph, device: AscendTarget, precision: str) -> Iterator[Finding]:
    """Types of inputs, weights and casts against what the target computes in."""
    precision_url, inputs_url = device.sources["precision"].url, device.sources["inputs"].url
    users: dict[str, list[str]] = {}
    for weight in graph.weights.values():
        users.setdefault(weight.dtype, []).append(weight.name)
    for value in graph.inputs:
        users.setdefault(value.dtype, []).append(value.name)
    for dtype, names in users.items():
        held = f"{len(names)} tensor{'s' if len(names) > 1 else ''} in {dtype}"
        if dtype in device.refused_dtypes:
            url = device.sources["bfloat16"].url
            yield Finding("error", "dtype", names[0], f"{held}: {device.refused_dtypes[dtype]}", "use float16", url)
        elif dtype in _UNKNOWN_TYPES or dtype.startswith(("float8", "float4", "int4", "uint4", "int2", "uint2")):
            yield Finding("error", "dtype", names[0], f"{held}, which no operator page names", "convert it", "")
        elif dtype == "float64":
            yield Finding("warning", "dtype", names[0], f"{held}; the cube unit takes no float64", "use float32", "")
        elif dtype == "float32" and precision == "fp16":
            yield Finding(
                "info", "precision", "", f"{held}: atc computes them in float16 unless asked otherwise",
                "precision='origin' (--precision origin) keeps float32", precision_url,
            )  # fmt: skip
    for value in graph.inputs:
        if value.dtype not in ("float32", "float16", "uint8", *device.refused_dtypes, *_UNKNOWN_TYPES, "float64"):
            yield Finding(
                "info", "input-dtype", value.name,
                f"input {value.name} is {value.dtype}; the constraints of atc name float32, float16 and uint8 for ONNX",
                "try it; if atc refuses, feed int32 and cast inside the model", inputs_url,
            )  # fmt: skip
    if precision == "origin":
        yield from _origin_inputs(graph)


def _origin_inputs(graph: OnnxGraph) -> Iterator[Finding]:
    """Operators whose page names fewer float types than the file gives them."""
    seen = set()
    for node in graph.nodes:
        told = float_inputs(node.operator) if not node.domain else None
        if told is None or node.operator in seen:
            continue
        given = {graph.weights[n].dtype for n in node.inputs if n in graph.weights} & set(_FLOATS)
        if given - set(told[0]):
            seen.add(node.operator)
            yield Finding(
                "warning", "dtype", node.name or node.operator,
                f"{node.operator} with {', '.join(sorted(given))} weights; its page names {', '.join(told[0])} only",
                "compute in float16, which is atc's default", told[1],
            )  # fmt: skip


def lint_shapes(graph: OnnxGraph, device: AscendTarget) -> Iterator[Finding]:
    """Open axes, axes of length zero, and weights that lie in other files."""
    inputs_url = device.sources["inputs"].url
    for value in graph.inputs:
        if value.shape is None:
            yield Finding(
                "error", "dynamic-shape", value.name, f"input {value.name} does not say how many axes it has",
                "export with shapes",
            )  # fmt: skip
        elif None in value.shape:
            axes = [i for i, size in enumerate(value.shape) if size is None]
            only_batch = "" if axes != [0] else ", or keep the open batch: the command offers it in steps"
            yield Finding(
                "warning", "dynamic-shape", value.name, f"input {value.name} leaves axes {axes} open",
                f"fix them: shapes={{{value.name!r}: [...]}} (--shape {value.name}:...){only_batch}",
            )  # fmt: skip
    if any(None in (v.shape or ()) for v in graph.inputs) and any(w.dtype == "int8" for w in graph.weights.values()):
        yield Finding(
            "error", "dynamic-shape", "", "int8 weights and open axes together",
            "fix the shapes: atc converts a quantized model with fixed shapes only", inputs_url,
        )  # fmt: skip
    # Inner values of length 0 are mostly shape tensors, which the converter computes away.
    ends = {name: graph.shapes.get(name) for name in graph.outputs}
    for name, shape in {**ends, **{v.name: v.shape for v in graph.inputs}}.items():
        if shape is not None and 0 in shape:
            yield Finding(
                "error", "zero-dimension", name, f"{name} has shape {list(shape)}; atc takes no axis of length 0",
                "leave the empty tensor out of the model", inputs_url,
            )  # fmt: skip
    for location in sorted({w.location for w in graph.weights.values() if w.location}):
        lost = [w.name for w in graph.weights.values() if w.location == location and w.missing]
        if lost:
            yield Finding(
                "error", "external-data", lost[0],
                f"{len(lost)} weights lie in {location}, which is missing or too short",
                "copy the file beside the model, under the name it was exported with",
            )  # fmt: skip
        else:
            yield Finding(
                "info",
                "external-data",
                "",
                f"weights lie in {location}",
                "move it together with the model, same folder",
            )
