"""The argument rules of the delta layers: sizes, rates, activations, initial values, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ArgumentError, ArgumentTypeError

# The names MindSpore's get_activation knows, which the documents refer to; both wings offer all of them.
ACTIVATIONS = (
    "relu", "relu6", "rrelu", "elu", "celu", "selu", "gelu", "fast_gelu", "silu", "mish", "hswish", "hsigmoid",
    "sigmoid", "tanh", "leakyrelu", "leaky_relu", "logsigmoid", "softmax", "logsoftmax", "softmin", "softsign",
    "softshrink", "hshrink", "tanhshrink", "prelu",
)  # fmt: skip


# The label of a row that does not count, as in every framework's cross entropy.
IGNORED = -100
# The logarithm of a probability that is zero in float32; two of -inf, as a masked class has them, have no difference.
IMPOSSIBLE = -104.0

INITIALIZERS = (
    "zeros", "zero", "ones", "one", "normal", "uniform", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal",
    "truncated_normal", "variance_scaling", "orthogonal", "identity",
)  # fmt: skip


class ActivationError(ArgumentError, ArgumentTypeError, KeyError):
    """An activation of that name does not exist; a KeyError where the documents say so, a ValueError elsewhere."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class SizeError(ArgumentError, ArgumentTypeError):
    """A size below 1: the documents promise a TypeError for one class and a ValueError for another."""


def size(value: Any, name: str) -> int:
    """A positive int; a bool or another type is a TypeError, 0 and below are a TypeError and a ValueError alike."""
    check.instance(value, int, name, "a positive int")
    if value < 1:
        raise SizeError(f"{name} must be a positive int. Received: {value!r}")
    return int(value)


def check_sizes(**sizes: Any) -> None:
    """Refuse a size that is not a positive int, by its name."""
    for name, value in sizes.items():
        size(value, name)


def rate(value: Any, name: str) -> float:
    """A dropout rate, int or float, in [0, 1)."""
    check.instance(value, (int, float), name, "a float")
    return check.ratio(value, name, zero=True)


def check_prefix(prefix_token_num: Any, batch_size: Any) -> int:
    """Prefix tokens per sample; the number of tokens must be a multiple of the batch."""
    tokens, batch = size(prefix_token_num, "prefix_token_num"), size(batch_size, "batch_size")
    if tokens % batch:
        check.wrong_value("prefix_token_num", f"a multiple of batch_size = {batch}", tokens)
    return tokens // batch


def check_pairs(rows: int, labels: int) -> int:
    """The number of samples behind logits that rdrop_repeat doubled."""
    if rows % 2 or rows == 0:
        check.wrong_value("logits", "of an even number of rows, two for each sample (see rdrop_repeat)", rows)
    if labels != rows:
        check.wrong_value("label_ids", f"of {rows} rows, as many as the logits", labels)
    return rows // 2


def check_class_numbers(is_float: bool, dtype: Any) -> None:
    """Refuse class numbers that are no integers."""
    if is_float:
        check.wrong_type("label_ids", "integers, or probabilities of the logits' shape", dtype)


def check_rdrop_alpha(alpha: Any) -> float:
    """R-Drop's weight: an int or float."""
    check.instance(alpha, (int, float), "alpha", "an int or float")
    return float(alpha)


def activation_name(value: Any, name: str) -> str:
    """A known activation's name in lower case; ActivationError offers the nearest."""
    check.instance(value, str, name, "a str")
    word = str(value).lower()
    if word not in ACTIVATIONS:
        raise ActivationError(
            f"{name} must be one of {', '.join(ACTIVATIONS)}. Received: {value!r}{check.near(word, ACTIVATIONS)}"
        )
    return word


def initializer_name(value: str, name: str) -> str:
    """A known initialiser's name as the table has it; ArgumentError offers the nearest.

    MindSpore's spellings, "XavierUniform" and "xavieruniform", are as good as "xavier_uniform".

    Example:
        >>> initializer_name("TruncatedNormal", "weight_init")
        'truncated_normal'
    """
    known = {word.replace("_", ""): word for word in INITIALIZERS}
    return str(check.choice(known.get(value.lower().replace("_", ""), value), INITIALIZERS, name))


def check_alpha(value: Any, name: str = "lora_alpha") -> float:
    """A finite int or float other than 0; bool is refused."""
    if check.number(value, name) == 0:
        check.wrong_value(name, "a number other than 0", value)
    return float(value)


def check_dropout(value: Any, name: str = "lora_dropout") -> float:
    """A float in [0, 1); an int is refused, as the documents say."""
    check.instance(value, float, name, "a float")
    return check.ratio(value, name, zero=True)


def check_shape(shape: Sequence[int], wanted: Sequence[int], name: str, words: str) -> None:
    """Refuse a tensor given as initial value whose shape is not the parameter's."""
    if tuple(shape) != tuple(wanted):
        check.wrong_value(name, f"of shape {words} = {tuple(wanted)}", tuple(shape))


def check_reduction(hidden_size: int, reduction_factor: int, argument: str = "hidden_size") -> int:
    """The bottleneck's width, hidden_size // reduction_factor; ArgumentError when nothing would be left."""
    size(reduction_factor, "reduction_factor")
    if reduction_factor > hidden_size:
        check.wrong_value("reduction_factor", f"at most {argument} = {hidden_size}", reduction_factor)
    return hidden_size // reduction_factor


def check_lora_dense(
    in_channels: Any, out_channels: Any, lora_rank: Any, lora_alpha: Any, lora_dropout: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of a and b of LoRADense, its arguments checked."""
    check_sizes(in_channels=in_channels, out_channels=out_channels, lora_rank=lora_rank)
    check_alpha(lora_alpha)
    check_dropout(lora_dropout)
    return (lora_rank, in_channels), (out_channels, lora_rank)


def check_low_rank_adapter(hidden_size: Any, reduction_factor: Any, low_rank_size: Any, non_linearity: Any) -> int:
    """The arguments of LowRankAdapterLayer that mean the same in both frameworks; gives the bottleneck's width."""
    size(hidden_size, "hidden_size")
    width = check_reduction(hidden_size, reduction_factor)
    size(low_rank_size, "low_rank_size")
    activation_name(non_linearity, "non_linearity")
    return width


def check_adapter(hidden_size: Any, bottleneck_size: Any, non_linearity: Any) -> None:
    """The arguments of AdapterLayer that mean the same in both frameworks."""
    check_sizes(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
    activation_name(non_linearity, "non_linearity")
