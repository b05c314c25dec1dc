"""What a network's tensors are to its layers, known by its classes for both frameworks; neither is imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core import naming
from slimkit.core.batch import tensors_in
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a network.

    Args:
        name: what the network's files call it.
        path: the layer it belongs to.
        role: what it is to the layer, in PyTorch's words ("weight", "running_mean").
        kind: the kind of layer: linear, linear_t (in, out), conv1d, conv, norm, embedding, or the class's name.
        shape: its shape.
        same: equal for two slots that hold one tensor.
    """

    name: str
    path: str
    role: str
    kind: str
    shape: tuple[int, ...]
    same: int = 0

    @property
    def key(self) -> str:
        """Path and role: the name in PyTorch's words."""
        return f"{self.path}.{self.role}" if self.path else self.role


def framework(net: Any, name: str) -> str:
    """'torch' or 'mindspore', by the classes of a network."""
    for kind in type(net).__mro__:
        if f"{kind.__module__}.{kind.__name__}" == "torch.nn.modules.module.Module":
            return "torch"
        if kind.__name__ == "Cell" and kind.__module__ == "mindspore.nn.cell":
            return "mindspore"
    raise ArgumentTypeError(f"{name} must be a torch.nn.Module or a mindspore.nn.Cell. Received: {type(net).__name__}")


def slots(net: Any, name: str = "net") -> list[NamedTensor]:
    """The tensors of a network in the order of its layers; one that two layers share comes twice."""
    if framework(net, name) == "mindspore":
        return _cell_slots(net)
    state = net.state_dict(keep_vars=True)
    found = []
    for path, module in net.named_modules(remove_duplicate=False):
        for key in (*module._parameters, *module._buffers):
            full = f"{path}.{key}" if path else key
            if hasattr(state.get(full), "shape"):
                found.append(NamedTensor(full, path, key, _kind(module), tuple(state[full].shape), id(state[full])))
    return found


def _cell_slots(net: Any) -> list[NamedTensor]:
    found = []
    for path, cell in net.cells_and_names():
        kind = _kind(cell)
        for key, parameter in cell._params.items():
            if parameter is not None:
                role = "weight" if type(cell).__name__ == "PReLU" else naming.torch_word(key)
                found.append(NamedTensor(parameter.name, path, role, kind, tuple(parameter.shape), id(parameter)))
    named = {s.name for s in found}
    # Parameters that hang in a ParameterTuple (LSTM) belong to no cell's own table.
    for parameter in net.get_parameters():
        if parameter.name not in named:
            path, _, key = parameter.name.rpartition(".")
            found.append(
                NamedTensor(
                    parameter.name, path, naming.torch_word(key), "other", tuple(parameter.shape), id(parameter)
                )
            )
    return found


def _kind(layer: Any) -> str:
    names = [kind.__name__ for kind in type(layer).__mro__]
    own = names[0]
    for name in names:
        if name in ("Linear", "Dense"):
            return "linear"
        if name in ("Conv1d", "Conv1dTranspose", "ConvTranspose1d"):
            return "conv1d"
        if name in ("Conv2d", "Conv3d", "Conv2dTranspose", "Conv3dTranspose", "ConvTranspose2d", "ConvTranspose3d"):
            return "conv"
        if name in ("Embedding", "EmbeddingLookup"):
            return "embedding"
    if own == "Conv1D":
        return "linear_t"
    return "norm" if "norm" in own.lower() else own.lower()


def assign(net: Any, values: Mapping[str, Array]) -> None:
    """Put values under their names into a network, in place; names and shapes are known to fit."""
    if framework(net, "net") == "torch":
        torch = sys.modules["torch"]
        state = net.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, array in values.items():
                state[name].copy_(torch.from_numpy(np.asarray(array, order="C")))
        return
    tensor = sys.modules["mindspore"].Tensor
    parameters = {p.name: p for p in net.get_parameters()}
    for name, array in values.items():
        parameters[name].set_data(tensor(np.asarray(array, order="C"), parameters[name].dtype))


def outputs(net: Any, inputs: Any) -> list[Array]:
    """All tensors that a network returns for NumPy inputs, in order, in evaluation mode and without gradients.

    Args:
        net: a torch module or a MindSpore cell.
        inputs: an array, a tuple or list of arrays, or (torch only) a dict of keyword arguments.
    """
    args = inputs if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = inputs if isinstance(inputs, Mapping) else {}
    if framework(net, "net") == "torch":
        torch = sys.modules["torch"]
        where = next(iter(net.parameters())).device
        with _evaluating_torch(net), torch.no_grad():
            made = [torch.from_numpy(np.asarray(a)).to(where) for a in args]
            returned = net(*made, **{k: torch.from_numpy(np.asarray(v)).to(where) for k, v in kwargs.items()})
        return [t.detach().float().cpu().numpy() for t in tensors_in(returned)]
    tensor = sys.modules["mindspore"].Tensor
    modes = [(cell, cell.training) for _, cell in net.cells_and_names()]
    net.set_train(False)
    try:
        returned = net(*(tensor(np.asarray(a)) for a in args), **{k: tensor(np.asarray(v)) for k, v in kwargs.items()})
        return [t.asnumpy().astype(np.float32) for t in tensors_in(returned)]
    finally:
        for cell, mode in modes:
            cell.set_train(mode) if cell is net else setattr(cell, "training", mode)


@contextlib.contextmanager
def _evaluating_torch(net: Any) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def difference(one: Any, other: Any, inputs: Any) -> float:
    """The largest difference between what two networks return for the same inputs.

    Raises:
        ArgumentError: they return tensors of different shapes, or none.
    """
    first, second = outputs(one, inputs), outputs(other, inputs)
    pairs = list(zip(first, second, strict=False))
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        raise ArgumentError(
            "the two networks must return tensors of the same shapes. "
            f"Received: {[a.shape for a in first]} and {[b.shape for b in second]}"
        )
    return max(float(np.max(np.abs(a - b))) if a.size else 0.0 for a, b in pairs)
