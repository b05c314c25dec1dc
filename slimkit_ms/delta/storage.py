"""Saving the deltas of a MindSpore model and putting them on another one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, naming
from slimkit.core.delta import storage
from slimkit.core.delta import tensors as arrays
from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.spec import DeltaReport
from slimkit_ms import bridge
from slimkit_ms.delta.framework import MindSporeDelta, weight_of
from slimkit_ms.delta.inject import apply_delta
from slimkit_ms.delta.layer import DeltaLayer
from slimkit_ms.delta.prefix import PrefixEncoder
from slimkit_ms.delta.prefix_model import sizes_by_config
from slimkit_ms.delta.prompt import PromptTuning

import mindspore as ms
from mindspore import nn

FORMATS = ("slimkit", "peft")
_RENAMED = (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.layer.normalization._BatchNorm)


# Element types that NumPy lacks, by their names there
_FURTHER = {ms.bfloat16: "bfloat16", ms.float8_e4m3fn: "float8_e4m3fn", ms.float8_e5m2: "float8_e5m2"}


def _torch_name(path: str, cell: nn.Cell, key: str) -> str:
    """What torch calls the parameter that a cell holds as `key`."""
    name = naming.torch_word(key) if isinstance(cell, _RENAMED) else key
    return f"{path}.{name}" if path else name


class MindSporeStorage(MindSporeDelta, DeltaStorage):
    """What the wing does to a model on behalf of files."""

    def value(self, tensor: Any) -> Any:
        name = _FURTHER.get(tensor.dtype)
        values = bridge.as_numpy(tensor)
        return values if name is None else values.view(arrays.further(name))

    def take_dtype(self, tensor: Any, value: Any) -> None:
        # MindSpore makes no float8 tensor on a CPU: such values are kept in the parameter's own, wider type.
        if isinstance(tensor, ms.Parameter) and not value.dtype.name.startswith("float8"):
            kind = ms.Tensor(value).dtype
            if tensor.dtype != kind:
                tensor.set_dtype(kind)

    def split(self, model: nn.Cell, names: Sequence[str]) -> None:
        old = self.neutral(model)[names[0]]
        new = ms.Parameter(ms.Tensor(bridge.as_numpy(old)), name=names[0], requires_grad=old.requires_grad)
        for path, cell in model.cells_and_names():
            for key in [k for k, p in cell._params.items() if p is not None]:
                if _torch_name(path, cell, key) in names:
                    cell._params[key] = new
        bridge.forget_graphs(model)

    def fill(self, tensor: Any, value: Any) -> None:
        value = arrays.wide(value) if value.dtype.name in arrays.FURTHER else value
        if isinstance(tensor, ms.Parameter):
            tensor.set_data(ms.Tensor(value, tensor.dtype))
        else:
            tensor.assign_value(ms.Tensor(value, tensor.dtype))

    def sample(self, tensor: Any) -> Any:
        if isinstance(tensor, np.ndarray):
            return tensor.reshape(-1)[sample_places(tensor.size)].astype(np.float32)
        flat = arrays.wide(self.value(tensor)).reshape(-1)
        return flat[sample_places(flat.size)].astype(np.float32)

    def weight(self, model: nn.Cell, path: str) -> Any:
        cell: Any = self.module(model, path)
        return cell.unmerged if isinstance(cell, DeltaLayer) and cell.delta_is_merged else weight_of(cell)

    def neutral(self, model: nn.Cell) -> dict[str, Any]:
        found = {}
        for prefix, cell in model.cells_and_names():
            for key, parameter in cell._params.items():
                if parameter is not None:
                    found[_torch_name(prefix, cell, key)] = parameter
        return found

    def prefix_sizes(self, model: nn.Cell, config: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
        return sizes_by_config(model, int(config.get("num_attention_heads") or 1), int(config.get("token_dim") or 1))

    def prefix_rows(self, model: nn.Cell, layers: Sequence[Any]) -> list[tuple[Any, Any]]:
        with bridge.evaluating(model), bridge.pynative():
            return [tuple(map(self.value, layer.keys_and_values())) for layer in layers]

    def tables(self, model: nn.Cell, kind: str) -> list[Any]:
        found: list[Any] = []
        for module in (c for _, c in model.cells_and_names()):
            if kind == "prefix" and isinstance(module, PrefixEncoder) and not module.prefix_projection:
                found.append(module.mindpet_delta_ptuning2_embedding.embedding_table)
            if kind == "prompt" and isinstance(module, PromptTuning) and not isinstance(module, DeltaLayer):
                found.append(module.mindpet_delta_prompttuning_embedding.embedding_table)
        return found

    def table_facts(self, model: nn.Cell, kind: str) -> dict[str, Any]:
        for module in (c for _, c in model.cells_and_names()):
            if kind == "prefix" and isinstance(module, PrefixEncoder):
                width = module.num_heads * module.kv_channels
                facts = {"num_layers": module.num_layers, "num_attention_heads": module.num_heads, "token_dim": width}
                return {**facts, "encoder_hidden_size": width}
            if kind == "prompt" and isinstance(module, PromptTuning):
                return {"token_dim": module.token_dim, "num_layers": 1, "num_attention_heads": 1}
        return {}

    def may_train(self, tensor: Any) -> bool:
        return "moving_" not in tensor.name

    def apply_kind(self, model: nn.Cell, kind: str, targets: list[str] | None, **options: Any) -> Any:
        return apply_delta(model, kind, targets, **options)


STORAGE = MindSporeStorage()


def save_delta(
    model: nn.Cell,
    directory: str | os.PathLike[str],
    *,
    names: str | Sequence[str] | None = None,
    format: str = "slimkit",
) -> Path:
    """Save what was trained: the deltas, and every base parameter that trains (a head, biases).

    Args:
        model: a model with deltas, or one in which `freeze_delta(model, "bitfit")` left something to train.
        directory: a folder; made if missing.
        names: the named deltas to save; None means all.
        format: "slimkit" (a bundle that opens in either framework) or "peft" (files that Hugging Face PEFT loads; one
            delta of lora, ia3, miss, shira, prefix or prompt).

    Returns:
        The folder.

    Raises:
        ArgumentError: nothing to save, an unknown name or format.
        OSError: the folder cannot be written; an earlier bundle there is left as it was.

    Example:
        >>> import tempfile
        >>> from slimkit_ms.delta import apply_delta
        >>> net = nn.SequentialCell(nn.Dense(4, 4))
        >>> report = apply_delta(net, "lora", ["0"], rank=2)
        >>> folder = save_delta(net, tempfile.mkdtemp())
        >>> sorted(p.name for p in folder.iterdir())
        ['delta.safetensors', 'manifest.json']
    """
    bridge.check_model(model)
    if check.choice(format, FORMATS, "format") == "peft":
        return storage.save_peft(STORAGE, model, directory, names)
    return storage.save(STORAGE, model, directory, names)


def load_delta(
    model: nn.Cell,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    freeze: bool = True,
    same_base: bool = False,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    positions: Sequence[str] | None = None,
) -> DeltaReport:
    """Put saved deltas on a model, in place: a slimkit bundle of either framework, or a Hugging Face PEFT adapter.

    Args:
        model: a model like the one the delta was trained on, without the delta.
        directory: the folder.
        name: put the delta on under this name; None keeps its own.
        freeze: stop everything else from training.
        same_base: refuse a base whose weights are not those the delta was trained on; otherwise the log and the report
            say so.
        rename: how paths in the file are called here: {beginning: beginning}, or a function of a path.
        positions: for a prefix, globs over the modules that are given position numbers; they count from behind it, as
            they did where it was trained. None finds them (Hugging Face models, and modules with Hugging Face's names);
            empty leaves positions as they are.

    Returns:
        The layers changed, and the share of parameters that train now.

    Raises:
        FileFormatError: the files are damaged, or a tensor is missing, left over, transposed or of another shape.
        ArgumentError: the model lacks a layer, or has one of another shape; a name is taken; (same_base) other weights.
        UnsupportedError: positions start behind the file's prefix, and nothing here is known to hold them.
        In every case the model is as it was.
    """
    bridge.check_model(model)
    return storage.load(
        STORAGE,
        model,
        directory,
        name=name,
        freeze=freeze,
        same_base=same_base,
        rename=rename,
        positions=positions,
    )
