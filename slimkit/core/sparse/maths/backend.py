"""The array namespace of an input, and the factorisations and selections that namespaces spell differently."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError
from slimkit.core.log import logger

# Up to this many columns moments and factors are float64: two libraries then agree to the last bits that matter.
NARROW = 256

Array = Any  # an array of NumPy or torch: anything array_api_compat knows


@cache
def _tell(what: str, where: str, why: str) -> None:
    # The cache makes it once a process.
    logger.warning("%s is missing on %s (%s): using float64 on the CPU.", what, where, why)


def namespace(array: Array) -> Any:
    """The array API namespace of an array."""
    import array_api_compat

    return array_api_compat.array_namespace(array)


def device_of(array: Array) -> Any:
    """The device of an array, as its namespace takes it."""
    import array_api_compat

    return array_api_compat.device(array)


def precision(array: Array, width: int) -> Any:
    """The dtype to calculate in: float32, or float64 for narrow layers, which costs nothing there.

    Args:
        array: an array on the device that will calculate.
        width: columns of the matrices to factor.
    """
    xp = namespace(array)
    # NPUs and MPS have no float64.
    wide = width > NARROW or not str(device_of(array)).startswith(("cpu", "cuda"))
    return xp.float32 if wide else xp.float64


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy array with the same values, in main memory."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def like(values: np.ndarray[Any, Any], model: Array) -> Array:
    """NumPy values as an array of the kind and device of `model`."""
    xp = namespace(model)
    return xp.asarray(values, device=device_of(model))


def library(array: Array) -> Any:
    """The module behind the namespace: the same functions without the standard's checks, for inner loops."""
    return sys.modules[namespace(array).__name__.removeprefix("array_api_compat.")]


def bits(array: Array) -> Array:
    """The same memory as signed integers, which order as nonnegative floats do."""
    lib = library(array)
    return array.view(lib.int32 if array.dtype.itemsize == 4 else lib.int64)


def erase(array: Array, keep: Array) -> None:
    """Put zeros where a mask of the same shape is False, in place and faster than a choice of two values."""
    xp, values = namespace(array), bits(array)
    ones = xp.astype(keep, values.dtype)
    ones *= -1
    values &= ones


def own_copy(array: Array, dtype: Any = None) -> Array:
    """A contiguous copy."""
    xp = namespace(array)
    copy = xp.empty(array.shape, dtype=array.dtype if dtype is None else dtype, device=device_of(array))
    copy[...] = array
    return copy


def inner(a: Array, b: Array) -> float:
    """The sum of the products of two arrays' entries."""
    return float(library(a).dot(a.reshape(-1), b.reshape(-1)))


def all_finite(array: Array) -> bool:
    """Whether no entry is NaN or infinite."""
    xp = namespace(array)
    # One pass: infinity or NaN anywhere spoils the sum. Large numbers may do so, too; then each is looked at.
    return bool(xp.isfinite(xp.sum(array))) or bool(xp.all(xp.isfinite(array)))


def row_products(a: Array, b: Array) -> Array:
    """The inner products of the rows of two matrices, as a column."""
    xp, near = namespace(a), 64  # rows whose products stay in the processor's cache
    pieces = [slice(start, start + near) for start in range(0, a.shape[0], near)]
    return xp.concat([xp.sum(a[piece] * b[piece], axis=1, keepdims=True) for piece in pieces])


def kth_smallest(rows: Array, k: int) -> Array:
    """The k-th smallest entry of each row, k counted from 1, as a column."""
    xp = namespace(rows)
    if hasattr(xp, "kthvalue"):
        return xp.kthvalue(rows, k, 1, True)[0]
    if hasattr(xp, "partition"):
        return xp.partition(rows, k - 1, axis=1)[:, k - 1 : k]
    return xp.sort(rows, axis=1)[:, k - 1 : k]


def less_vector(column: Array, matrix: Array, vector: Array) -> None:
    """column -= matrix @ vector, in place."""
    if hasattr(column, "addmv_"):
        column.addmv_(matrix, vector, alpha=-1)
    else:
        column -= matrix @ vector


def add_product(matrix: Array, left: Array, right: Array, factor: float = 1) -> None:
    """matrix += factor * left @ right, in place; torch does it in one call, without the product in memory."""
    if hasattr(matrix, "addmm_"):
        matrix.addmm_(left, right, alpha=factor)
    else:
        product = left @ right
        if factor != 1:
            product *= factor
        matrix += product


def product_into(matrix: Array, left: Array, right: Array) -> None:
    """matrix = left @ right, in its own memory."""
    if hasattr(matrix, "addmm_"):
        matrix.addmm_(left, right, beta=0)
    else:
        matrix[...] = left @ right


def cholesky(matrix: Array) -> Array | None:
    """Lower Cholesky factor; None when the matrix is not positive definite in its own precision."""
    xp = namespace(matrix)
    try:
        factor = xp.linalg.cholesky(matrix)
    except Exception as error:
        if "LinAlgError" in type(error).__name__:
            return None
        if not isinstance(error, (NotImplementedError, RuntimeError, TypeError)):
            raise
        return _on_cpu(_cholesky_numpy, matrix, error)
    # What is not finite in a row reaches its diagonal.
    return factor if bool(xp.isfinite(xp.sum(xp.linalg.diagonal(factor)))) else None


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix."""
    xp = namespace(matrix)
    try:
        values, vectors = xp.linalg.eigh(matrix)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        _tell("eigh", str(device_of(matrix)), str(error)[:200])
        found = np.linalg.eigh(to_numpy(matrix).astype(np.float64))
        values, vectors = (like(part.astype(np.float32), matrix) for part in found)
    return values, vectors


def inverse_lower(factor: Array) -> Array:
    """Inverse of a lower triangular matrix."""
    xp = namespace(factor)
    if hasattr(xp.linalg, "solve_triangular"):
        eye = xp.eye(factor.shape[0], dtype=factor.dtype, device=device_of(factor))
        try:
            return xp.linalg.solve_triangular(factor, eye, upper=False, out=eye)
        except (NotImplementedError, RuntimeError) as error:
            return _on_cpu(_inverse_lower_numpy, factor, error)
    return _inverse_lower_numpy(factor)


def _cholesky_numpy(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None


def _inverse_lower_numpy(factor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from scipy.linalg import get_lapack_funcs

    (trtri,) = get_lapack_funcs(("trtri",), (factor,))
    inverse, info = trtri(np.asfortranarray(factor), lower=1)
    if info:
        raise ArgumentError(f"a triangular factor is singular at row {info}.")
    return np.tril(inverse)


def _on_cpu(function: Any, matrix: Array, error: Exception) -> Array | None:
    """Run a factorisation in float64 on the CPU where the device or the dtype lacks it, and say so once."""
    _tell(function.__name__.strip("_").removesuffix("_numpy"), str(device_of(matrix)), str(error)[:200])
    result = function(to_numpy(matrix).astype(np.float64))
    return None if result is None else like(result.astype(np.float32), matrix)
