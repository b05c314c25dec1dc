"""PyTorch weight files (.pt .pth .pkl .bin), read with weights_only=True and nothing else; PyTorch is handed in."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files, traffic
from slimkit.core.checkpoint.weightfile import Array, Entry, Weights
from slimkit.core.errors import FileFormatError, UnsupportedError

# torch's name of an element type -> the name of weight files.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_NAMES = {tag: name for name, tag in _DTYPES.items()}

# Under these keys training scripts put the weights beside an optimizer or an epoch.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")

# What the restricted unpickler and the tensor rebuilders raise on damaged or hostile files.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    struct.error,
)


class TorchFile(Weights):
    """One torch.save file of tensors; its data stay on the disk until a tensor is asked for."""

    def __init__(self, path: files.PathLike, torch: Any) -> None:
        super().__init__(Path(path))
        self._torch = torch
        # Older ones could be led to run code in spite of weights_only (CVE-2025-32434, CVE-2026-24747).
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
            raise UnsupportedError(
                f"{path} is a pickle, which torch reads safely from 2.10 on. Installed: {torch.__version__}; "
                "use safetensors or a newer torch"
            )
        size = self.path.stat().st_size
        zipped = self._check_zip(size)
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)
        except _LOAD_ERRORS as error:
            if "Unsupported global" in str(error) or "GLOBAL " in str(error):
                raise FileFormatError(
                    f"{self.path} holds more than tensors, as torch.save(model) writes it, and reading that would run "
                    "code; it is read with weights_only=True alone. Save the weights: torch.save(model.state_dict(), "
                    "...)"
                ) from None
            raise self._damaged(str(error).partition("\n")[0][:300]) from None
        if not isinstance(found, Mapping):
            raise self._damaged(f"it holds a {type(found).__name__}, not a dict of tensors")
        self._tensors: dict[str, Any] = {}
        for name, value in _unwrapped(found, torch).items():
            if not isinstance(name, str):
                raise self._damaged(f"the name {str(name)[:40]} is no str")
            if isinstance(value, torch.Tensor):
                self._add(name, value, size)
            elif isinstance(value, (bool, int, float, str)):
                self.values[name] = value
        if not self._tensors and not self.values:
            raise self._damaged("it holds no tensor")

    def _damaged(self, why: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is not a PyTorch weight file that loads with weights_only=True: {why}")

    def _check_zip(self, size: int) -> bool:
        with open(self.path, "rb") as handle:
            # torch.load knows a zip by its first bytes, so whatever it would open as one is looked into here.
            if handle.read(2) != b"PK":
                return False
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error, IndexError) as error:
            raise self._damaged(str(error)) from None
        # torch.save stores without compression; anything else is a bomb or no weight file.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise self._damaged("its parts are compressed or claim more bytes than the file has")
        return True

    def _add(self, name: str, tensor: Any, size: int) -> None:
        if tensor.layout is not self._torch.strided or tensor.is_quantized or _name(tensor) not in _DTYPES:
            raise self._damaged(f"tensor {name!r} is of kind {tensor.dtype}, {tensor.layout}")
        entry = Entry(tag_of(tensor), tuple(tensor.shape))
        # A stride of zero makes a small storage look like terabytes.
        if entry.nbytes > size or tensor.untyped_storage().nbytes() > size:
            raise self._damaged(f"tensor {name!r} claims {entry.nbytes} bytes in a file of {size}")
        self.entries[name] = entry
        self._tensors[name] = tensor.detach()

    def raw(self, name: str) -> Array:
        traffic.read(self.path, self.entries[name].nbytes)
        return stored(self._tensors[name], self._torch)

    def close(self) -> None:
        self._tensors.clear()


def _unwrapped(found: Mapping[Any, Any], torch: Any) -> Mapping[Any, Any]:
    """The dict of tensors inside what training scripts save around it."""
    for _ in range(4):
        if any(isinstance(v, torch.Tensor) for v in found.values()):
            return found
        inner = [found[k] for k in _WRAPPERS if isinstance(found.get(k), Mapping)]
        if len(inner) != 1:
            return found
        found = inner[0]
    return found


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tag_of(tensor: Any) -> str:
    """The element type's name in weight files."""
    return _DTYPES[_name(tensor)]


def storable(tensor: Any, name: str, torch: Any) -> Any:
    """The tensor, or an UnsupportedError that says why a file of plain numbers cannot hold it, and what to do.

    A conjugate or negated view is plain numbers that are worked out on reading, and passes.

    Args:
        tensor: what is to be saved.
        name: how the message calls it.
        torch: PyTorch.
    """
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        why = "has no shape yet: it is of a lazy layer; run the model on a batch once"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        why = f"is {kind} and has no plain layout: save to_dense() of it, or the tensors that it consists of"
    elif tensor.is_quantized:
        why = f"is quantised ({_name(tensor)}): save its int_repr() with its scale and zero point, or dequantize()"
    elif tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        why = "has no values: it is fake or on the meta device; load weights into the model first"
    elif _name(tensor) not in _DTYPES:
        why = f"has elements of type {_name(tensor)}; files hold {', '.join(_DTYPES)}"
    else:
        return tensor
    raise UnsupportedError(f"{name} {why}.")


def stored(tensor: Any, torch: Any) -> Array:
    """A tensor's values in the stored form of weight files: NumPy, on the CPU, bfloat16 and float8 as bits."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if _name(tensor) == "bfloat16" or _name(tensor).startswith("float8"):
        tensor = tensor.view(torch.uint16 if tensor.element_size() == 2 else torch.uint8)
    found: Array = tensor.numpy()
    return found


def restored(array: Array, dtype: str, torch: Any) -> Any:
    """The tensor of a stored array; shares its memory."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    wanted = getattr(torch, _NAMES[dtype])
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


def write_torch(
    path: files.PathLike,
    tensors: Mapping[str, Any],
    values: Mapping[str, Any] | None,
    torch: Any,
    before: Callable[[Path], object] | None = None,
) -> None:
    """Write tensors, numbers and strings as one torch.save file, atomically; it loads with weights_only=True."""
    with files.atomic_file(path, before=before) as handle:
        torch.save({**tensors, **(values or {})}, handle)
