"""What a notebook or a prompt shows of slimkit's objects: a short table, in plain text and in HTML."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

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
        assert " at 0x" not in text + html
        assert word in html, html
        assert 1 < len(text.splitlines()) < 40, text
        assert html.startswith("<table>")
        assert html.endswith("</table>")
