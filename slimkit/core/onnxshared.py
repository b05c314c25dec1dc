"""Weights that stand twice in an ONNX graph, once as they are or once turned round, are stored once."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.lazy import library

# Below this a node more in the graph is worth more than the bytes.
_LEAST_BYTES = 1 << 14


def store_once(proto: Any) -> list[str]:
    """Let a weight that equals another one, or its transpose, be made of that one by a node, in place.

    A table that is tied to the output layer is read by a Gather and, turned round, by a MatMul; exporters write both.
    The values are compared bit by bit, and what reads them keeps the name that it reads. Runtimes fold the node when
    they load the file, so a run costs nothing more.

    Args:
        proto: an onnx ModelProto with its weights inside.

    Returns:
        The names of the weights that are no longer stored.
    """
    onnx = library("onnx", "onnx")
    taken = {value.name for value in proto.graph.input}
    kept: dict[tuple[Any, ...], list[tuple[Any, bool]]] = {}
    nodes, gone = [], []
    for tensor in proto.graph.initializer:
        if len(tensor.dims) < 2 or tensor.name in taken:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.nbytes < _LEAST_BYTES:
            continue
        for other, turned in kept.get(_sight(values), ()):
            first = onnx.numpy_helper.to_array(other)
            # As bytes: -0.0 is not 0.0, and a NaN is itself.
            if _bits(first.T if turned else first) == _bits(values):
                kind, more = ("Transpose", {"perm": [1, 0]}) if turned else ("Identity", {})
                nodes.append(
                    onnx.helper.make_node(kind, [other.name], [tensor.name], name=f"{tensor.name}_once", **more)
                )
                gone.append(tensor.name)
                break
        else:
            kept.setdefault(_sight(values), []).append((tensor, False))
            if values.ndim == 2:
                kept.setdefault(_sight(values.T), []).append((tensor, True))
    for at in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[at].name in gone:
            del proto.graph.initializer[at]
    if nodes:  # before everything that reads them
        nodes += [type(node).FromString(node.SerializeToString()) for node in proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
    return gone


def _sight(values: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """What two equal arrays have in common, found without reading them whole."""
    return values.dtype.str, values.shape, np.ascontiguousarray(values[:1]).tobytes()


def _bits(values: np.ndarray[Any, Any]) -> bytes:
    return np.ascontiguousarray(values).tobytes()
