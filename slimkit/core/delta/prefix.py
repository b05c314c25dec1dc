"""Prefixes on models nobody edits: the options, what was seen of each attention layer, and which layers are meant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slimkit.core import check
from slimkit.core.delta import opening
from slimkit.core.delta.layers import rate, size
from slimkit.core.errors import ArgumentError, PatternError, UnsupportedError
from slimkit.core.match import demand, match

ROWS = "mindpet_delta_prefixtuning"


class Seen(NamedTuple):
    """One attention layer: heads of its keys, width of a head, heads of its queries, and keys and values of a run.

    `key` and `value` are (tokens, heads * width) of the run's first sample; None where nothing ran.
    """

    heads: int
    width: int
    query_heads: int
    key: Any = None
    value: Any = None


@dataclass(frozen=True)
class PrefixOptions:
    """The checked options of a prefix; see `checked`."""

    prefix_token_num: int
    projection: bool
    mid_dim: int
    dropout_rate: float
    text_ids: list[int] | None
    inputs: Any
    sizes: Mapping[str, Sequence[int]] | None
    positions: list[str] | None
    init: str = "random"
    seed: int = 0

    def ids(self, vocabulary: Callable[[], int]) -> list[int] | None:
        """The tokens whose keys and values a prefix starts as; None for random numbers.

        Args:
            vocabulary: gives how many tokens the model knows.

        Raises:
            ArgumentError: the text has a token that the vocabulary lacks.
        """
        if self.text_ids is not None:
            with contextlib.suppress(UnsupportedError):  # no table is known: the run that reads the text finds out
                opening.refuse_unknown(self.text_ids, vocabulary())
            return self.text_ids
        return opening.drawn(vocabulary(), self.prefix_token_num, self.seed) if self.init == "vocabulary" else None

    def record(self, seen: Seen, shift: bool) -> dict[str, Any]:
        """What a bundle says of the prefix of one layer, as plain values.

        Args:
            seen: the attention layer.
            shift: whether positions start after the prefix.
        """
        return {
            "prefix_token_num": self.prefix_token_num,
            "projection": self.projection,
            "mid_dim": self.mid_dim,
            "dropout_rate": self.dropout_rate,
            "heads": [seen.heads, seen.width, seen.query_heads],
            "shift": shift,
        }

    def counting(self, paths: Iterable[str]) -> list[str] | None:
        """The modules whose positions start after the prefix; None where the wing has to know.

        Args:
            paths: of all modules of the model.

        Raises:
            PatternError: an entry of `positions` matches none of them.
        """
        if not self.positions:
            return self.positions
        paths = [p for p in paths if p]
        found = match(paths, self.positions)
        demand(found, paths, "positions")
        return list(found.names)


def checked(
    prefix_token_num: Any = None,
    projection: Any = False,
    mid_dim: Any = 512,
    dropout_rate: Any = 0.0,
    text_ids: Any = None,
    inputs: Any = None,
    sizes: Any = None,
    positions: Any = None,
    init: Any = None,
    text: Any = None,
    tokenizer: Any = None,
    seed: Any = 0,
) -> PrefixOptions:
    """The options of a prefix, checked.

    Args:
        prefix_token_num: tokens of the prefix; 8 unless a text says otherwise.
        projection: whether a small network (PrefixLayer) makes the prefix, as the paper trains it.
        mid_dim: width of the network's middle.
        dropout_rate: the network's dropout.
        text_ids: token ids; the prefix starts as the keys and values that this text has in the model.
        inputs: one batch to run the model on.
        sizes: path -> (heads of the keys, width of a head, heads of the queries), where no run is needed to know them.
        positions: globs over the modules that are given position numbers (an embedding of positions, a rotary
            embedding): they get them increased by the prefix's length. Empty: none. None: Hugging Face models count
            from behind the prefix, all others as they did.
        init: "random" (normal numbers; the default) or "vocabulary" (keys and values of drawn tokens).
        text, tokenizer: the text itself, and what turns it into tokens, instead of `text_ids`; see `opening.ids_of`.
        seed: of the draw.

    Raises:
        ArgumentTypeError, ArgumentError: an option of the wrong type or value.
        UnsupportedError: a start from tokens and projection together.

    Example:
        >>> checked(prefix_token_num=4).prefix_token_num
        4
    """
    check.boolean(projection, "projection")
    rate(dropout_rate, "dropout_rate")
    size(mid_dim, "mid_dim")
    check.integer(seed, "seed", minimum=0)
    text_ids = opening.checked(init, text, text_ids, tokenizer)
    if projection and (text_ids is not None or init == "vocabulary"):
        raise UnsupportedError("a start from tokens and projection exclude each other: a network has no such start.")
    if text_ids is not None:
        if prefix_token_num not in (None, len(text_ids)):
            check.wrong_value("prefix_token_num", f"the text's {len(text_ids)} tokens", prefix_token_num)
        prefix_token_num = len(text_ids)
    tokens = size(8 if prefix_token_num is None else prefix_token_num, "prefix_token_num")
    if sizes is not None:
        check.instance(sizes, Mapping, "sizes", "a mapping of path to (heads, width, query heads)")
    if positions is not None:
        positions = list(check.strings(positions, "positions")) if positions != [] else []
    return PrefixOptions(
        tokens, projection, mid_dim, dropout_rate, text_ids, inputs, sizes, positions, init or "random", seed
    )


def given_sizes(plan: PrefixOptions, paths: Mapping[str, Any]) -> dict[str, Seen]:
    """The layers as `sizes` describes them; ArgumentError where the model has no attention at a path.

    Args:
        plan: the options.
        paths: the model's attention layers by path.
    """
    for path in plan.sizes or ():
        if path not in paths:
            raise ArgumentError(f"the model has no attention layer {path!r}{check.near(path, list(paths))}")
    return {path: Seen(*(size(n, "sizes") for n in facts)) for path, facts in (plan.sizes or {}).items()}


def chosen(seen: Mapping[str, Seen], targets: Any, strict: bool) -> dict[str, Seen]:
    """The attention layers that `targets` means: globs over their paths, None or "all-linear" for all."""
    if targets is None or targets == "all-linear":
        return dict(seen)
    found = match(seen, check.strings([targets] if isinstance(targets, str) else targets, "targets"))
    if strict:
        demand(found, seen, "targets")
    if not found.names:
        raise PatternError(f"targets match none of the attention layers: {', '.join(seen)}")
    return {path: seen[path] for path in found.names}


def refuse_taken(paths: Sequence[str]) -> None:
    """Refuse layers that carry a delta already."""
    if paths:
        raise UnsupportedError(f"{paths[0]} carries a delta already.")


def refuse_replaced(paths: Sequence[str], method: str) -> None:
    """Refuse modules whose method was replaced on the object: the class's own, which a prefix extends, may not run."""
    if paths:
        raise UnsupportedError(
            f"the {method} of {paths[0] or 'the model'} was replaced on the object, so that what is put on its class "
            f"may not run; put the delta on before, or take that {method} off."
        )


def nothing_found(wanted: str, unfit: Mapping[str, str]) -> str:
    """What to say where no attention was found that a prefix can extend, and why each candidate is none."""
    lines = "".join(f" {path or 'the model'}: {why}." for path, why in list(unfit.items())[:5])
    return (
        f"no attention was found that a prefix can extend: it takes {wanted}.{lines} "
        f"Write it that way, or build PrefixLayer into the model by hand (docs/delta.md)."
    )


def torch_name(name: str) -> str:
    """A parameter's name below a delta as torch spells it: the table of an embedding is its weight.

    Example:
        >>> torch_name("wte.embedding_table")
        'wte.weight'
    """
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}weight" if last == "embedding_table" else name
