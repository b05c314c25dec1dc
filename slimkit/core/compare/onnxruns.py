"""ONNX files judged in onnxruntime, beside models of a framework."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.batch import as_call
from slimkit.core.compare.framework import CompareFramework
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.files import readable_file
from slimkit.core.lazy import library

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file that is judged.

    Args:
        path: the file; weights may lie in a file beside it.
    """

    path: Path


def is_onnx(source: Any) -> bool:
    """Whether what names a model is the path of an ONNX file.

    Example:
        >>> is_onnx("small.onnx"), is_onnx("folder")
        (True, False)
    """
    return isinstance(source, (str, Path)) and str(source).endswith(".onnx")


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU with its own choice of threads.

    Raises:
        FileFormatError: there is no such file, or onnxruntime does not take it.
        MissingFrameworkError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = readable_file(path, "the ONNX file")
        runtime = library("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own kinds
            reason = " ".join(str(error).split())[:300]
            raise FileFormatError(f"onnxruntime does not take {path}: {reason}") from error
        self._inputs = self._session.get_inputs()

    def run(self, named: dict[str, Array], ordered: tuple[Array, ...] = ()) -> Array:
        """The first output for inputs by name; a file of one input takes the first array whatever its name."""
        feeds = {}
        for at, one in enumerate(self._inputs):
            value = named.get(one.name)
            if value is None and at < len(ordered):
                value = ordered[at]
            if value is None and len(self._inputs) == 1:
                value = next(iter(named.values()))
            if value is None:
                raise UnsupportedError(
                    f"{self.path}: the input {one.name!r} is none that a comparison has: {', '.join(named)}"
                )
            feeds[one.name] = np.ascontiguousarray(value, dtype=_TYPES.get(one.type, value.dtype))
        try:
            found: Array = np.asarray(self._session.run([self._session.get_outputs()[0].name], feeds)[0])
        except Exception as error:  # onnxruntime raises its own kinds
            shapes = {name: array.shape for name, array in feeds.items()}
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedError(f"{self.path} does not run with inputs of {shapes}: {reason}") from error
        return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)

    @property
    def length(self) -> int | None:
        """Tokens that the file takes, where its sequence axis is not open."""
        shape = self._inputs[0].shape
        return shape[1] if len(shape) > 1 and isinstance(shape[1], int) else None

    def window(self, ids: Array) -> Array:
        """Logits (length, vocabulary) of a window of tokens; a shorter one is padded behind, which no token sees."""
        n, fixed = len(ids), self.length
        if fixed is not None and n > fixed:
            raise ArgumentError(
                f"{self.path} takes {fixed} tokens and a window has {n}: give length={fixed} (--length {fixed}), or "
                "export it with an open axis (--dynamic 1:sequence)"
            )
        wide = np.zeros((1, fixed or n), np.int64)
        wide[0, :n] = ids
        mask = (np.arange(wide.shape[1]) < n).astype(np.int64)[None]
        found = self.run({"input_ids": wide, "attention_mask": mask, "position_ids": np.arange(wide.shape[1])[None]})
        if found.ndim != 3 or len(found) != 1:
            raise UnsupportedError(f"{self.path} must give logits (1, length, vocabulary). Received: {found.shape}")
        return found[0, :n]

    def figures(self) -> dict[str, float | None]:
        """parameters, nonzero and bytes of the file's weights; MACs are not counted in files."""
        onnx = library("onnx", "onnx")
        weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(self.path)).graph.initializer if t.dims]
        beside = self.path.with_name(f"{self.path.name}.data")
        return {
            "parameters": float(sum(w.size for w in weights)),
            "nonzero": float(sum(int(np.count_nonzero(w)) for w in weights)),
            "bytes": float(sum(f.stat().st_size for f in (self.path, beside) if f.is_file())),
            "macs": None,
        }


_TYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


class BesideFiles(CompareFramework):
    """A framework's models and ONNX files alike.

    Args:
        wing: of the models that are no files.
    """

    def __init__(self, wing: CompareFramework) -> None:
        self._wing = wing
        self.model_type, self.model_word, self.tensor_type = wing.model_type, wing.model_word, wing.tensor_type

    def held(self, source: Any) -> bool:
        return not isinstance(source, OnnxSource) and self._wing.held(source)

    def open(self, source: Any, name: str) -> Any:
        return OnnxModel(source.path) if isinstance(source, OnnxSource) else self._wing.open(source, name)

    @contextlib.contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        if isinstance(model, OnnxModel):
            yield
            return
        with self._wing.evaluating(model):
            yield

    def logits(self, model: Any, ids: Array) -> Array:
        return model.window(ids) if isinstance(model, OnnxModel) else self._wing.logits(model, ids)

    def read(self, model: Any, n: int) -> int:
        return 1 if isinstance(model, OnnxModel) else self._wing.read(model, n)

    def outputs(self, model: Any, batch: Any) -> Array:
        if not isinstance(model, OnnxModel):
            return self._wing.outputs(model, batch)
        args, named = as_call(batch)
        arrays = {key: np.asarray(value) for key, value in named.items()}
        found = model.run(arrays, tuple(np.asarray(value) for value in args))
        if found.ndim != 3:
            return found
        mask = arrays.get("attention_mask")
        if mask is None or mask.shape != found.shape[:2]:
            return np.asarray(found.mean(1))
        weight = mask.astype(found.dtype)[..., None]
        return np.asarray((found * weight).sum(1) / np.maximum(weight.sum(1), 1))

    def figures(self, model: Any, example: Any) -> dict[str, Any]:
        return model.figures() if isinstance(model, OnnxModel) else self._wing.figures(model, example)

    def window(self, ids: Array) -> Any:
        return self._wing.window(ids)

    # What is asked of a framework's own models alone.

    def check(self, model: Any, name: str) -> Any:
        return self._wing.check(model, name)

    def called(self, model: Any, example: Any) -> Any:
        return self._wing.called(model, example)

    def measured(self, model: Any, example: Any) -> Any:
        return self._wing.measured(model, example)

    def numbers(self, tensor: Any) -> Array:
        return self._wing.numbers(tensor)

    def forward(self, model: Any, example: Any) -> None:
        if not isinstance(model, OnnxModel):
            self._wing.forward(model, example)
            return
        args, named = as_call(example)
        arrays = {key: np.asarray(value) for key, value in named.items()} or {"input_ids": np.asarray(args[0])}
        ids = arrays.get("input_ids")
        if ids is not None and ids.ndim == 2 and len(ids) == 1 and ids.dtype.kind in "iu":
            model.window(ids[0])
        else:
            model.run(arrays, tuple(np.asarray(value) for value in args))

    def decode(self, model: Any, ids: Array, n_tokens: int) -> bool:
        return not isinstance(model, OnnxModel) and self._wing.decode(model, ids, n_tokens)
