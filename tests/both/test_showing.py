"""What a notebook or a prompt shows of slimkit's objects: a short table, in plain text and in HTML."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import re

import numpy as np
import pytest

from slimkit.core import public
from slimkit.core.ascend.w16a16s import W16A16S
from slimkit.core.showing import Report, Shown, brief


def test_a_report_is_the_dict_it_was():
    values = {"zeros": 3, "layers": {"a": {"ratio": 0.5}, "b": {}}, "note": None}
    report = Report("sparsity", values)
    assert report == values
    assert report["layers"]["a"]["ratio"] == 0.5
    assert json.loads(json.dumps(report)) == values
    for other in (copy.deepcopy(report), copy.copy(report), pickle.loads(pickle.dumps(report))):
        assert other == values
        assert str(other) == str(report)
    assert str(report).splitlines() == ["sparsity", "  zeros   3", "  layers  2 entries: a, b", "  note    -"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "True"), (1e-9, "1e-09"), ([], "none"), ({}, "none"), ([1], "1 entry"), ("a\nb", "a b")],
)
def test_a_value_takes_one_short_line(value, text):
    assert brief(value) == text


def test_nothing_shown_is_long_or_breaks_the_page():
    report = Report(
        "<b>", {"<i>": "<script>" * 100, "many": list(range(10**6)), "keys": {f"k{i}": i for i in range(99)}}
    )
    assert max(len(line) for line in str(report).splitlines()) < 110
    html = report._repr_html_()
    assert "<script>" not in html
    assert "<i>" not in html
    assert "<b>" not in html


def _shown(kit) -> dict[str, object]:
    """One object of each public class that a notebook is likely to show."""
    sk = kit.slim
    net = kit.sequential(kit.linear(8, 8), kit.relu(), kit.linear(8, 4))
    pruner = sk.Pruner(net, kit.tensor(np.zeros((1, 8), np.float32)))
    _, plan = pruner.analysis(0.8)
    config = sk.KnowledgeDistillConfig().set_hard_label(0.5, 0)
    config.add_output_soft_label(
        {
            "t_output_idx": 0,
            "s_output_idx": 0,
            "loss_func": [{"func_name": "KDCrossEntropy", "func_weight": 2, "temperature": 1}],
        }
    )
    compressor = sk.Compressor(net, sk.SparseConfig(method="magnitude"))
    before = str(compressor)
    report = compressor.compress([])
    assert "not yet" in before
    assert "not yet" not in str(compressor)
    return {
        "model": pruner,
        "plan": plan,
        "left_params": pruner.report(),
        "done": compressor,
        "zeros": report,
        "optimizer": sk.Trainer(net),
        "sparse_ratio": sk.SparseConfig(),
        "selection": sk.PruneConfig(),
        "2 KDCrossEntropy": config,
        "epoch": sk.InMemoryRunHistory(),
        "group 0": sk.ModelFreezer(net),
        "trainable": sk.trainable_summary(net),
    }


def test_every_object_shows_a_short_table(kit):
    for word, thing in _shown(kit).items():
        assert isinstance(thing, Shown)
        text, html = str(thing), thing._repr_html_()
        assert " at 0x" not in text + html + repr(thing)
        assert word in html, html
        assert 1 < len(text.splitlines()) < 40, text
        assert html.startswith("<table>")
        assert html.endswith("</table>")


def _classes(kit) -> dict[str, type]:
    """Every public class but the exceptions."""
    package = importlib.import_module(kit.package)
    found = {name: getattr(package, name) for name in public.homes(kit.package)}
    return {n: v for n, v in found.items() if inspect.isclass(v) and not issubclass(v, BaseException)}


def test_no_public_object_prints_as_an_address(kit):
    """Layers print as their framework's do, a configuration as the call that makes it, all else as a table."""
    for name, kind in _classes(kit).items():
        assert kind.__repr__ is not object.__repr__, name
        plain = issubclass(kind, kit.Module) or name in ("SparseMethod", "SparseProblem")
        assert plain or hasattr(kind, "_repr_html_"), f"{name} has no table in a notebook"


def test_a_report_prints_short_whatever_it_holds(kit):
    """Thousands of names are a number in the table: a report is an answer at the prompt."""
    package = importlib.import_module(kit.package)
    long = {f"layer.{i}": i for i in range(5000)}
    plain = {"str": "a name", "int": 5, "float": 0.5, "list": list(long), "tuple": tuple(long)}
    shown = {n: k for n, k in _classes(kit).items() if n.endswith("Report") and dataclasses.is_dataclass(k)}
    assert len(shown) >= 5
    for name, kind in [*shown.items(), ("W16A16S", W16A16S)]:
        fields = [f for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        text = repr(kind(**{f.name: plain.get(str(f.type).partition("[")[0], long) for f in fields}))
        assert len(text.splitlines()) < 40, name
        assert len(text) < 4000, name
    assert repr(package.SparseConfig()).startswith("SparseConfig(mode=")


def test_every_public_class_says_what_each_argument_is(kit):
    """`__init__` is documented where people look: in the class."""
    silent = []
    for name, kind in _classes(kit).items():
        told = f"{inspect.getdoc(kind)}\n{inspect.getdoc(kind.__init__)}"
        assert len(told.split(".")[0].split()) > 2, name
        takes = list(inspect.signature(kind.__init__).parameters.values())[1:]
        for one in takes:
            said = rf"^\s*[\w, ]*\b{one.name}\b[\w, ]*:|`{one.name}[`=]|\b{one.name}="
            variable = one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
            if not variable and not re.search(said, told, re.MULTILINE):
                silent.append(f"{name}.{one.name}")
    assert silent == []


def test_every_public_method_has_a_docstring(kit):
    silent = []
    for name, kind in _classes(kit).items():
        for member, value in inspect.getmembers(kind, lambda v: inspect.isfunction(v) or isinstance(v, property)):
            home = getattr(value, "__module__", None) or getattr(value.fget, "__module__", "")
            ours = home.startswith("slimkit") and member not in ("extra_repr", "extend_repr", "construct", "forward")
            if ours and not member.startswith("_") and not inspect.getdoc(value):
                silent.append(f"{name}.{member}")
    assert silent == []
