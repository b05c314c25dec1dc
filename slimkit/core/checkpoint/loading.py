"""Loading checkpoints into networks: filters, matching of names, and the report of what was loaded and what was not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from slimkit.core import check
from slimkit.core.checkpoint import manifest
from slimkit.core.checkpoint.saving import VALUES
from slimkit.core.checkpoint.weightfile import Array, Entry, Weights
from slimkit.core.errors import FileFormatError, PatternError, PlanError
from slimkit.core.log import logger
from slimkit.core.showing import Shown

# What an optimizer owns lies under names that begin so.
OPTIMIZER = "optimizer."


@dataclass(frozen=True, repr=False)
class LoadReport(Shown):
    """What a load did.

    Args:
        loaded: parameters of the network that got values.
        missing: parameters of the network that nothing was found for; they are as they were.
        unused: tensors of the checkpoint that no parameter wanted.
        mismatched: parameter -> {"network": type and shape, "checkpoint": type and shape}.
        renamed: parameter -> its name in the checkpoint, where they differ.
        filtered: names that a prefix or function kept out.
        values: the numbers and strings of the checkpoint.
        verified: whether a manifest vouched for every value.
    """

    loaded: list[str]
    missing: list[str]
    unused: list[str]
    mismatched: dict[str, dict[str, str]]
    renamed: dict[str, str] = field(default_factory=dict)
    filtered: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    verified: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def values_of(weights: Weights) -> dict[str, Any]:
    """The numbers and strings that lie beside the tensors of a file."""
    if VALUES not in weights.metadata:
        return dict(weights.values)
    try:
        found = json.loads(weights.metadata[VALUES])
        if isinstance(found, dict) and all(isinstance(v, (bool, int, float, str)) for v in found.values()):
            return found
    except (ValueError, RecursionError):
        pass
    raise FileFormatError(f"{weights.path}: its metadata {VALUES!r} are no JSON object of numbers and strings.")


def chosen_names(
    names: Iterable[str], filter_prefix: str | Sequence[str] | None, choice_func: Callable[[str], bool] | None
) -> tuple[list[str], list[str]]:
    """Split names into those to load and those kept out.

    Args:
        names: names in the checkpoint.
        filter_prefix: names that begin so (or with one of several) are not loaded.
        choice_func: only names for which it is true are loaded.

    Returns:
        (to load, kept out).

    Raises:
        PatternError: a prefix that no name begins with, or a function that wants nothing.

    Example:
        >>> chosen_names(["conv.weight", "fc.weight"], "conv", None)
        (['fc.weight'], ['conv.weight'])
    """
    names = list(names)
    prefixes = [] if filter_prefix is None else [filter_prefix] if isinstance(filter_prefix, str) else filter_prefix
    prefixes = check.strings(list(prefixes), "filter_prefix") if filter_prefix is not None else []
    for prefix in prefixes:
        check.text(prefix, "filter_prefix")
        if not any(n.startswith(prefix) for n in names):
            raise PatternError(f"filter_prefix must begin one of the {len(names)} names. Received: {prefix!r}")
    if choice_func is not None:
        check.function(choice_func, "choice_func")
    kept = [n for n in names if not n.startswith(tuple(prefixes)) and (choice_func is None or choice_func(n))]
    if names and choice_func is not None and not kept:
        raise PatternError(f"choice_func must want at least one of the {len(names)} names; it wants none.")
    return kept, [n for n in names if n not in set(kept)]


# What DistributedDataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")


def match_names(targets: Sequence[str], sources: Sequence[str], *, suffixes: bool) -> dict[str, str]:
    """Match a network's names with a checkpoint's: equal ones first, then those where one ends with the other.

    Args:
        targets: names in the network.
        sources: names in the checkpoint.
        suffixes: match "net.conv.weight" with "conv.weight", in either direction, where only one pair fits.

    Returns:
        target -> source.

    Example:
        >>> match_names(["net.fc.weight", "bias"], ["fc.weight", "bias"], suffixes=True)
        {'bias': 'bias', 'net.fc.weight': 'fc.weight'}
        >>> match_names(["fc.weight"], ["module.fc.weight"], suffixes=False)
        {'fc.weight': 'module.fc.weight'}
    """
    have = set(sources)
    found = {t: t for t in targets if t in have}
    for prefix in WRAPPERS if not found and sources else ():
        if all(source.startswith(prefix) for source in sources):
            bare = match_names(targets, [source.removeprefix(prefix) for source in sources], suffixes=suffixes)
            return {target: prefix + source for target, source in bare.items()}
    if not suffixes:
        return found
    open_sources = [s for s in sources if s not in found]
    open_targets = [t for t in targets if t not in found]
    by_tail: dict[str, list[str]] = {}
    for source in open_sources:
        for tail in _tails(source):
            by_tail.setdefault(tail, []).append(source)
    offers: dict[str, list[str]] = {}
    for target in open_targets:
        # A shorter name in the checkpoint, the longest that fits; else a longer one, if only one fits.
        shorter = [tail for tail in _tails(target)[1:] if tail in have and tail not in found]
        longer = by_tail.get(target, [])
        candidates = shorter[:1] or (longer if len(longer) == 1 else [])
        for source in candidates:
            offers.setdefault(source, []).append(target)
    return found | {wanting[0]: source for source, wanting in offers.items() if len(wanting) == 1}


def _tails(name: str) -> list[str]:
    """A dotted name, without its first word, without its first two, ..."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def plan_load(
    targets: Mapping[str, Entry],
    sources: Mapping[str, Entry],
    *,
    strict_load: bool,
    filter_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    report_only: bool = False,
    tied: Iterable[Sequence[str]] = (),
) -> tuple[dict[str, str], LoadReport]:
    """Decide what a load would do, before anything is changed.

    Args:
        targets: name -> type and shape in the network.
        sources: name -> type and shape in the checkpoint.
        strict_load: names must be equal, and every parameter must get a value.
        filter_prefix, choice_func: what of the checkpoint to leave out.
        report_only: nothing that does not fit is an error.
        tied: groups of network names that are one tensor.

    Returns:
        target -> source of what fits, and the report.

    Raises:
        PatternError: a filter matches nothing.
        PlanError: tensors without a place, shapes that differ, or with `strict_load` parameters without a value.
    """
    check.boolean(strict_load, "strict_load")
    check.boolean(report_only, "report_only")
    wanted, filtered = chosen_names(sources, filter_prefix, choice_func)
    pairs = match_names(list(targets), wanted, suffixes=not strict_load)
    mismatched = {
        t: {"network": _told(targets[t]), "checkpoint": _told(sources[s])}
        for t, s in pairs.items()
        if targets[t].shape != sources[s].shape or _family(targets[t]) != _family(sources[s])
    }
    used = set(pairs.values())
    pairs = {t: s for t, s in pairs.items() if t not in mismatched}
    twins = {name: set(group) for group in tied for name in group}
    reached = set(pairs) | {n for n, group in twins.items() if group & set(pairs)}
    report = LoadReport(
        loaded=[t for t in targets if t in reached],
        missing=[t for t in targets if t not in reached and t not in mismatched],
        unused=[s for s in wanted if s not in used],
        mismatched=mismatched,
        renamed={t: s for t, s in pairs.items() if t != s},
        filtered=filtered,
    )
    problems = []
    if report.mismatched:
        name, both = next(iter(mismatched.items()))
        shown = f"{both['network']} in the network, {both['checkpoint']} in the checkpoint"
        problems.append(f"{len(mismatched)} tensors differ in shape or kind, such as {name!r}: {shown}")
    if report.unused:
        near = check.near(report.unused[0], report.missing)
        problems.append(
            f"{len(report.unused)} tensors have no place in the network, such as {report.unused[0]!r}{near}"
        )
    if report.missing and strict_load:
        problems.append(f"{len(report.missing)} parameters got no value, such as {report.missing[0]!r}")
    if problems and not report_only:
        raise PlanError("; ".join(problems) + ". report_only=True loads what fits and lists the rest.")
    if report.missing:
        logger.info("%d parameters keep their values: the checkpoint does not hold them.", len(report.missing))
    return pairs, report


def _told(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _family(entry: Entry) -> str:
    """Floats turn into floats and integers into integers; a float read as an integer would lose its fraction."""
    return "float" if entry.dtype.startswith(("F", "BF", "C")) else "integer"


def load_into(
    source: Weights,
    targets: Mapping[str, Entry],
    assign: Callable[[str, Array, str], None],
    *,
    verify: bool = True,
    optimizer_apart: bool = False,
    **options: Any,
) -> LoadReport:
    """Load open weights into a network: check everything, then assign tensor by tensor.

    Args:
        source: the open checkpoint.
        targets: name -> type and shape in the network.
        assign: assign(name in the network, stored array, its element type).
        verify: hold every tensor against the manifest beside the file, where there is one.
        optimizer_apart: the caller restores what lies under OPTIMIZER itself.
        options: those of `plan_load`.

    Returns:
        The report.

    Raises:
        FileFormatError: a tensor is damaged; it is named.
        PlanError, PatternError: as `plan_load` says. The network is as it was.
    """
    check.boolean(verify, "verify")
    values = values_of(source)
    sources = dict(source.entries)
    for name, entry in source.entries.items():
        if optimizer_apart and name.startswith(OPTIMIZER):
            del sources[name]
            continue
        # MindSpore saves numbers as tensors without axes; one that no parameter is called by is a number.
        if entry.shape == () and not any(t == name or t.endswith("." + name) for t in targets):
            values[name] = source.read(name)[()].item()
            del sources[name]
    pairs, report = plan_load(targets, sources, **options)
    verified = verify and check_manifest(source)
    if not verified:
        source.verify(pairs.values())
    for target, origin in pairs.items():
        assign(target, source.raw(origin), source.entries[origin].dtype)
    return replace(report, values=values, verified=verified)


def check_manifest(source: Weights) -> bool:
    """Hold a checkpoint against the manifest beside it; False where there is none."""
    vouching = manifest.Manifest(source)
    vouching.check_all(source)
    return vouching.tensors is not None


def read_all(
    source: Weights,
    make: Callable[[str, Array, str], Any],
    filter_prefix: str | Sequence[str] | None,
    choice_func: Callable[[str], bool] | None,
    *,
    verify: bool,
) -> dict[str, Any]:
    """Everything a checkpoint holds that the filters leave: name -> make(name, stored array, type), or a value."""
    check.boolean(verify, "verify")
    values = values_of(source)
    wanted, _ = chosen_names([*source.entries, *values], filter_prefix, choice_func)
    vouching = manifest.Manifest(source) if verify else None
    if vouching is not None:
        vouching.check_names(source)
    found: dict[str, Any] = {}
    for name in wanted:
        if name in values:
            found[name] = values[name]
            continue
        array = source.raw(name)
        if vouching is not None:
            vouching.check(source, name, array)
        found[name] = make(name, array, source.entries[name].dtype)
    return found
