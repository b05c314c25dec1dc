"""Which parameters train: the rules over names that both wings apply, and the record of what was done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slimkit.core import check
from slimkit.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileFormatError,
    LinkPathError,
    ModelConfigFreezeInfoError,
    ReadYamlFileError,
)
from slimkit.core.files import readable_file
from slimkit.core.match import Matches, demand, match
from slimkit.core.yamltext import parse_yaml

# The last part of the name decides: "bias", "in_proj_bias", "bias_ih_l0", and "beta", a norm's bias in MindSpore.
_BIASES = r"re:(?:|.*\.)(?:bias|beta|[^.]*_bias|bias_[^.]*)"

# mode -> the patterns of what that way of tuning trains
MODES: dict[str, tuple[str, ...]] = {
    "lora": ("*mindpet_delta_lora*",),
    "prefixtuning": ("*mindpet_delta_prefixtuning*",),
    "prefix": ("*mindpet_delta_prefixtuning*",),
    "adapter": ("*mindpet_delta_adapter*",),
    "low_rank_adapter": ("*mindpet_delta_low_rank_adapter*",),
    "bitfit": (_BIASES,),
    "prompttuning": ("*mindpet_delta_prompttuning*",),
    "prompt": ("*mindpet_delta_prompttuning*",),
    "ptuning2": ("*mindpet_delta_ptuning2*",),
}

_CONFIG_LIMIT_BYTES = 1 << 20


class _WrongKindError(ArgumentTypeError, ArgumentError):
    """The documents promise a ValueError where Python's habit is a TypeError: this is both."""


class Entry(NamedTuple):
    """One parameter as the rules see it.

    Args:
        names: its names, the first being the one reports use; a shared parameter has several.
        size: its number of values.
        trains: whether it trains now.
        may_train: False for what no optimizer may touch: integers, the running statistics of a norm.
    """

    names: tuple[str, ...]
    size: int
    trains: bool
    may_train: bool = True


@dataclass(frozen=True)
class FreezeReport:
    """What a freezing call did, and what trains now; printing it gives a summary.

    Args:
        frozen: parameters set not to train.
        trained: parameters set to train.
        left_alone: parameters that both lists matched, as they were before.
        cannot_train: parameters asked to train that cannot (integers, running statistics), as they were before.
        unmatched: patterns that matched nothing; empty unless `strict` was False.
        trainable: every parameter that trains now -> its number of values.
        total: number of values in all parameters that could train or do.
    """

    frozen: tuple[str, ...]
    trained: tuple[str, ...]
    left_alone: tuple[str, ...]
    cannot_train: tuple[str, ...]
    unmatched: tuple[str, ...]
    trainable: Mapping[str, int] = field(hash=False)
    total: int

    @property
    def trainable_count(self) -> int:
        """Number of values that train."""
        return sum(self.trainable.values())

    @property
    def trainable_ratio(self) -> float:
        """Share of all values that train, 0..1."""
        return self.trainable_count / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.trainable_count:,} of {self.total:,} parameters train "
            f"({self.trainable_ratio:.4%}), in {len(self.trainable)} tensors"
        ]
        groups: dict[str, list[int]] = {}
        for name, size in self.trainable.items():
            # Blocks of a stack differ in a number only, so their rows fold into one.
            folded = ".".join("*" if part.isdigit() else part for part in name.split("."))
            groups.setdefault(folded, []).append(size)
        lines += [f"  {len(sizes):4d} x {name}  {sum(sizes):,}" for name, sizes in groups.items()]
        for title, names in (("left alone", self.left_alone), ("cannot train", self.cannot_train)):
            if names:
                lines.append(f"  {title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        if self.unmatched:
            lines.append(f"  matched nothing: {', '.join(self.unmatched)}")
        return "\n".join(lines)


def check_lists(include: Any, exclude: Any) -> tuple[list[str], list[str]]:
    """The two lists of patterns, checked: not both missing, each a non-empty list of str."""
    if include is None and exclude is None:
        raise ArgumentError("include and exclude must not both be None: there would be nothing to do.")
    return (
        check.strings(include, "include") if include is not None else [],
        check.strings(exclude, "exclude") if exclude is not None else [],
    )


def check_mode(mode: Any) -> str:
    """The freezing mode in lower case; anything unknown is refused with the nearest known one."""
    if not isinstance(mode, str):
        raise _WrongKindError(f"mode must be one of {', '.join(MODES)}. Received: {mode!r} ({type(mode).__name__})")
    return str(check.choice(mode.strip().lower(), MODES, "mode"))


def decide_modules(
    entries: Sequence[Entry], include: Any, exclude: Any, *, strict: bool = True
) -> tuple[list[bool], FreezeReport]:
    """Decide for each parameter whether it trains, by the two lists.

    Args:
        entries: the model's parameters.
        include: patterns of what is frozen, or None.
        exclude: patterns of what trains, or None; what both lists match is left alone.
        strict: whether a pattern that matches nothing is an error.

    Returns:
        One flag per parameter, and the report.

    Raises:
        ArgumentError: both lists are None.
        ArgumentTypeError: a list is not a non-empty list of str.
        PatternError: a pattern matches nothing, or is not safe.

    Example:
        >>> entries = [Entry(("a.weight",), 4, True), Entry(("a.bias",), 2, True)]
        >>> decide_modules(entries, ["a"], ["*.bias"])[0]
        [False, True]
    """
    patterns = check_lists(include, exclude)
    return _decide(entries, [entry.trains for entry in entries], *patterns, strict=strict)


def decide_delta(
    entries: Sequence[Entry], mode: Any, include: Any = None, exclude: Any = None, *, strict: bool = True
) -> tuple[list[bool], FreezeReport]:
    """Decide for each parameter whether it trains: first by the way of tuning, then by the user's two lists.

    Args:
        entries: the model's parameters.
        mode: a key of MODES, in any letter case.
        include: further patterns of what is frozen, or None.
        exclude: further patterns of what trains, or None.
        strict: whether a mode or a pattern that matches nothing is an error.

    Returns:
        One flag per parameter, and the report.

    Raises:
        ArgumentError: `mode` is unknown.
        ArgumentTypeError: a list is not a non-empty list of str.
        PatternError: the model has nothing that `mode` trains, or a pattern matches nothing.

    Example:
        >>> decide_delta([Entry(("weight",), 4, True), Entry(("bias",), 2, True)], "BitFit")[0]
        [False, True]
    """
    word = check_mode(mode)
    lists = check_lists(include, exclude) if include is not None or exclude is not None else None
    preset = _match_entries(entries, MODES[word])
    if strict and not preset.names:
        raise ArgumentError(
            f"mode {word!r} found nothing to train among {len(entries)} parameters: it trains names like "
            f"{MODES[word][0].removeprefix('re:')!r}. Add the delta first (apply_delta), or pass strict=False."
        )
    chosen = set(preset.names)
    flags = [e.names[0] in chosen if e.may_train else e.trains for e in entries]
    if lists is None:
        return flags, _report(entries, flags, (), (), preset.unmatched)
    flags, report = _decide(entries, flags, *lists, strict=strict)
    return flags, _report(
        entries, flags, report.left_alone, report.cannot_train, (*preset.unmatched, *report.unmatched)
    )


def report_of(entries: Sequence[Entry]) -> FreezeReport:
    """The report of a model as it is, nothing changed.

    Example:
        >>> str(report_of([Entry(("w",), 3, True), Entry(("b",), 1, False)])).splitlines()[0]
        '3 of 4 parameters train (75.0000%), in 1 tensors'
    """
    return _report(entries, [entry.trains for entry in entries], (), (), ())


def _decide(
    entries: Sequence[Entry], before: Sequence[bool], include: list[str], exclude: list[str], *, strict: bool
) -> tuple[list[bool], FreezeReport]:
    frozen, trained = _match_entries(entries, include), _match_entries(entries, exclude)
    if strict and (frozen.unmatched or trained.unmatched):
        every = [name for entry in entries for name in entry.names]
        demand(frozen, every, "include")
        demand(trained, every, "exclude")
    freeze, train = set(frozen.names), set(trained.names)
    flags, left, cannot = [], [], []
    for entry, now in zip(entries, before):
        name = entry.names[0]
        if name in freeze and name in train:
            left.append(name)
        elif name in freeze:
            now = False
        elif name in train and entry.may_train:
            now = True
        elif name in train:
            cannot.append(name)
        flags.append(now)
    return flags, _report(entries, flags, left, cannot, (*frozen.unmatched, *trained.unmatched))


def _match_entries(entries: Sequence[Entry], patterns: Sequence[str]) -> Matches:
    """Match every name of every parameter; what was found comes back under the first name of each."""
    every = [name for entry in entries for name in entry.names]
    found = match(every, patterns, whole_modules=True)
    if len(every) == len(entries):
        return found
    hit = set(found.names)
    names = tuple(entry.names[0] for entry in entries if not hit.isdisjoint(entry.names))
    return Matches(names=names, by_pattern=found.by_pattern, unmatched=found.unmatched)


def _report(
    entries: Sequence[Entry],
    flags: Sequence[bool],
    left: Sequence[str],
    cannot: Sequence[str],
    unmatched: Sequence[str],
) -> FreezeReport:
    changed = [(entry.names[0], now) for entry, now in zip(entries, flags) if now != entry.trains]
    return FreezeReport(
        frozen=tuple(name for name, now in changed if not now),
        trained=tuple(name for name, now in changed if now),
        left_alone=tuple(left),
        cannot_train=tuple(cannot),
        unmatched=tuple(unmatched),
        trainable={entry.names[0]: entry.size for entry, now in zip(entries, flags) if now},
        total=sum(entry.size for entry, now in zip(entries, flags) if now or entry.may_train),
    )


def read_config(config_path: Any) -> tuple[list[str] | None, list[str] | None]:
    """Read the `freeze` section of a YAML file.

    Args:
        config_path: the file; a regular file, no symbolic link, at most 1 MiB.

    Returns:
        The include and the exclude list, None where the file has none.

    Raises:
        ArgumentTypeError: not a str or path, or a list in the file is not a non-empty list of str.
        ArgumentError: an empty path, or both lists are empty.
        ReadYamlFileError: the file is missing, a link, too large or not YAML.
        ModelConfigFreezeInfoError: the file is empty, or has no usable `freeze` section.
    """
    check.instance(config_path, (str, os.PathLike), "config_path", "a str")
    if not os.fspath(config_path):
        check.wrong_value("config_path", "a non-empty str", config_path)
    try:
        file = readable_file(config_path, "config_path")
        if file.stat().st_size > _CONFIG_LIMIT_BYTES:
            raise FileFormatError(f"it is larger than {_CONFIG_LIMIT_BYTES} bytes, which no such file should be")
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (FileFormatError, LinkPathError, OSError, UnicodeDecodeError) as error:
        raise ReadYamlFileError(f"config_path could not be read as YAML: {error}") from error
    # Messages name types, never values: a YAML file can hold aliases whose repr would not fit into memory.
    if not isinstance(content, dict) or "freeze" not in content:
        raise ModelConfigFreezeInfoError(f"{file} must be a mapping with the key 'freeze'.")
    section = content["freeze"]
    if not isinstance(section, dict):
        raise ModelConfigFreezeInfoError(f"'freeze' in {file} must be a mapping. Received: {type(section).__name__}")
    unknown = [str(key)[:40] for key in section if key not in ("include", "exclude")]
    if unknown or not section:
        raise ModelConfigFreezeInfoError(
            f"'freeze' in {file} must hold 'include', 'exclude' or both, and nothing else. "
            f"Received: {', '.join(unknown) or 'nothing'}"
        )
    lists = [_config_list(section.get(key), key) for key in ("include", "exclude")]
    if not any(lists):
        raise _WrongKindError(f"include and exclude in {file} must not both be empty.")
    if [] in lists:
        raise ArgumentTypeError(f"include and exclude in {file} must be non-empty lists of str where they are given.")
    return lists[0], lists[1]


def _config_list(value: Any, key: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        kinds = sorted({type(item).__name__ for item in value}) if isinstance(value, list) else [type(value).__name__]
        raise ArgumentTypeError(f"{key} must be a non-empty list of str. Received: {', '.join(kinds)}")
    return value
