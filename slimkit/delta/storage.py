"""Saving the deltas of a torch model and putting them on another one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import storage
from slimkit.core.delta import tensors as arrays
from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.spec import DeltaReport
from slimkit.core.errors import UnsupportedError
from slimkit.delta.framework import TorchDelta
from slimkit.delta.inject import apply_delta
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.positions import is_counted_by_library
from slimkit.delta.prefix import PrefixEncoder
from slimkit.delta.prefix_cache import CachedPrefix, decoder_of, self_attention, text_decoder
from slimkit.delta.prompt import PromptTuning
from slimkit.sharded import like_parts_of, whole, written_once

import torch
from torch import nn

FORMATS = ("slimkit", "peft")


class TorchStorage(TorchDelta, DeltaStorage):
    """What the wing does to a model on behalf of files."""

    def value(self, tensor: torch.Tensor) -> Any:
        plain = whole(tensor).detach().cpu()
        name = str(plain.dtype).removeprefix("torch.")
        if name not in arrays.FURTHER:
            return plain.numpy()
        stored = plain.contiguous().view(torch.uint8 if plain.itemsize == 1 else torch.uint16).numpy()
        return stored.view(arrays.further(name))

    def fill(self, tensor: torch.Tensor, value: Any) -> None:
        with torch.no_grad():
            tensor.copy_(like_parts_of(tensor, as_tensor(value)))

    def take_dtype(self, tensor: torch.Tensor, value: Any) -> None:
        kind = as_tensor(value).dtype
        if tensor.dtype != kind:
            tensor.data = tensor.data.to(kind)

    def split(self, model: nn.Module, names: Sequence[str]) -> None:
        held: dict[int, int] = {}
        for _, module in bridge.named_modules(model, remove_duplicate=False):
            held[id(module)] = held.get(id(module), 0) + 1
        old = self.neutral(model)[names[0]]
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        for name in names:
            path, _, attribute = name.rpartition(".")
            module = bridge.get_module(model, path)
            if held[id(module)] > 1:
                # The same layer stands in other places, which keep the old tensor.
                layer = copy.copy(module)
                layer._parameters = dict(module._parameters)
                bridge.set_module(model, path, layer)
                module = layer
            setattr(module, attribute, new)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # or saving and loading the model would tie them again

    def sample(self, tensor: torch.Tensor) -> Any:
        places = torch.from_numpy(sample_places(tensor.numel()))
        return whole(tensor).detach().reshape(-1)[places.to(tensor.device)].float().cpu().numpy()

    def weight(self, model: nn.Module, path: str) -> Any:
        layer: Any = bridge.get_module(model, path)
        merged = isinstance(layer, DeltaLayer) and layer.delta_is_merged
        found = layer.unmerged if merged else getattr(layer, "weight", None)
        return found if isinstance(found, torch.Tensor) else None  # a module that reads its weights itself has several

    def neutral(self, model: nn.Module) -> dict[str, Any]:
        modules = list(bridge.named_modules(model, remove_duplicate=False))
        held = [(path, m._parameters) for path, m in modules] + [(path, m._buffers) for path, m in modules]
        return {f"{p}.{k}" if p else k: t for p, tensors in held for k, t in tensors.items() if t is not None}

    def unsaved(self, model: nn.Module) -> set[str]:
        modules = bridge.named_modules(model, remove_duplicate=False)
        return {f"{p}.{k}" if p else k for p, m in modules for k in m._non_persistent_buffers_set}

    def positions(self, model: nn.Module) -> list[str] | None:
        return None if is_counted_by_library(model) else super().positions(model)

    def prefix_form(self, model: nn.Module, layers: Sequence[Any]) -> int:
        decoder = decoder_of(model)
        if all(isinstance(layer, CachedPrefix) for layer in layers):
            own = text_decoder(model) if decoder is None else decoder
            wanted = len(self_attention(model, own, None, beside_encoder=decoder is not None))
        elif decoder is not None:
            raise UnsupportedError(
                "PEFT's prefix on an encoder-decoder model stands before the decoder's own tokens, and nowhere else; "
                "apply it without targets, or save with format='slimkit'."
            )
        else:
            config = next((c for m in model.modules() if (c := getattr(m, "config", None)) is not None), None)
            wanted = getattr(config, "num_hidden_layers", len(layers))
        if len(layers) != wanted:
            raise UnsupportedError(
                f"PEFT's prefix is on all {wanted} attention layers; this one is on {len(layers)}. Save with "
                f"format='slimkit'."
            )
        return 2 if decoder is not None else 1

    def prefix_rows(self, model: nn.Module, layers: Sequence[Any]) -> list[tuple[Any, Any]]:
        with bridge.evaluating(model), torch.no_grad():
            return [tuple(map(self.value, layer.keys_and_values())) for layer in layers]

    def tables(self, model: nn.Module, kind: str) -> list[Any]:
        found: list[Any] = []
        for module in model.modules():
            if kind == "prefix" and isinstance(module, PrefixEncoder) and not module.prefix_projection:
                found.append(module.mindpet_delta_ptuning2_embedding.weight)
            if kind == "prompt" and isinstance(module, PromptTuning) and not isinstance(module, DeltaLayer):
                found.append(module.mindpet_delta_prompttuning_embedding.weight)
        return found

    def table_facts(self, model: nn.Module, kind: str) -> dict[str, Any]:
        for module in model.modules():
            if kind == "prefix" and isinstance(module, PrefixEncoder):
                width = module.num_heads * module.kv_channels
                facts = {"num_layers": module.num_layers, "num_attention_heads": module.num_heads, "token_dim": width}
                return {**facts, "encoder_hidden_size": width}
            if kind == "prompt" and isinstance(module, PromptTuning):
                return {"token_dim": module.token_dim, "num_layers": 1, "num_attention_heads": 1}
        return {}

    def may_train(self, tensor: Any) -> bool:
        return isinstance(tensor, nn.Parameter)

    def apply_kind(self, model: nn.Module, kind: str, targets: list[str] | None, **options: Any) -> Any:
        return apply_delta(model, kind, targets, **options)


def as_tensor(value: Any) -> torch.Tensor:
    """A NumPy array as a tensor that shares its memory, the types that NumPy lacks included."""
    if value.dtype.name not in arrays.FURTHER:
        return torch.from_numpy(value)
    return torch.from_numpy(arrays.bits(value)).view(getattr(torch, value.dtype.name))


STORAGE = TorchStorage()


def save_delta(
    model: nn.Module,
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
        >>> from slimkit.delta import apply_delta
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> report = apply_delta(net, "lora", ["0"], rank=2)
        >>> folder = save_delta(net, tempfile.mkdtemp())
        >>> sorted(p.name for p in folder.iterdir())
        ['delta.safetensors', 'manifest.json']
    """
    plain = bridge.unwrapped(bridge.check_model(model))
    peft = check.choice(format, FORMATS, "format") == "peft"
    with written_once(model, directory) as place:
        folder = (storage.save_peft if peft else storage.save)(STORAGE, plain, place, names)
    return folder if place is directory else Path(directory)


def load_delta(
    model: nn.Module,
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
    model = bridge.unwrapped(bridge.check_model(model))
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
