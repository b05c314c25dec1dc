"""A Hugging Face model whose values stay in its folder's files: shapes in memory, tensors read one by one."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.core import check
from slimkit.core.batch import digest
from slimkit.core.checkpoint import shards, weightfile
from slimkit.core.errors import ConfigError, FileFormatError, UnsupportedError
from slimkit.core.lazy import library
from slimkit.layouts import Layouts

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What buffers may be besides.
_WHOLE = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredModel:
    """A model on the meta device, and where the files hold its tensors.

    Args:
        source: a folder with config.json and .safetensors weights.
        names: parameter name -> tensor name in the files, where they differ by more than the base model's prefix.
        compute: what floats are read as, or None: as they are stored.
        places: where each tensor's bytes lie, if that is known already.
        cache: whether the model keeps `use_cache` as its configuration says it.

    Attributes:
        model: the model; its parameters have shapes and no values.
        places: tensor of the files -> where its bytes lie.
    """

    def __init__(
        self,
        source: Path,
        names: Callable[[str], str] | None = None,
        compute: torch.dtype | None = None,
        places: Mapping[str, shards.Place] | None = None,
        cache: bool = False,
    ) -> None:
        self.model = empty_model(source, cache)
        self.places = dict(shards.locate(source) if places is None else places)
        self.compute = compute
        self._names = names
        self._refuse_two_names()
        self._refuse_other_shapes()
        self._part_what_differs()
        self._layouts = Layouts(self.model)

    def _refuse_two_names(self) -> None:
        """Refuse files that hold one parameter with and without the base model's prefix."""
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        key = next((key for key in self.places if prefix + key in self.places), None)
        if key is not None:
            raise FileFormatError(
                f"{self.places[key].file.parent} holds one parameter as {key!r} and as {prefix + key!r}: take the one "
                "away that is not meant"
            )

    def _refuse_other_shapes(self) -> None:
        """Refuse files whose tensors have other shapes than the configuration gives the model's parameters."""
        for name, parameter in self.model.named_parameters():
            key = self.find(self._names(name) if self._names is not None else name)
            if key is not None and self.places[key].shape != tuple(parameter.shape):
                raise FileFormatError(
                    f"{self.places[key].file} holds {key!r} as {self.places[key].shape}, and config.json beside it "
                    f"makes it {tuple(parameter.shape)}: one of them is of another model"
                )

    def _part_what_differs(self) -> None:
        """Let parameters that the configuration ties be two where the files hold two with different values, in place:
        so does transformers where it loads them."""
        first: dict[int, str] = {}
        for name, tensor in list(self.model.state_dict(keep_vars=True).items()):
            key = self.find(self._names(name) if self._names is not None else name)
            if key is None or not isinstance(tensor, torch.nn.Parameter):
                continue
            other = first.setdefault(id(tensor), key)
            if other != key and not shards.same_values(self.places[other], self.places[key]):
                path, _, leaf = name.rpartition(".")
                own = torch.nn.Parameter(torch.empty_like(tensor), tensor.requires_grad)
                self.model.get_submodule(path)._parameters[leaf] = own

    def find(self, name: str) -> str | None:
        """The tensor of the files that a name stands for, with the base model's prefix added or left out."""
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        for key in (name, name.removeprefix(prefix), prefix + name):
            for old, new in (("", ""), (".weight", ".gamma"), (".bias", ".beta")):
                if key.endswith(old) and key.removesuffix(old) + new in self.places:
                    return key.removesuffix(old) + new
        return None

    def keys(self, name: str) -> list[str]:
        """The tensors of the files that make up a parameter: one, unless experts lie in the files one by one.

        Raises:
            UnsupportedError: the files hold none.
        """
        if self._names is not None:
            name = self._names(name)
        whole = self.find(name)
        if whole is not None:
            return [whole]
        pieces = self._layouts.split(name, held(self.model, name).to("meta")) if self._names is None else {}
        found = [self.find(piece) for piece in pieces]
        if not found or None in found:
            raise UnsupportedError(
                f"src must hold a tensor for {name!r}, under this name or with the base model's prefix added or left "
                "out; pass `names` for files that name it otherwise."
            )
        return [key for key in found if key is not None]

    def is_whole(self, name: str) -> bool:
        """Whether one tensor of the files is the parameter."""
        return self._names is not None or self.find(name) is not None

    def owners(self) -> dict[str, str]:
        """Tensor of the files -> the parameter or buffer that it is part of, by the first name of a tied one.

        Tensors that the model has no place for are not among them.

        Raises:
            UnsupportedError: the files hold none for a parameter.
        """
        first: dict[int, str] = {}
        found: dict[str, str] = {}
        state = self.model.state_dict(keep_vars=True)
        lost: dict[str, Exception] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            own = first.setdefault(id(tensor), name)
            try:
                found.update(dict.fromkeys(self.keys(name), own))
            except UnsupportedError as error:
                if isinstance(tensor, torch.nn.Parameter):
                    lost[name] = error
        known = set(found.values())
        for name, reason in lost.items():
            if first[id(state[name])] not in known:
                raise reason
        return found

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The values of parameters or buffers, as they are stored or as `compute` says."""
        return {name: self.value(name) for name in names}

    def value(self, name: str) -> torch.Tensor:
        """One parameter's or buffer's values."""
        pieces = {key: self._tensor(name, self.places[key]) for key in self.keys(name)}
        return next(iter(pieces.values())) if self.is_whole(name) else self._layouts.join(pieces)

    def held_value(self, name: str) -> torch.Tensor | None:
        """The same; None for a buffer that the files do not hold."""
        if not isinstance(held(self.model, name), torch.nn.Parameter) and self.find(name) is None:
            return None
        return self.value(name)

    def pieces(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the files hold for a parameter's values, in the types that they store now, by their own names.

        Args:
            name: the parameter.
            value: its values, possibly of another shape than today's.
        """
        if self.is_whole(name):
            parts: dict[str | None, torch.Tensor] = {self.keys(name)[0]: value}
        else:  # by their names: where whole experts went there are fewer of them
            parts = {self.find(piece): part for piece, part in self._layouts.split(name, value).items()}
        return {
            key: part.to(stored_dtype(self.places[key])).contiguous() for key, part in parts.items() if key is not None
        }

    def _tensor(self, name: str, place: shards.Place) -> torch.Tensor:
        if place.dtype not in DTYPES and (
            place.dtype not in _WHOLE or isinstance(held(self.model, name), torch.nn.Parameter)
        ):
            raise UnsupportedError(f"src must hold floating tensors; {name!r} is {place.dtype}.")
        stored = read_place(place)
        return stored if self.compute is None or place.dtype not in DTYPES else stored.to(self.compute)


def to_stubs(stored: StoredModel) -> None:
    """Let every parameter be of the CPU and of its stored type, in place; all its values are one zero.

    Layers that are put on it get parameters of their own that are real, as beside weights in memory.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in stored.model.named_modules():
        for key, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                name = f"{path}.{key}" if path else key
                try:
                    dtype = stored_dtype(stored.places[stored.keys(name)[0]])
                except UnsupportedError:
                    dtype = old.dtype  # a tied one's second name
                made[id(old)] = torch.nn.Parameter(torch.zeros(1, dtype=dtype).expand(old.shape), old.requires_grad)
            module._parameters[key] = made[id(old)]


def as_stored(tensor: torch.Tensor) -> Any:
    """A tensor's values as weight files keep them: an array of its memory, of bits where NumPy lacks the type."""
    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def tag_of(dtype: torch.dtype) -> str:
    """The name of a type in a file."""
    return next(tag for tag, one in {**DTYPES, **_WHOLE}.items() if one == dtype)


def read_place(place: shards.Place) -> torch.Tensor:
    """The tensor whose bytes lie at a place."""
    # A plain read: a mapped shard would stay in memory, page by page, for as long as it is open.
    data = torch.empty(place.stop - place.start, dtype=torch.uint8)
    with open(place.file, "rb", buffering=0) as handle:
        weightfile.read_into(handle, place.start, data.numpy(), f"{place.file}: a tensor")
    return data.view(stored_dtype(place)).reshape(place.shape)


def read_rows(place: shards.Place, start: int, stop: int) -> torch.Tensor:
    """Some indices of the first axis of the tensor whose bytes lie at a place."""
    row = (place.stop - place.start) // max(1, place.shape[0])
    part = place.start + start * row, place.start + stop * row
    return read_place(shards.Place(place.file, *part, place.dtype, (stop - start, *place.shape[1:])))


class FileArray:
    """A tensor in a file as scoring reads an array, slice after slice of its first axis, in float32 or wider.

    Args:
        place: where its bytes lie.
    """

    def __init__(self, place: shards.Place) -> None:
        self._place = place
        self.shape, self.ndim = place.shape, len(place.shape)
        self.size = math.prod(place.shape)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return self[index : index + 1][0]
        start, stop, step = index.indices(self.shape[0])
        if step != 1:
            return np.asarray(self)[index]
        return floats(read_rows(self._place, start, max(start, stop))).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        whole = floats(read_place(self._place)).numpy()
        return whole if dtype is None else whole.astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> Any:
        """The values in another shape."""
        return np.asarray(self).reshape(*shape)

    @property
    def T(self) -> Any:
        """The values with their axes the other way round."""
        return np.asarray(self).T

    def sum(self, dtype: Any = None) -> Any:
        """The sum of all values."""
        return np.asarray(self).sum(dtype=dtype)


def floats(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def digest_of(data: Iterable[Any]) -> str:
    """SHA-256 over all tensors and plain values of batches, in hexadecimal."""
    return digest(list(data), bytes_of)


def bytes_of(value: Any) -> tuple[str, bytes] | None:
    """A tensor's type and shape, and its bytes; None for anything else."""
    if not isinstance(value, torch.Tensor):
        return None
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{value.dtype}{tuple(value.shape)}", raw.tobytes()


def stored_dtype(place: shards.Place) -> torch.dtype:
    """The type of a tensor in a file; UnsupportedError for one that cannot be computed with, such as 8-bit floats."""
    found = DTYPES.get(place.dtype) or _WHOLE.get(place.dtype)
    if found is None:
        raise UnsupportedError(
            f"{place.file} holds tensors of type {place.dtype}, which can be copied, not computed with: bring the "
            "folder to bfloat16 first"
        )
    return found


def held(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A model's parameter or buffer by its name."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    found = module._parameters.get(key, module._buffers.get(key))
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no tensor {name!r}")
    return found


def fill(module: torch.nn.Module, path: str, values: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Put weights, named by whole paths, into the module at a path, without gradients, in place."""
    module.load_state_dict({n[len(path) + 1 :]: v for n, v in values.items()}, strict=False, assign=True)
    return module.requires_grad_(False)


def to_meta(module: torch.nn.Module, names: Iterable[str] | None = None) -> None:
    """Let a module's weights go, all or those named, in place; their shapes stay."""
    names = [n for n, _ in module.named_parameters()] if names is None else names
    meta = {n: torch.empty_like(module.get_parameter(n), device="meta") for n in names}
    module.load_state_dict(meta, strict=False, assign=True)


def empty_model(source: Path, cache: bool = False, fields: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """The checkpoint's model without weights; buffers are real, for they are computed, not stored.

    Args:
        source: the folder.
        cache: whether `use_cache` stays what the configuration says.
        fields: of the configuration, to be other than it says.

    Raises:
        FileFormatError: `source` is no folder of transformers.
        ConfigError: the configuration has no such field, or builds no model with it.
    """
    transformers = library("transformers", "hf")
    accelerate = library("accelerate", "torch")
    if not (source / "config.json").is_file():
        raise FileFormatError(f"src must be a Hugging Face folder with a config.json. Received: {str(source)!r}")
    try:
        config: Any = transformers.AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(f"{source} cannot be opened by transformers: {_line(error)}") from None
    for name, value in (fields or {}).items():
        if not hasattr(config, name):
            known = [n for n in vars(config) if n[0] != "_"]
            raise ConfigError(f"{source / 'config.json'} has no field {name!r}{check.near(name, known)}")
        setattr(config, name, value)
    kinds = getattr(config, "architectures", None) or []
    kind = next((getattr(transformers, k) for k in kinds if hasattr(transformers, k)), None)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            made = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        if not fields:
            raise
        raise ConfigError(f"the configuration builds no model with {dict(fields)}: {_line(error)}") from None
    model: torch.nn.Module = made
    made.tie_weights()  # making a model without weights makes each parameter anew
    if hasattr(made.config, "use_cache") and not cache:
        made.config.use_cache = False
    return model.eval()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def write_tensors(handle: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file from the tensors' own memory: its library would hold the whole block a second time."""
    written = {dtype: name for name, dtype in DTYPES.items()}
    entries, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": written[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    handle.write(struct.pack("<Q", len(head)) + head)
    for tensor in tensors.values():
        handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
