"""`check_onnx`: whether a file will convert for a target, what it wastes there, and the `atc` line to run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from slimkit.core import check, files
from slimkit.core.ascend.findings import Finding, OnnxCheck, in_order
from slimkit.core.ascend.lint import lint_dtypes, lint_operators, lint_shapes, operator_counts
from slimkit.core.ascend.onnxgraph import OnnxGraph, read_onnx
from slimkit.core.ascend.operators import Generation
from slimkit.core.ascend.padding import LayerWaste
from slimkit.core.ascend.targets import AscendTarget
from slimkit.core.ascend.targets import target as find_target
from slimkit.core.ascend.weights import layers_of, lint_padding, lint_sparsity

PRECISIONS = ("fp16", "origin")
# Batch sizes the command offers for an open batch axis; a start, to be edited.
_BATCHES = "1,2,4,8"


def check_onnx(
    file: files.PathLike,
    target: str | AscendTarget,
    cann: str = "8.0",
    *,
    soc_version: str | None = None,
    precision: str = "fp16",
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> OnnxCheck:
    """Check an ONNX file against what Ascend's documents say of a target; nothing is run and no device is needed.

    Args:
        file: the ONNX file; weights in files beside it are found.
        target: "310P", "A2" or "A3".
        cann: the CANN version that will convert it, for example "8.0" or "7.0.0"; 5 to 9 are in the table.
        soc_version: the chip for the command, as `npu-smi info` names it; by default a usual one of the target.
        precision: "fp16" as atc computes by default, or "origin" to keep the file's types; padding is counted in it.
        shapes: input -> shape, for inputs with open axes.

    Returns:
        Findings, padding, and the `atc` line. `exit_code` is 1 with at least one error.

    Raises:
        FileFormatError: missing, damaged, not ONNX, or weights outside the file's folder.
        LinkPathError: a symbolic link.
        ArgumentTypeError, ArgumentError: an argument of the wrong type, or an unknown target, version or input.
        MissingFrameworkError: onnx is not installed.

    Source:
        Each finding names its document; the operator table lists its own (`OnnxCheck.sources`).

    Example:
        >>> import onnx
        >>> from onnx import TensorProto, helper
        >>> values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16]) for n in ("x", "y")]
        >>> graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
        >>> onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), "/tmp/relu.onnx")
        >>> check_onnx("/tmp/relu.onnx", "310P").command
        'atc --model=/tmp/relu.onnx --framework=5 --output=/tmp/relu --soc_version=Ascend310P3 --input_shape=x:1,16'
    """
    device, generation = find_target(target), Generation(cann)
    check.choice(precision, PRECISIONS, "precision")
    chip = device.soc_version if soc_version is None else check.text(soc_version, "soc_version")
    graph = read_onnx(file, shapes)
    layers = layers_of(graph)
    wastes: list[LayerWaste] = []
    legal: list[str] = []
    findings = [
        *lint_operators(graph, generation),
        *lint_dtypes(graph, device, precision),
        *lint_shapes(graph, device),
        *lint_padding(layers, device, precision, wastes),
        *lint_sparsity(layers, device, legal),
    ]
    if device.name != "310P" and generation.number == "8":
        findings.append(
            Finding(
                "info", "operator-list", "",
                f"the operator list of CANN 8.0.RC2 is of Atlas inference products; it is used for {device.name} too",
                "", generation.sources[0]["url"],
            )
        )  # fmt: skip
    command, ready = _command(graph, chip, precision, bool(legal))
    return OnnxCheck(
        file=str(graph.path),
        target=device.name,
        cann=cann,
        opset=graph.opsets[""],
        soc_version=chip,
        precision=precision,
        operators=operator_counts(graph),
        findings=in_order(findings),
        layers=tuple(wastes),
        command=command,
        command_ready=ready,
        sources=tuple(generation.sources),
    )


def _command(graph: OnnxGraph, chip: str, precision: str, sparse: bool) -> tuple[str, bool]:
    """The `atc` line, quoted for a POSIX shell, and whether it covers every open axis."""
    words = [
        "atc",
        f"--model={graph.path}",
        "--framework=5",
        f"--output={Path(graph.path).with_suffix('')}",
        f"--soc_version={chip}",
    ]
    known = [(v.name, v.shape) for v in graph.inputs if v.shape is not None]
    open_axes = {i for _, shape in known for i, size in enumerate(shape) if size is None}
    if known:
        text = ";".join(
            f"{name}:{','.join(str(-1 if s is None else s) for s in shape)}" for name, shape in known if shape
        )
        words.append(f"--input_shape={text}")
    if open_axes == {0}:
        words.append(f"--dynamic_batch_size={_BATCHES}")
    if precision == "origin":
        words.append("--precision_mode=must_keep_origin_dtype")
    if sparse:
        words.append("--sparsity=1")
    return " ".join(shlex.quote(w) for w in words), open_axes <= {0} and len(known) == len(graph.inputs)
