"""Which layers and modules a PEFT adapter's configuration speaks of: PEFT's own rules, asked of a model's paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slimkit.core.delta.peft_held import lacking_held
from slimkit.core.delta.spec import PREFIX, Site
from slimkit.core.errors import FileFormatError, PatternError
from slimkit.core.match import bounded_regex

LINEAR = ("linear", "conv1d")


def in_modules(path: str, modules: Iterable[str] | None) -> bool:
    """Whether a tensor or module lies in one that `modules_to_save` names: PEFT compares endings.

    Example:
        >>> in_modules("net.classifier.dense.weight", ["classifier"])
        True
    """
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(p.endswith(m) for m in modules or () for p in above)


def chooser(config: Mapping[str, Any]) -> Callable[[str, Site], bool]:
    """Whether a layer is one that `target_modules` and the options beside it mean.

    Raises:
        PatternError: a regular expression that slimkit does not run.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    chosen = _matches(targets) if targets != "all-linear" else None
    left_out = _matches(excluded) if excluded else None
    saved = [re.compile(rf"(^|.*\.){re.escape(m)}($|\..*)") for m in config.get("modules_to_save") or ()]
    indexes = config.get("layers_to_transform")
    wanted = {indexes} if isinstance(indexes, int) else set(indexes or ())
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)

    def of_layer(path: str) -> bool:
        if not wanted or isinstance(targets, str):
            return True
        if not patterns:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        else:
            tries = (re.match(rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\.", path) for p in patterns)
            found = next((m for m in tries if m), None)
        return found is not None and int(found[1]) in wanted

    def choose(path: str, site: Site) -> bool:
        if (left_out and left_out(path)) or any(s.match(path) for s in saved):
            return False
        if chosen is None:
            return site.kind in LINEAR and not site.head
        return chosen(path) and of_layer(path)

    return choose


def _matches(said: Any) -> Callable[[str], bool]:
    """PEFT's rule for a list of names (whole paths or endings) or for one regular expression."""
    if said is None:
        return lambda path: False
    if isinstance(said, str):
        # PEFT's own and ours may be long lists of alternatives; they hold no repeat at all.
        escaped = not re.search(r"(?<!\\)[*+{]", said)
        test = re.compile(said) if escaped else bounded_regex(said, "target_modules")
        return lambda path: test.fullmatch(path) is not None
    names = [str(name) for name in said]
    whole, endings = set(names), tuple(f".{n}" for n in names)
    return lambda path: path in whole or path.endswith(endings)


def refuse_lacking(
    config: Mapping[str, Any], sites: Mapping[str, Site], found: Iterable[str], rename: Any, where: str
) -> tuple[str, ...]:
    """Refuse a file without factors for a layer that its configuration means.

    Args:
        config: `adapter_config.json`.
        sites: every module path of the model.
        found: the layers that the file has factors for, by the model's paths.
        rename: as for `load_delta`: a mapping of beginnings, a function, or None.
        where: the file, for messages.

    Returns:
        Notes: what could not be checked.

    Raises:
        FileFormatError: a layer is missing.
    """
    try:
        choose = chooser(config)
    except PatternError as error:
        return (f"whether {where} lacks a layer was not checked: {error}",)
    there = set(found)
    lacking = [
        path
        for path, site in sites.items()
        if site.kind and not site.reason and path not in there and any(choose(p, site) for p in _spelled(path, rename))
    ]
    lacking += lacking_held(config, sites, there) if rename is None else []
    if lacking:
        shown = ", ".join(lacking[:5])
        raise FileFormatError(
            f"{where} has no factors for {len(lacking)} of the {len(lacking) + len(there)} layers that its "
            f"target_modules mean; missing: {shown}{' ...' if len(lacking) > 5 else ''}. It was cut short or saved "
            f"in part."
        )
    return ()


def _spelled(path: str, rename: Any) -> list[str]:
    """How the file may call a path of the model."""
    if not isinstance(rename, Mapping):
        return [path]
    return [old + path[len(new) :] for old, new in rename.items() if path.startswith(new)] or [path]


def refuse_headless(
    config: Mapping[str, Any], base: Iterable[str], sites: Mapping[str, Site], given: Iterable[str], where: str
) -> None:
    """Refuse a file without some tensor of a module that `modules_to_save` names and the model has.

    Args:
        config: `adapter_config.json`.
        base: names of the model's tensors.
        sites: every module path of the model.
        given: names of the tensors that the file holds.
        where: the file, for messages.
    """
    there = set(given)
    for module in config.get("modules_to_save") or ():
        paths = tuple(f"{p}." for p in sites if p.endswith(module))
        lacking = [n for n in base if n.startswith(paths) and n not in there] if paths else []
        if lacking:
            raise _cut_short(where, lacking, f"modules_to_save ({module!r})")
    # PEFT writes every parameter of that name, in whatever module (but no `in_proj_bias` of multi-head attention).
    every = [n for n in base if n.rpartition(".")[2] == "bias" and PREFIX not in n]
    biases = every if config.get("bias") == "all" else []
    if lacking := [n for n in biases if n not in there]:
        raise _cut_short(where, lacking, "bias='all'")


def refuse_rowless(config: Mapping[str, Any], found: Iterable[str], where: str) -> None:
    """Refuse a file without the trained token rows of a table that its configuration names; `found` has theirs."""
    there = list(found)
    said = config.get("trainable_token_indices") or {}
    tables = list(said) if isinstance(said, Mapping) else [""]
    if config.get("peft_type") == "TRAINABLE_TOKENS" and not there:
        raise _cut_short(where, ["the token rows"], "token_indices")
    lacking = [f"the rows of {t or 'the table of tokens'}" for t in tables if not any(p.endswith(t) for p in there)]
    if lacking:
        raise _cut_short(where, lacking, "trainable_token_indices")


def _cut_short(where: str, lacking: list[str], said: str) -> FileFormatError:
    shown = ", ".join(lacking[:5])
    return FileFormatError(
        f"{where} holds no values for {shown}, which its {said} mean; it was cut short or saved in part."
    )
