"""ONNX files that hold the opset asked for and are proven against the model they came from."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import slimkit
from slimkit import bridge
from slimkit.core import check, onnxaxes
from slimkit.core.batch import as_call
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import PathLike, as_path
from slimkit.core.onnxfile import OnnxReport, Proof, publish, unique

import torch
from torch import nn

# torch's two exporters: the older one writes any opset up to 17 as asked; the newer one begins at 18 and
# would write 18 in silence when asked for less.
_OLDER_LIMIT = 17
_NEWER_LIMIT = 20


class _Flat(nn.Module):
    """A model with positional tensors in and a tuple of tensors out, which is all that ONNX knows."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._args, self._kwargs = args, dict(kwargs)
        self._slots = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        self._keys = [k for k, v in self._kwargs.items() if isinstance(v, torch.Tensor)]

    def tensors(self) -> list[torch.Tensor]:
        return [self._args[i] for i in self._slots] + [self._kwargs[k] for k in self._keys]

    def names(self) -> list[str]:
        alone = len(self._slots) == 1
        return ["input" if alone else f"input_{i}" for i in range(len(self._slots))] + list(self._keys)

    def answer(self) -> Any:
        """What the model answers with."""
        return self.model(*self._args, **self._kwargs)

    def at(self, axes: onnxaxes.Axes, sizes: Mapping[str, tuple[int, int]]) -> _Flat:
        """The same call at other sizes."""
        arrays = self.arrays()
        made = [
            torch.from_numpy(onnxaxes.resized(arrays[name], axes.get(name, {}), sizes).copy()).to(tensor.device)
            for name, tensor in zip(self.names(), self.tensors())
        ]
        args, kwargs = list(self._args), dict(self._kwargs)
        for slot, tensor in zip(self._slots, made):
            args[slot] = tensor
        kwargs.update(zip(self._keys, made[len(self._slots) :]))
        return _Flat(self.model, tuple(args), kwargs)

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(zip(self.names(), (t.detach().cpu().numpy() for t in self.tensors())))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = list(self._args), dict(self._kwargs)
        args_given = iter(tensors)
        for slot in self._slots:
            args[slot] = next(args_given)
        for key in self._keys:
            kwargs[key] = next(args_given)
        return tuple(t for _, t in named_tensors(self.model(*args, **kwargs)))


def named_tensors(output: Any, name: str = "output") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a model's output, in order, each with a name."""
    if isinstance(output, torch.Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        return [pair for key, value in output.items() for pair in named_tensors(value, str(key))]
    if isinstance(output, tuple | list):
        return [pair for i, value in enumerate(output) for pair in named_tensors(value, f"{name}_{i}")]
    return []


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: PathLike,
    *,
    opset: int = 13,
    dynamic_batch: bool = False,
    dynamic: Mapping[Any, Any] | None = None,
    tolerance: float = 1e-4,
    external_data: bool | None = None,
    merge_delta: bool = False,
) -> OnnxReport:
    """Write a model as ONNX and prove the file against the model in onnxruntime.

    Args:
        model: the model; it is exported in eval mode from a copy of its structure and left as it was.
        inputs: what `model(*inputs)` takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        path: the file to write; it appears whole or not at all.
        opset: the ONNX opset to write, 9 to 20. The default 13 is one that Ascend's ATC of CANN 5 to 9 reads.
        dynamic_batch: leave the first axis of every input open.
        dynamic: axes to leave open: ``{"input_ids": {0: "batch", 1: "sequence"}}``, or ``{0: "batch", 1: "sequence"}``
            for every input that has them. The file is proven at a second size of each.
        tolerance: largest absolute difference between file and model that is accepted, float32 units.
        external_data: put the weights into `path` and ".data" beside the file; None: where they exceed 2 GB, which one
            ONNX file cannot hold.
        merge_delta: write a copy of the model with its LoRAs merged; the model keeps them.

    Returns:
        What was written, with the opset read back from the file and the difference of each output.

    Raises:
        ArgumentTypeError: `model` is not a module.
        ArgumentError: an opset outside 9 to 20, inputs without a tensor, or an open axis that no input has.
        UnsupportedError: the model cannot be written at that opset, does not run at a second size of an open axis, or
            the file disagrees with the model.
        MissingFrameworkError: onnx or onnxruntime is not installed.

    Example:
        >>> export_onnx(nn.Linear(4, 3), torch.ones(1, 4), "/tmp/linear.onnx").opset
        13
    """
    bridge.check_whole(model)
    check.integer(opset, "opset", minimum=9, maximum=_NEWER_LIMIT)
    check.number(tolerance, "tolerance", minimum=0)
    if external_data is not None:
        check.boolean(external_data, "external_data")
    target = as_path(path, "path")
    if check.boolean(merge_delta, "merge_delta"):
        model = copy.deepcopy(model)
        slimkit.merge_delta(model, unload=True)
    args, kwargs = as_call(bridge.to_device(inputs, bridge.device_of(model)))
    flat = _Flat(model, args, kwargs)
    if not flat.tensors():
        check.wrong_value("inputs", "a batch with at least one tensor", inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(flat.names(), flat.tensors())}
    axes = onnxaxes.open_axes(dynamic, dynamic_batch, shapes)
    with bridge.evaluating(model), _exportable_attention(model, opset):
        expected = named_tensors(flat.answer())
        outputs = unique([name for name, _ in expected])
        proofs = [Proof(flat.arrays(), _arrays(outputs, expected))]
        result_axes: onnxaxes.Axes = {}
        if axes:
            sizes = onnxaxes.other_sizes(axes, shapes)
            other = flat.at(axes, sizes)
            proofs.append(Proof(other.arrays(), _arrays(outputs, _again(other, sizes))))
            kinds = [{name: array.shape for name, array in proof.expected.items()} for proof in proofs]
            result_axes = onnxaxes.output_axes(kinds[0], kinds[1], sizes)
            if opset > _OLDER_LIMIT:
                flat = other  # the newer exporter takes a size of 1 for fixed, and the other sizes never are 1
        with tempfile.TemporaryDirectory() as folder:
            # By way of a file, for beyond 2 GB the exporters write one file for each weight.
            file = Path(folder, "model.onnx")
            _write(flat, file, opset, flat.names(), outputs, axes, result_axes)
            return publish(file, target, opset, proofs, tolerance, external_data, axes)


def _arrays(names: list[str], found: list[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, (_, tensor) in zip(names, found)}


def _again(flat: _Flat, sizes: Mapping[str, tuple[int, int]]) -> list[tuple[str, torch.Tensor]]:
    """The model's answer at the other sizes."""
    try:
        return named_tensors(flat.answer())
    except Exception as error:  # the model raises what it likes
        tried = ", ".join(f"{label} {after}" for label, (_, after) in sizes.items())
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"dynamic: the model does not run with {tried}; give an example whose half it takes, or leave that axis "
            f"fixed: {reason}"
        ) from error


def _write(
    flat: _Flat,
    file: Path,
    opset: int,
    inputs: list[str],
    outputs: list[str],
    axes: onnxaxes.Axes,
    result_axes: onnxaxes.Axes,
) -> None:
    """Write the ONNX file by the exporter that honours the opset."""
    tensors = tuple(flat.tensors())
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # The older exporter announces its removal on every call; the opset is read back from the file anyway.
            warnings.simplefilter("ignore")
            if opset <= _OLDER_LIMIT:
                torch.onnx.export(
                    flat, tensors, str(file), opset_version=opset, input_names=inputs, output_names=outputs,
                    dynamic_axes={**axes, **result_axes} or None, dynamo=False, do_constant_folding=True,
                )  # fmt: skip
            else:
                shapes = (tuple(axes.get(name) for name in inputs),) if axes else None
                program = torch.onnx.export(
                    flat, tensors, opset_version=opset, input_names=inputs, output_names=outputs,
                    dynamic_shapes=shapes, dynamo=True, verbose=False,
                )  # fmt: skip
                program.save(str(file), external_data=_is_large(flat))
    except Exception as error:  # the exporters raise dozens of kinds; each means the same to the caller
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"the model cannot be written as ONNX opset {opset}: {reason}") from error


def _is_large(model: nn.Module) -> bool:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values()) > 2**30


@contextlib.contextmanager
def _exportable_attention(model: nn.Module, opset: int) -> Iterator[None]:
    """Attention that an exporter can write, for a while.

    torch's fused encoder layers have no ONNX form. Below opset 14 fused attention is written by torch's own rule for
    14, which needs nothing newer unless it is causal; every Hugging Face model inside uses its plain attention.
    """
    from torch.onnx import register_custom_op_symbolic, symbolic_opset14, unregister_custom_op_symbolic

    operator = "aten::scaled_dot_product_attention"
    used = {
        module: name
        for module in model.modules()
        if hasattr(module, "set_attn_implementation")
        and (name := getattr(getattr(module, "config", None), "_attn_implementation", None)) not in (None, "eager")
    }
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if opset < 14:
            register_custom_op_symbolic(operator, symbolic_opset14.scaled_dot_product_attention, opset)
            for module in used:
                module.set_attn_implementation("eager")
        yield
    finally:
        if opset < 14:
            unregister_custom_op_symbolic(operator, opset)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, name in used.items():
            module.set_attn_implementation(name)


def example_arrays(inputs: Any) -> dict[str, np.ndarray]:
    """The arrays that a file written by `export_onnx` for these inputs takes, by input name."""
    return _Flat(nn.Identity(), *as_call(inputs)).arrays()
