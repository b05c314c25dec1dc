"""Which parameters train: the rules over names that both wings apply, and the record of what was done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from slimkit.core.match import demand, match, matcher
from slimkit.core.showing import Shown, some
from slimkit.core.yamltext import parse_yaml

# A bias by the last part of its name: "bias", "in_proj_bias", "bias_ih_l0", and "beta", a norm's bias in MindSpore.
_BIAS = "re:bias|beta|[^.]*_bias|bias_[^.]*"

# mode -> the pattern of what that way of tuning trains; bitfit's is held against the last part of a name
MODES: dict[str, str] = {
    "lora": "*mindpet_delta_lora*",
    "prefixtuning": "*mindpet_delta_prefixtuning*",
    "prefix": "*mindpet_delta_prefixtuning*",
    "adapter": "*mindpet_delta_adapter*",
    "low_rank_adapter": "*mindpet_delta_low_rank_adapter*",
    "ia3": "*mindpet_delta_ia3*",
    "miss": "*mindpet_delta_miss*",
    "shira": "*mindpet_delta_shira*",
    "bitfit": _BIAS,
    "prompttuning": "*mindpet_delta_prompttuning*",
    "prompt": "*mindpet_delta_prompttuning*",
    "ptuning2": "*mindpet_delta_ptuning2*",
}

_CONFIG_LIMIT_BYTES = 1 << 20


class _WrongKindError(ArgumentTypeError, ArgumentError):
    """The documents promise a ValueError where Python's habit is a TypeError: this is both."""


# What a framework says of one parameter: its number of values, whether it trains now, and whether it may: integers and
# the running statistics of a norm never do. Plain tuples, since ten thousand records take longer to make than all the
# rules.
Reading = tuple[int, bool, bool]


@dataclass
class Parameters:
    """A model's parameters under the paths they are held at, each parameter once.

    Args:
        held: the framework's own parameters.
        names: the first path of each, which reports use.
        further: place -> the other names it answers to; a shared parameter has several.
        read: reads parameters, given with their names, one after the other, each when it is asked for.
        own_name: reads the name that a parameter carries itself; None where parameters carry none.
    """

    held: list[Any]
    names: list[str]
    further: dict[int, list[str]]
    read: Callable[[Sequence[Any], Sequence[str]], Iterable[Reading]]
    own_name: Callable[[Any], str] | None = None

    def readings(self) -> Iterator[Reading]:
        """What the framework says of each parameter, in order, read when it is asked for."""
        return iter(self.read(self.held, self.names))

    def trains(self) -> dict[str, bool]:
        """Which parameters train now, by their names."""
        return {name: trains for name, (_, trains, _) in zip(self.names, self.readings())}

    def every_name(self) -> list[str]:
        """All names of all parameters."""
        return [*self.names, *(name for more in self.further.values() for name in more)]

    def add_own_names(self) -> None:
        """Let every parameter also answer to the name it carries itself, where that is none of its paths."""
        if self.own_name is None:
            return
        for place, parameter in enumerate(self.held):
            own = self.own_name(parameter)
            if not self.answers_to(place, own):
                self.further.setdefault(place, []).append(own)

    def answers_to(self, place: int, name: str) -> bool:
        """Whether the name is already among those of the parameter at this place."""
        return name == self.names[place] or name in self.further.get(place, ())


@dataclass(frozen=True, repr=False)
class FreezeReport(Shown):
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
        rows = [f"  {len(sizes):4d} x {name}  {sum(sizes):,}" for name, sizes in groups.items()]
        lines += some(rows, "report.trainable")
        for title, names in (("left alone", self.left_alone), ("cannot train", self.cannot_train)):
            if names:
                lines.append(f"  {title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        lines += some([f"  matched nothing: {pattern}" for pattern in self.unmatched], "report.unmatched")
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


def train_by_lists(found: Parameters, include: Any, exclude: Any, *, strict: bool = True) -> FreezeReport:
    """Say by two lists which parameters train, in place.

    Args:
        found: the model's parameters.
        include: patterns of what is frozen, or None.
        exclude: patterns of what trains, or None; what both lists match is left alone.
        strict: whether a pattern that matches nothing is an error.

    Returns:
        What was done, and what trains now.

    Raises:
        ArgumentError: both lists are None.
        ArgumentTypeError: a list is not a non-empty list of str.
        PatternError: a pattern matches nothing, or is not safe.
    """
    lists = check_lists(include, exclude)
    return _settle(found, lambda: _choose(found, [None] * len(found.names), *lists, strict=strict))


def train_by_mode(
    found: Parameters, mode: Any, include: Any = None, exclude: Any = None, *, strict: bool = True
) -> FreezeReport:
    """Train only what a way of tuning trains, then go by the user's two lists, in place.

    Args:
        found: the model's parameters.
        mode: a key of MODES, in any letter case.
        include: further patterns of what is frozen, or None.
        exclude: further patterns of what trains, or None.
        strict: whether a mode or a pattern that matches nothing is an error.

    Returns:
        What was done, and what trains now.

    Raises:
        ArgumentError: `mode` is unknown, or the model has nothing that it trains.
        ArgumentTypeError: a list is not a non-empty list of str.
        PatternError: a pattern matches nothing, or is not safe.
    """
    word = check_mode(mode)
    lists = check_lists(include, exclude) if include is not None or exclude is not None else ([], [])

    def choose() -> _Choice:
        chosen = _of_mode(found, word)
        if not chosen:
            found.add_own_names()
            chosen = _of_mode(found, word)
        if strict and not chosen:
            raise ArgumentError(
                f"mode {word!r} found nothing to train among {len(found.names)} parameters: it trains names like "
                f"{MODES[word].removeprefix('re:')!r}. Add the delta first (apply_delta), or pass strict=False."
            )
        choice = _choose(found, [name in chosen for name in found.names], *lists, strict=strict)
        settled = chosen if choice.settled is None else chosen & choice.settled
        return replace(choice, settled=settled, unmatched=((MODES[word],) if not chosen else ()) + choice.unmatched)

    return _settle(found, choose)


def report_of(found: Parameters) -> FreezeReport:
    """The report of a model as it is, nothing changed."""
    return _settle(found, lambda: _Choice([None] * len(found.names), set(), set(), set(), (), None))


def matched(found: Parameters, patterns: Any, argument: str) -> set[str]:
    """The parameters that patterns match, by their first names; PatternError where a pattern matches nothing."""
    wanted = check.strings(patterns, argument)
    found.add_own_names()
    every = found.every_name()
    matches = match(every, wanted, whole_modules=True)
    demand(matches, every, argument)
    return _first_names(found, matches.names)


@dataclass(frozen=True)
class _Choice:
    """What names alone decide.

    Args:
        wishes: for each parameter whether it shall train, None to leave it as it is.
        off: what the first list alone matched.
        on: what the second list alone matched.
        both: what both matched.
        unmatched: patterns that matched nothing.
        settled: parameters that no further name could get another wish, since all that was asked for matched them;
            None: every one.
    """

    wishes: list[bool | None]
    off: set[str]
    on: set[str]
    both: set[str]
    unmatched: tuple[str, ...]
    settled: set[str] | None


def _choose(
    found: Parameters, wishes: Sequence[bool | None], include: list[str], exclude: list[str], *, strict: bool
) -> _Choice:
    """Lay the two lists over the wishes there are."""
    every = found.every_name()
    frozen, trained = match(every, include, whole_modules=True), match(every, exclude, whole_modules=True)
    if frozen.unmatched or trained.unmatched:
        found.add_own_names()
        every = found.every_name()
        frozen, trained = match(every, include, whole_modules=True), match(every, exclude, whole_modules=True)
    if strict:
        demand(frozen, every, "include")
        demand(trained, every, "exclude")
    off, on = _first_names(found, frozen.names), _first_names(found, trained.names)
    both = off & on
    settled = both if include and exclude else off if include else on if exclude else None
    if both:
        off, on = off - both, on - both
    return _Choice(
        [False if name in off else True if name in on else wish for name, wish in zip(found.names, wishes)],
        off,
        on,
        both,
        (*frozen.unmatched, *trained.unmatched),
        settled,
    )


def _settle(found: Parameters, choose: Callable[[], _Choice]) -> FreezeReport:
    """Read each parameter and set it at once, in place: by a second walk it would have left the processor's cache.

    Nothing is set before `choose` has found every pattern's names, so its errors come while the model is untouched.
    A parameter's own name is read only where it could change what is done: that is the slowest of the readings.
    """
    choice = choose()
    own_name = None if choice.settled is None else found.own_name
    frozen: list[str] = []
    trained: list[str] = []
    cannot: list[str] = []
    trainable: dict[str, int] = {}
    total = 0
    held, wishes, settled = found.held, choice.wishes, choice.settled or ()
    for place, (name, (size, before, may_train)) in enumerate(zip(found.names, found.readings())):
        if own_name is not None and name not in settled and not found.answers_to(place, own_name(held[place])):
            # The first that is called otherwise than its path: with the own names of all, those before choose alike.
            found.add_own_names()
            choice, own_name = choose(), None
            wishes = choice.wishes
        wish = wishes[place]
        now = before if wish is None else wish
        if not may_train:
            now = before and name not in choice.off
            if name in choice.on:
                cannot.append(name)
        if now != before:
            held[place].requires_grad = now
            (trained if now else frozen).append(name)
        if now:
            trainable[name] = size
        if now or may_train:
            total += size
    left = tuple(name for name in found.names if name in choice.both) if choice.both else ()
    return FreezeReport(tuple(frozen), tuple(trained), left, tuple(cannot), choice.unmatched, trainable, total)


def _of_mode(found: Parameters, mode: str) -> set[str]:
    """The parameters that a way of tuning trains, by their first names."""
    every, test = found.every_name(), matcher(MODES[mode])
    if MODES[mode] != _BIAS:
        return _first_names(found, filter(test, every))
    # A model has few different last parts, and a regular expression takes long over ten thousand names.
    ends = [name.rpartition(".")[2] for name in every]
    biases = set(filter(test, set(ends)))
    return _first_names(found, (name for name, end in zip(every, ends) if end in biases))


def _first_names(found: Parameters, names: Iterable[str]) -> set[str]:
    """The names, and for each that is a parameter's further one also its first, by which the rules go on."""
    hit = set(names)
    hit.update([found.names[place] for place, more in found.further.items() if not hit.isdisjoint(more)])
    return hit


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
