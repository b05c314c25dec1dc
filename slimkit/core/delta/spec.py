"""What both wings know about deltas: the argument rules of each kind, which layers are targets, and the records."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimkit.core import check
from slimkit.core.delta.layers import check_alpha, check_dropout
from slimkit.core.errors import ArgumentError, PatternError, UnsupportedError
from slimkit.core.match import match
from slimkit.core.showing import Shown, some

# What a compressed delta may hold beside its low rank; rest.py says what each consists of.
RESTS = ("", "signs")

PREFIX = "mindpet_delta_"
DEFAULT_NAME = "default"

# delta kind -> the kinds of layer it can be put on; prefix and prompt act on a whole model instead
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("linear", "conv1d", "embedding", "conv2d", "multihead", "experts"),
    "adapter": ("linear",),
    "low_rank_adapter": ("linear",),
    "ia3": ("linear", "conv1d", "conv2d"),
    "miss": ("linear",),
    "shira": ("linear",),
    "prefix": (),
    "prompt": (),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": (
        "rank", "alpha", "dropout", "rslora", "dora", "init", "keep_zeros", "ranks", "alphas", "calibration", "loss",
        "base_dtype",
    ),
    "adapter": ("bottleneck_size", "non_linearity"),
    "low_rank_adapter": ("reduction_factor", "low_rank_size", "low_rank_w_init", "non_linearity"),
    "ia3": ("feedforward",),
    "miss": ("rank", "repeat", "dropout"),
    "shira": ("rank", "support", "seed"),
    "prefix": (
        "prefix_token_num", "init", "text", "text_ids", "tokenizer", "seed", "projection", "mid_dim", "dropout_rate",
        "inputs", "sizes", "positions",
    ),
    "prompt": ("num_virtual_tokens", "init", "text", "text_ids", "tokenizer", "seed"),
}  # fmt: skip
MERGING = ("lora", "ia3", "miss", "shira")  # kinds that can be merged into weights
_HEAD = "it is the output embedding; name it to adapt it"
_RARE = ("parameters", "bias", "rest", "base_dtype")  # fields of LoraSpec that only some layers have
HELD = ("multihead", "experts")  # layers that read their parameters themselves
BASE_DTYPES = ("int8", "bfloat16")
LORA_INITS = ("kaiming", "gaussian", "pissa", "gradient", "activations")


def delta_name(value: Any) -> str:
    """The name of one delta among several: letters, digits and underscores, so that it can end a parameter's name."""
    check.text(value, "name")
    if not value.isidentifier():
        check.wrong_value("name", "letters, digits and underscores, not starting with a digit", value)
    return str(value)


def key(kind: str, part: str, name: str = DEFAULT_NAME) -> str:
    """The attribute that holds one part of a named delta.

    Example:
        >>> key("lora", "a"), key("lora", "a", "german")
        ('mindpet_delta_lora_a', 'mindpet_delta_lora_a_german')
    """
    return f"{PREFIX}{kind}_{part}" + ("" if name == DEFAULT_NAME else f"_{name}")


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA on one layer: weight + scaling * b @ a.

    Args:
        rank: rows of a, columns of b.
        alpha: numerator of the scale; twice the rank is usual.
        dropout: share of the input dropped on the way into a, in training.
        rslora: divide alpha by sqrt(rank) instead of rank, so that high ranks learn as fast (Kalajdzievski 2023).
        dora: learn the length of each output's weight apart from its direction (Liu et al. 2024).
        init: "kaiming" (a Kaiming-uniform, b zero), "gaussian" (a normal with deviation 1/rank, b zero), "pissa" (a and
            b from the largest singular vectors, which are taken out of the base: Meng et al. 2024), or one that is read
            from data (`starts`): "gradient", "activations" (b zero).
        keep_zeros: the delta is zero wherever the base weight is, so that a sparse base stays sparse when merged.
        parameters: of a module that reads them itself (multi-head attention, experts): those the LoRA is on.
        bias: b has a bias of its own, which the scale multiplies as well (PEFT's lora_bias).
        rest: what a compressed delta holds beside the low rank: "signs" (of every entry, a scale a row) or nothing.
        base_dtype: what the layer's own weight is held in: "int8" with a scale for each output, "bfloat16", or "" for
            what it is.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    keep_zeros: bool = False
    parameters: tuple[str, ...] = ()
    bias: bool = False
    rest: str = ""
    base_dtype: str = ""

    def __post_init__(self) -> None:
        check.positive(self.rank, "rank")
        check_alpha(self.alpha, "alpha")
        check_dropout(self.dropout, "dropout")
        for name in ("rslora", "dora", "keep_zeros", "bias"):
            check.boolean(getattr(self, name), name)
        check.choice(self.init, LORA_INITS, "init")
        check.choice(self.rest, RESTS, "rest")
        check.choice(self.base_dtype, ("", *BASE_DTYPES), "base_dtype")
        check.strings(self.parameters, "parameters") if self.parameters else None

    @property
    def scaling(self) -> float:
        """The factor in front of b @ a."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; what only some layers have is left out elsewhere."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {k: v for k, v in plain.items() if k not in _RARE or v}


@dataclass(frozen=True)
class Site:
    """One module as the choice of targets sees it.

    Args:
        kind: "linear", "conv1d" (Hugging Face, weight stored transposed), "embedding", "conv2d", or "" for any other.
        shape: (outputs, inputs) of the layer; empty for any other.
        type_name: the module's class, for messages.
        holds: whether it holds parameters itself, so that leaving it out is worth a word.
        reason: why a layer of a good kind, or of a class derived from one, cannot take a delta, or "".
        zeros: whether it was made sparse, and that was recorded.
        head: whether it is the output embedding, which "all-linear" leaves alone.
        parameters: those of a module that reads them itself and that LoRA goes on.
    """

    kind: str
    shape: tuple[int, ...] = ()
    type_name: str = ""
    holds: bool = False
    reason: str = ""
    zeros: bool = False
    head: bool = False
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class DeltaReport(Shown):
    """What a call did to a model's deltas; printing it gives a summary.

    Args:
        kind: the kind of delta.
        name: its name among several.
        layers: path of each layer touched -> what was put there, as plain values.
        skipped: layers that a pattern matched and that cannot take this kind -> why (only where strict is False), and
            linear layers that "all-linear" left out.
        unmatched: patterns that matched nothing; empty unless strict was False.
        trainable: the share of parameters that train now, as text.
        notes: anything else worth a line.
    """

    kind: str
    name: str
    layers: Mapping[str, Mapping[str, Any]] = field(hash=False)
    skipped: Mapping[str, str] = field(default_factory=dict, hash=False)
    unmatched: tuple[str, ...] = ()
    trainable: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.name!r} on {len(self.layers)} layers"]
        lines += [self.trainable] if self.trainable else []
        lines += some([f"  skipped {path}: {why}" for path, why in self.skipped.items()], "report.skipped")
        lines += some([f"  matched nothing: {pattern}" for pattern in self.unmatched], "report.unmatched")
        lines += some([f"  {note}" for note in self.notes], "report.notes")
        return "\n".join(lines)


def choose(
    sites: Mapping[str, Site],
    kind: str,
    targets: Any,
    exclude: Any = None,
    *,
    strict: bool = True,
) -> tuple[list[str], dict[str, str], tuple[str, ...]]:
    """Choose the layers that a delta goes on.

    Args:
        sites: every module path of the model.
        kind: a key of KINDS that goes on layers.
        targets: "all-linear", or globs over whole module paths; a plain path also means every layer below it.
        exclude: globs of layers left alone, or None.
        strict: whether an unmatched pattern or an unfit layer is an error.

    Returns:
        The paths in model order, the layers left out with the reason, and the unmatched patterns.

    Raises:
        PatternError: nothing matched, or (strict) a pattern matched nothing.
        UnsupportedError: (strict) a pattern matched a layer that this kind cannot go on.

    Example:
        >>> choose({"q": Site("linear", (2, 2)), "n": Site("", holds=True)}, "lora", "all-linear")[0]
        ['q']
    """
    fit = KINDS[kind]
    passed: dict[str, str] = {}
    if targets == "all-linear":
        linear = {p: s for p, s in sites.items() if s.kind in ("linear", "conv1d")}
        # A head is tied or huge more often than not: adapting it is asked for by name.
        passed = {p: s.reason or _HEAD for p, s in linear.items() if s.reason or s.head}
        passed |= {p: s.reason for p, s in sites.items() if not s.kind and s.reason}
        passed |= {p: f"a {s.type_name} cannot take {kind}" for p, s in linear.items() if s.kind not in fit}
        paths = [p for p in linear if p not in passed]
        if not paths:
            why = "".join(f" {p}: {reason};" for p, reason in list(passed.items())[:3])
            raise PatternError(f"targets='all-linear' found no linear layer among {len(sites)} modules.{why}")
        unmatched: tuple[str, ...] = ()
        skipped: dict[str, str] = {}
    else:
        patterns = check.strings([targets] if isinstance(targets, str) else targets, "targets")
        found = match(sites, patterns, whole_modules=True)
        unmatched = found.unmatched
        if unmatched and (strict or not found.names):
            raise PatternError(f"targets must match modules. Matched nothing: {_hint(unmatched, sites)}")
        paths, skipped = [], {}
        for path in found.names:
            site = sites[path]
            if site.kind in fit and not site.reason:
                paths.append(path)
            elif site.kind or site.holds:
                skipped[path] = site.reason or f"a {site.type_name} cannot take {kind}"
        # The output projection of a multi-head attention goes with it.
        skipped = {p: why for p, why in skipped.items() if p.rpartition(".")[0] not in _whole(paths, sites)}
    if exclude is not None:
        left_out = match([*paths, *skipped, *passed], check.strings(exclude, "exclude"), whole_modules=True)
        if strict and left_out.unmatched:
            wrong = check.nears(left_out.unmatched, [*paths, *skipped])
            raise PatternError(f"exclude must match some of the targets. Matched none: {wrong}")
        paths = [p for p in paths if p not in left_out.names]
        passed = {p: why for p, why in passed.items() if p not in left_out.names}
        skipped = {p: why for p, why in skipped.items() if p not in left_out.names}
        unmatched = (*unmatched, *left_out.unmatched)
    if strict and skipped:
        shown = "; ".join(f"{p}: {why}" for p, why in list(skipped.items())[:5])
        raise UnsupportedError(
            f"targets match layers that {kind} cannot go on: {shown}{' ...' if len(skipped) > 5 else ''}. "
            f"Narrow the patterns, name them in exclude, or pass strict=False to skip them."
        )
    if not paths:
        raise PatternError(f"targets leave no layer that {kind} can go on.")
    return paths, skipped | passed, unmatched


def _whole(paths: Collection[str], sites: Mapping[str, Site]) -> set[str]:
    return {p for p in paths if sites[p].kind == "multihead"}


def _hint(patterns: Sequence[str], sites: Collection[str]) -> str:
    """The patterns, and what may have been meant: the end of a path needs a star before it."""
    if len(patterns) == 1 and not {"*", ":"} & set(patterns[0]):
        ends = [s for s in sites if s.endswith("." + patterns[0])]
        if ends:
            return f"{patterns[0]!r}. Did you mean '*.{patterns[0]}' ({len(ends)} modules)?"
    return check.nears(patterns, list(sites))


def lora_specs(
    sites: Mapping[str, Site],
    paths: Sequence[str],
    *,
    rank: Any = 8,
    alpha: Any = None,
    dropout: Any = 0.0,
    rslora: Any = False,
    dora: Any = False,
    init: Any = "kaiming",
    keep_zeros: Any = None,
    ranks: Any = None,
    alphas: Any = None,
    base_dtype: Any = None,
) -> dict[str, LoraSpec]:
    """The LoRA of each chosen layer, by the options of apply_delta.

    Args:
        sites: every module path of the model.
        paths: the chosen ones.
        rank: rank of every layer that `ranks` does not name.
        alpha: likewise for `alphas`; None means twice the layer's rank.
        dropout, rslora, dora, init, base_dtype: see LoraSpec.
        keep_zeros: see LoraSpec; None means True on sparse layers only.
        ranks: {glob over paths: rank}; the last glob that matches wins.
        alphas: {glob over paths: alpha}.

    Returns:
        path -> LoraSpec.

    Raises:
        ArgumentTypeError, ArgumentError: an option is of the wrong type or value, or a rank exceeds a layer's size.
        PatternError: a glob of `ranks` or `alphas` matches no chosen layer.

    Example:
        >>> lora_specs({"q": Site("linear", (4, 4))}, ["q"], rank=2)["q"].scaling
        2.0
    """
    check.positive(rank, "rank")
    if isinstance(dropout, int) and not isinstance(dropout, bool):
        dropout = float(dropout)
    if keep_zeros is not None:
        check.boolean(keep_zeros, "keep_zeros")
    rank_of = _by_pattern(ranks, paths, "ranks")
    alpha_of = _by_pattern(alphas, paths, "alphas")
    if base_dtype is not None:
        check.choice(base_dtype, BASE_DTYPES, "base_dtype")
    base = LoraSpec(dropout=dropout, rslora=rslora, dora=dora, init=init, base_dtype=base_dtype or "")
    specs = {}
    for path in paths:
        site, layer_rank = sites[path], rank_of.get(path, rank)
        check.positive(layer_rank, f"rank of {path}")
        layer_alpha = alpha_of.get(path, 2 * layer_rank if alpha is None else alpha)
        if layer_rank > min(site.shape):
            raise ArgumentError(
                f"rank of {path} must be at most {min(site.shape)}, the layer's smaller side. Received: {layer_rank}. "
                f"Give the layer its own in ranks={{{path!r}: ...}}, or leave it out by exclude=[{path!r}]."
            )
        check_alpha(layer_alpha, "alpha")
        zeros = site.zeros and site.kind == "linear" if keep_zeros is None else keep_zeros
        if zeros and site.kind != "linear":
            raise UnsupportedError(f"keep_zeros works on linear layers; {path} is a {site.type_name}.")
        if zeros and dora:
            raise UnsupportedError(f"dora and keep_zeros exclude each other; {path} has a sparse weight.")
        specs[path] = replace(
            base,
            rank=layer_rank,
            alpha=float(layer_alpha),
            keep_zeros=bool(zeros),
            parameters=site.parameters,
        )
        if site.kind in HELD and (dora or init == "pissa" or specs[path].dropout):
            raise UnsupportedError(
                f"dora, pissa and dropout are not offered on {path}, a {site.type_name}: it reads its weights itself."
            )
        if site.kind == "embedding" and (init == "pissa" or specs[path].dropout):
            raise UnsupportedError(f"pissa and dropout are not offered for embeddings: {path}.")
        if site.kind == "conv2d" and init == "pissa":
            raise UnsupportedError(f"pissa is not offered for convolutions: {path}.")
    return specs


def _by_pattern(values: Any, paths: Sequence[str], name: str) -> dict[str, Any]:
    if values is None:
        return {}
    check.instance(values, Mapping, name, "a mapping of glob to number")
    found = match(paths, list(values), whole_modules=True)
    if found.unmatched:
        raise PatternError(f"{name} must match chosen layers. Matched none: {check.nears(found.unmatched, paths)}")
    return {path: value for pattern, value in values.items() for path in found.by_pattern[pattern]}


def weights_of(names: Any, known: Sequence[str]) -> dict[str, float]:
    """Which deltas are active, and with which weight: a name, a list of names, or {name: weight}.

    Example:
        >>> weights_of("a", ["a", "b"]), weights_of({"a": 0.5}, ["a"])
        ({'a': 1.0}, {'a': 0.5})
    """
    if isinstance(names, str):
        names = [names]
    pairs = dict(names) if isinstance(names, Mapping) else dict.fromkeys(check.strings(names, "names"), 1.0)
    if not pairs:
        check.wrong_value("names", "at least one name", names)
    for name, weight in pairs.items():
        check.choice(name, known, "delta")
        check.number(weight, f"weight of {name}")
    return {name: float(weight) for name, weight in pairs.items()}
