"""W16A16S folders: sparse float16 weights as MindIE's tools expect them before they compress them for the 310P."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from slimkit.core import check, files, match
from slimkit.core.ascend import folder as folders
from slimkit.core.ascend.entropy import lzma_bits, mean_entropy
from slimkit.core.ascend.folder import CONFIG, DENSE, DESCRIPTION, HEAD, Array, config_told_by
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.showing import Shown

__all__ = ["CONFIG", "DESCRIPTION", "W16A16S", "W16A16SReport", "config_told_by", "load_w16a16s", "save_arrays"]

WEIGHTS = "quant_model_weights.safetensors"
KIND = "W16A16S"

# What a tensor's share of zeros must be to be called sparse when no targets are given.
_LEAST_ZEROS = 0.05
# The ratio that the peer tool's documentation uses as its default, and what we call near it.
ADVISED_RATIO = 0.3
_NEAR = 0.1
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, repr=False)
class W16A16SReport(Shown):
    """What was written.

    Args:
        directory: the folder.
        sparse: tensor -> share of zeros, for those marked W16A16S.
        dense: tensors marked FLOAT.
        zero_ratio: share of zeros over all W16A16S tensors.
        underflowed: values that were not zero and are in float16.
        weight_bytes: bytes of all tensors.
        entropy_bits: bits a weight that the W16A16S tensors' bytes hold, of 16: what a codec of single bytes needs at
            least. Zeros lower it, and few bits of mantissa (`SparseConfig.mantissa_bits`) more.
        lzma_bits: the same as LZMA packs them, a general packer that may find what single bytes do not show.
        copied: files copied beside them.
        advice: what to consider; may be empty.
        tied: tensor that is not written -> the one that it is: an output layer that config.json ties to the table.
    """

    directory: str
    sparse: dict[str, float]
    dense: list[str]
    zero_ratio: float
    underflowed: int
    weight_bytes: int
    entropy_bits: float
    lzma_bits: float
    copied: list[str]
    advice: list[str]
    tied: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class W16A16S(Shown):
    """A W16A16S folder in memory.

    Args:
        tensors: name -> array, float16 where it is a float.
        kinds: name -> "W16A16S" or "FLOAT".
        config: what config.json says.
    """

    tensors: dict[str, Array]
    kinds: dict[str, str]
    config: dict[str, Any]


def save_arrays(
    directory: files.PathLike,
    weights: Mapping[str, Array],
    config: Mapping[str, Any] | files.PathLike,
    *,
    targets: Sequence[str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> W16A16SReport:
    """Write weights as a W16A16S folder; floats become float16.

    Args:
        directory: the folder; made if missing, other files in it are left alone. A reader sees all of its old files or
            all of the new ones.
        weights: name -> array, by Hugging Face's names.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
        targets: globs over tensor names that are marked W16A16S. None: every matrix called "*.weight" of which at least
            5 % are zeros.
        tied: name -> the name of the same tensor, which stands before it; written once where the config says
            tie_word_embeddings, by which every reader puts it back.

    Returns:
        What was written, with advice on the ratio.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, no sparse tensor, or a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.
    """
    folder = files.as_path(directory, "directory")
    check.instance(weights, Mapping, "weights", "a dict of tensor name -> array")
    halves, underflowed = as_halves(weights)
    sparse = _sparse(halves, targets)
    settings, companions = folders.settings_of(config, KIND)
    once = dict(tied or {}) if settings.get("tie_word_embeddings") is True else {}
    for name, first in once.items():
        del halves[name]
        if name in sparse:
            share = sparse.pop(name)
            sparse[first] = share
    kinds = {name: KIND if name in sparse else DENSE for name in halves}
    copied = folders.write(folder, WEIGHTS, halves, settings, companions, KIND, kinds, once)
    total = sum(halves[name].size for name in sparse)
    ratio = sum(share * halves[name].size for name, share in sparse.items()) / total
    return W16A16SReport(
        directory=str(folder),
        sparse=sparse,
        dense=[name for name, kind in kinds.items() if kind == DENSE],
        zero_ratio=ratio,
        underflowed=underflowed,
        weight_bytes=sum(v.nbytes for v in halves.values()),
        entropy_bits=mean_entropy(halves[name] for name in sparse),
        lzma_bits=lzma_bits([halves[name] for name in sparse]),
        copied=copied,
        advice=_advice(ratio, sparse, underflowed),
        tied=once,
    )


def as_halves(weights: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """The tensors with every float as float16, and how many values vanished on the way."""
    halves: dict[str, Array] = {}
    underflowed = 0
    for name, value in weights.items():
        if not isinstance(name, str) or not name or name in HEAD:
            check.wrong_value("weights", f"named by non-empty str other than {', '.join(HEAD)}", name)
        array = np.asarray(value)
        # bfloat16 from ml_dtypes has no NumPy kind of its own.
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            wide = array.astype(np.float32)
            largest = float(np.abs(wide).max(initial=0.0))
            if not largest <= _FLOAT16_MAX:
                raise ArgumentError(
                    f"weights[{name!r}] must be finite and at most {_FLOAT16_MAX:g}, which float16 holds. Received: "
                    f"{largest:g}. Rescale the layer or leave it out."
                )
            half = wide.astype(np.float16)
            underflowed += int(((wide != 0) & (half == 0)).sum())
            halves[name] = half
        elif array.dtype.kind in "iub":
            halves[name] = array
        else:
            check.wrong_type(f"weights[{name!r}]", "an array of floats, integers or bool", array)
    if not halves:
        check.wrong_value("weights", "at least one tensor", dict(weights))
    return halves, underflowed


def _sparse(halves: Mapping[str, Array], targets: Sequence[str] | None) -> dict[str, float]:
    """The tensors to mark as sparse, each with its share of zeros."""
    matrices = {n: v for n, v in halves.items() if v.ndim == 2 and v.dtype == np.float16 and v.size}
    shares = {n: 1 - np.count_nonzero(v) / v.size for n, v in matrices.items()}
    if targets is not None:
        found = match.match(list(halves), check.strings(targets, "targets"), whole_modules=True)
        match.demand(found, list(halves), "targets")
        chosen = {n: shares[n] for n in found.names if n in shares}
    else:
        chosen = {n: s for n, s in shares.items() if n.endswith(".weight") and s >= _LEAST_ZEROS}
    if not chosen:
        raise ArgumentError(
            f"weights must hold a sparse matrix (at least {_LEAST_ZEROS:.0%} zeros). Received: none among "
            f"{len(matrices)} matrices. Sparsify the model first."
        )
    return chosen


def _advice(ratio: float, sparse: Mapping[str, float], underflowed: int) -> list[str]:
    advice = []
    if ratio > ADVISED_RATIO + _NEAR:
        advice.append(
            f"{ratio:.0%} of the sparse matrices are zero; the documented tool works with {ADVISED_RATIO:.0%}. Check "
            "the accuracy on real inputs."
        )
    elif ratio < ADVISED_RATIO - _NEAR:
        advice.append(
            f"only {ratio:.0%} of the sparse matrices are zero; with {ADVISED_RATIO:.0%}, the documented tool's own "
            "ratio, there is more to compress."
        )
    uneven = [name for name, share in sparse.items() if share < _LEAST_ZEROS]
    if uneven:
        advice.append(f"{len(uneven)} matrices are marked sparse with hardly a zero, the first is {uneven[0]}.")
    if underflowed:
        advice.append(f"{underflowed} values became zero in float16.")
    return advice


def load_w16a16s(directory: files.PathLike) -> W16A16S:
    """Read a W16A16S folder and check that its files agree.

    Args:
        directory: the folder.

    Returns:
        Tensors, their kinds and the config.

    Raises:
        FileFormatError: a file is missing or damaged, the description is of another kind, or the two disagree.
        LinkPathError: a file is a symbolic link.

    Source:
        The layout of MindIE's documentation, "W16A16SC sparse quantization":
        https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html

    Example:
        >>> _ = save_arrays("/tmp/w16a16s", {"fc.weight": np.eye(4)}, {"model_type": "none"})
        >>> load_w16a16s("/tmp/w16a16s").kinds
        {'fc.weight': 'W16A16S'}
    """
    folder, tensors, kinds, config = folders.read(directory, WEIGHTS, KIND)
    for name, value in tensors.items():
        if value.dtype.kind == "f" and value.dtype != np.float16:
            raise FileFormatError(f"{folder / WEIGHTS}: {name} must be float16. Received: {value.dtype.name}")
    return W16A16S(tensors, kinds, config)
