"""The two frameworks behind one face, so that one behaviour test serves both."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

KITS = ("torch", "mindspore")


class TorchKit:
    """What a behaviour test needs of PyTorch."""

    name = "torch"
    package = "slimkit"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.slim = importlib.import_module(self.package)
        self.Module = torch.nn.Module

    def room(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def tensor(self, array: Any) -> Any:
        return self.torch.tensor(np.asarray(array))

    def array(self, tensor: Any) -> np.ndarray:
        return tensor.detach().cpu().numpy().copy()

    def linear(self, n_in: int, n_out: int, bias: bool = True) -> Any:
        return self.torch.nn.Linear(n_in, n_out, bias=bias)

    def conv(self, n_in: int, n_out: int, size: int, **kw: Any) -> Any:
        return self.torch.nn.Conv2d(n_in, n_out, size, bias=kw.pop("bias", True), **kw)

    def layer_norm(self, n: int) -> Any:
        return self.torch.nn.LayerNorm(n)

    def batch_norm(self, n: int) -> Any:
        return self.torch.nn.BatchNorm2d(n)

    def embedding(self, n: int, width: int) -> Any:
        return self.torch.nn.Embedding(n, width)

    def relu(self) -> Any:
        return self.torch.nn.ReLU()

    def sequential(self, *layers: Any) -> Any:
        return self.torch.nn.Sequential(*layers)

    def named(self, **children: Any) -> Any:
        """A chain of named children, run in the order given."""
        net = self.torch.nn.Sequential()
        for name, child in children.items():
            net.add_module(name, child)
        return net

    def params(self, model: Any) -> dict[str, Any]:
        return dict(model.named_parameters())

    def trains(self, parameter: Any) -> bool:
        return bool(parameter.requires_grad)

    def fill(self, model: Any, seed: int = 0) -> Any:
        """The same values in both frameworks: each parameter from its path's place in order and the seed."""
        rng = np.random.default_rng(seed)
        with self.torch.no_grad():
            for parameter in model.parameters():
                values = rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * 0.3
                parameter.copy_(self.torch.from_numpy(values))
        return model

    def values(self, model: Any) -> dict[str, np.ndarray]:
        return {n: self.array(p) for n, p in model.named_parameters()}

    def assign(self, parameter: Any, values: np.ndarray) -> None:
        with self.torch.no_grad():
            parameter.copy_(self.torch.from_numpy(values))

    def children(self, model: Any) -> list[tuple[str, Any]]:
        return list(model.named_children())

    def statistics(self, norm: Any) -> tuple[Any, Any]:
        """Running mean and variance of a batch norm."""
        return norm.running_mean, norm.running_var

    def train_mode(self, model: Any, on: bool) -> None:
        model.train(on)

    def is_training(self, model: Any) -> bool:
        return bool(model.training)


class MindSporeKit:
    """What a behaviour test needs of MindSpore."""

    name = "mindspore"
    package = "slimkit_ms"

    def __init__(self) -> None:
        import mindspore as ms

        try:
            ms.set_device("CPU")  # also where it is the default: tests that set it later are refused otherwise
        except RuntimeError:  # once something has run, even the same device is refused
            assert ms.get_context("device_target") == "CPU"
        # Without it a small PyNative step takes a second, and errors surface far from their cause.
        ms.runtime.launch_blocking()
        self.ms = ms
        self.slim = importlib.import_module(self.package)
        self.Module = ms.nn.Cell

    room = TorchKit.room

    def tensor(self, array: Any) -> Any:
        return self.ms.Tensor(np.asarray(array))

    def array(self, tensor: Any) -> np.ndarray:
        return tensor.asnumpy().copy()

    def linear(self, n_in: int, n_out: int, bias: bool = True) -> Any:
        return self.ms.nn.Dense(n_in, n_out, has_bias=bias)

    def conv(self, n_in: int, n_out: int, size: int, **kw: Any) -> Any:
        if "groups" in kw:
            kw["group"] = kw.pop("groups")
        return self.ms.nn.Conv2d(n_in, n_out, size, pad_mode="pad", has_bias=kw.pop("bias", True), **kw)

    def layer_norm(self, n: int) -> Any:
        return self.ms.nn.LayerNorm((n,), epsilon=1e-5)

    def batch_norm(self, n: int) -> Any:
        return self.ms.nn.BatchNorm2d(n)

    def embedding(self, n: int, width: int) -> Any:
        return self.ms.nn.Embedding(n, width)

    def relu(self) -> Any:
        return self.ms.nn.ReLU()

    def sequential(self, *layers: Any) -> Any:
        return self.ms.nn.SequentialCell(*layers)

    def named(self, **children: Any) -> Any:
        from collections import OrderedDict

        return self.ms.nn.SequentialCell(OrderedDict(children))

    def params(self, model: Any) -> dict[str, Any]:
        return {p.name: p for p in model.get_parameters()}

    def trains(self, parameter: Any) -> bool:
        return bool(parameter.requires_grad)

    def fill(self, model: Any, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        for parameter in model.trainable_params():
            values = rng.standard_normal(parameter.shape).astype(np.float32) * 0.3
            parameter.set_data(self.ms.Tensor(values))
        return model

    def values(self, model: Any) -> dict[str, np.ndarray]:
        return {p.name: self.array(p) for p in model.get_parameters()}

    def assign(self, parameter: Any, values: np.ndarray) -> None:
        parameter.set_data(self.ms.Tensor(values))

    def children(self, model: Any) -> list[tuple[str, Any]]:
        return list(model.name_cells().items())

    def statistics(self, norm: Any) -> tuple[Any, Any]:
        return norm.moving_mean, norm.moving_variance

    def train_mode(self, model: Any, on: bool) -> None:
        model.set_train(on)

    def is_training(self, model: Any) -> bool:
        return bool(model.training)


def make(name: str) -> Any:
    return {"torch": TorchKit, "mindspore": MindSporeKit}[name]()
