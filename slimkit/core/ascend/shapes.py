"""Shapes of the values in an ONNX graph, by ONNX's own inference; damaged graphs neither crash nor hang the caller."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

Shape = tuple[int | None, ...]

_PATIENCE_S = 20
_CODE = """
import sys, onnx
model = onnx.load_model_from_string(sys.stdin.buffer.read())
model = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
sys.stdout.buffer.write(model.SerializeToString())
"""


def infer(onnx: Any, model: Any, needed: Sequence[str]) -> dict[str, Shape]:
    """The shapes of all values, as far as they follow from the operators.

    Args:
        onnx: the module.
        model: a ModelProto without large weights.
        needed: values worth a second, thorough pass when the first leaves them open.

    Returns:
        value -> shape, None for an open axis.
    """
    try:
        found = _shapes(onnx.shape_inference.infer_shapes(model, strict_mode=False))
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError):
        # Unknown shapes cost the multiply-accumulate counts and nothing else.
        found = _shapes(model)
    if any(None in found.get(name, (None,)) for name in needed):
        found.update(_thorough(onnx, model))
    return found


def _thorough(onnx: Any, model: Any) -> dict[str, Shape]:
    """Inference that follows the values of shape tensors as well; nothing where it fails.

    It runs in a process of its own with a time limit, as ONNX's native code never ends on some damaged files.
    """
    command, data = [sys.executable, "-I", "-c", _CODE], model.SerializeToString()
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_PATIENCE_S, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return {}
    return _shapes(onnx.load_model_from_string(done.stdout)) if done.returncode == 0 else {}


def _shapes(model: Any) -> dict[str, Shape]:
    graph = model.graph
    found: dict[str, Shape] = {}
    for info in (*graph.value_info, *graph.output, *graph.input):
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            found[info.name] = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in dims)
    return found
