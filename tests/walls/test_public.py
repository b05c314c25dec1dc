"""Both packages offer the same names, with the same parameters and defaults."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from slimkit.core import public
from tests.conftest import INSTALLED

ROOT = Path(__file__).parents[2]
WINGS = {"torch": "slimkit", "mindspore": "slimkit_ms"}
BOTH = [n for n in {n for table in public.ROOMS.values() for n in table} if n not in public.ONLY]

# (name, parameter): why its default or presence differs between the wings.
_DTYPE = "float16 on MindSpore as the documents of MindPet say; the input's dtype on torch"
_WALK = "a folder says how transformers builds its model; MindSpore's blocks are built by the caller, on one device"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("AdapterDense", "compute_dtype"): _DTYPE,
    ("AdapterLayer", "compute_dtype"): _DTYPE,
    ("LoRADense", "compute_dtype"): _DTYPE,
    ("LowRankAdapterDense", "compute_dtype"): _DTYPE,
    ("LowRankAdapterLayer", "compute_dtype"): _DTYPE,
    **{("sparsify_checkpoint", name): _WALK for name in ("compute_dtype", "device", "offload", "build", "blocks")},
}


def _values(package: str) -> dict[str, object]:
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in public.homes(package)}


@pytest.mark.parametrize("framework", INSTALLED)
def test_every_public_name_exists_at_the_top_and_in_its_room(framework):
    package = WINGS[framework]
    top = importlib.import_module(package)
    for room, table in public.ROOMS.items():
        module = importlib.import_module(f"{package}.{room}")
        for name in table:
            if name in public.ONLY and public.ONLY[name][0] != package:
                assert not hasattr(top, name), f"{name} belongs to the other wing"
                continue
            assert getattr(module, name) is getattr(top, name), f"{package}.{room}.{name}"
            assert name in dir(top)


@pytest.mark.parametrize("framework", INSTALLED)
def test_every_public_name_is_documented(framework):
    for name, value in _values(WINGS[framework]).items():
        assert inspect.getdoc(value), f"{name} has no docstring"


def _parameters(value: object) -> dict[str, inspect.Parameter]:
    target = value.__init__ if inspect.isclass(value) else value
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    return {n: p for n, p in found.items() if n != "self"}


def _plain(default: object) -> object:
    """A default as something comparable across frameworks: dtypes and initialisers by name."""
    if default is inspect.Parameter.empty or isinstance(default, str | int | float | bool | tuple | type(None)):
        return default
    return str(default).rpartition(".")[2].lower()


def differences() -> list[tuple[str, str, str]]:
    torch_side, ms_side = _values("slimkit"), _values("slimkit_ms")
    rows = []
    for name in sorted(BOTH):
        ours, theirs = _parameters(torch_side[name]), _parameters(ms_side[name])
        for parameter in dict.fromkeys([*ours, *theirs]):
            if parameter not in ours or parameter not in theirs:
                rows.append((name, parameter, "slimkit only" if parameter in ours else "slimkit_ms only"))
            elif _plain(ours[parameter].default) != _plain(theirs[parameter].default):
                rows.append((name, parameter, f"{ours[parameter].default!r} against {theirs[parameter].default!r}"))
        shared = [p for p in ours if p in theirs]
        if shared != [p for p in theirs if p in ours]:
            rows.append((name, "*", "the order of parameters differs"))
    return rows


@pytest.mark.skipif(len(INSTALLED) < 2, reason="compares both frameworks")
def test_parameters_and_defaults_are_the_same_in_both_wings():
    found = {(name, parameter): how for name, parameter, how in differences()}
    unexplained = {k: v for k, v in found.items() if k not in EXCEPTIONS}
    assert not unexplained, unexplained
    stale = [k for k in EXCEPTIONS if k not in found]
    assert not stale, f"exceptions that no longer apply: {stale}"


def test_every_exception_is_explained_in_the_differences_page():
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    for name, parameter in EXCEPTIONS:
        assert name in page, f"docs/differences.md says nothing about {name}({parameter})"
    for name in public.ONLY:
        assert name in page, f"docs/differences.md says nothing about {name}"
