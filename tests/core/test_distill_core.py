"""The distillation configuration and the reference losses, without a framework."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig, LossTerm
from slimkit.core.distill.losses import reference
from slimkit.core.distill.shapes import pick, projection_values
from slimkit.core.errors import ConfigError

TERM = {"func_name": "HiddenMse", "func_weight": 1}
OUTPUT = {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [TERM]}
INNER = {"t_module": "a", "s_module": "b", **OUTPUT}


def test_the_documented_calls_chain():
    config = (
        KnowledgeDistillConfig()
        .set_teacher_train()
        .set_hard_label(0.3, 0)
        .add_inter_soft_label({**INNER, "shape": [2048]})
        .add_output_soft_label(
            {**OUTPUT, "loss_func": [{"func_name": "KDCrossEntropy", "func_weight": 1, "func_param": []}]}
        )
    )
    spec = config.spec()
    assert spec.teacher_trains
    assert spec.hard_weight == 0.3
    assert [label.label for label in spec.soft_labels] == ["b", "output"]
    assert spec.soft_labels[0].losses == (LossTerm("HiddenMse", 1.0),)


def test_the_callers_dict_is_left_alone():
    given = copy.deepcopy(INNER)
    config = KnowledgeDistillConfig().add_inter_soft_label(given)
    assert given == INNER
    given["loss_func"][0]["func_weight"] = 99
    assert config.spec().soft_labels[0].losses[0].func_weight == 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"t_module": 3}, TypeError, "t_module"),
        ({"t_output_idx": -1}, ValueError, "at least 0"),
        ({"t_output_idx": 1.5}, TypeError, "t_output_idx"),
        ({"loss_func": []}, TypeError, "non-empty"),
        ({"loss_func": [{"func_name": "HiddenMse"}]}, ConfigError, "Missing: func_weight"),
        ({"loss_func": [{**TERM, "func_weight": 0}]}, ValueError, "above 0"),
        ({"loss_func": [{**TERM, "temperature": 0}]}, ValueError, "above 0"),
        ({"loss_func": [{**TERM, "temperature": 2}]}, ConfigError, "no temperature"),
        ({"loss_func": [{**TERM, "func_param": [1]}]}, ConfigError, "func_param"),
        ({"loss_func": [{**TERM, "temprature": 2}]}, ConfigError, "Did you mean 'temperature'"),
        ({"smodule": "x"}, ConfigError, "Did you mean 's_module'"),
        ({"t_side": "both"}, ValueError, "t_side"),
        ({"pool": "max"}, ValueError, "pool"),
        ({"mask": 1.5}, TypeError, "mask"),
        ({"widths": [3]}, ValueError, "widths"),
    ],
)
def test_wrong_entries_are_named(change, error, said):
    with pytest.raises(error, match=said):
        KnowledgeDistillConfig().add_inter_soft_label({**INNER, **change})


def test_missing_keys_unknown_losses_and_empty_configurations_are_refused():
    config = KnowledgeDistillConfig()
    with pytest.raises(ConfigError, match="Missing: t_module"):
        config.add_inter_soft_label({k: v for k, v in INNER.items() if k != "t_module"})
    with pytest.raises(ConfigError, match="must hold a soft label"):
        config.spec()
    config.add_output_soft_label({**OUTPUT, "loss_func": [{"func_name": "KDCrossEntrpy", "func_weight": 1}]})
    with pytest.raises(ConfigError, match="Did you mean 'KDCrossEntropy'"):
        config.spec()
    with pytest.raises(TypeError):
        config.add_custom_loss_func("mine", lambda s, t: 0)
    with pytest.raises(ConfigError, match="built-in"):
        config.add_custom_loss_func("MMD", object())
    for weight in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="weight"):
            config.set_hard_label(weight, 0)
    with pytest.raises(ValueError, match="index"):
        config.set_hard_label(0.5, -1)


def test_pick_reads_outputs_of_every_kind():
    array = np.arange(3.0)
    assert pick(array, 0, "m") is array
    assert pick(array, None, "m") is array
    assert pick((1.0, array), 1, "m") is array
    assert pick({"a": (array,)}, ("a", 0), "m") is array
    assert pick({"a": 1.0, "b": array}, 1, "m") is array
    for value, index, said in [
        (array, 1, "out of range"),
        ((array,), 3, "out of range"),
        ({"logits": array}, "logit", "Did you mean 'logits'"),
        ((array, array), None, "say which"),
        (((array,), array), 0, "say which"),
    ]:
        with pytest.raises(ConfigError, match=said):
            pick(value, index, "m")


def arrays(seed, shape):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 4), width=st.integers(2, 6))
def test_losses_are_least_where_student_is_teacher(seed, rows, width):
    s, t = arrays(seed, (2, rows, width))
    for name in LOSSES:
        if name == "AttentionMse":
            continue
        term = LossTerm(name, 1.0)
        best = reference(t, t, term)
        # 1e-12: float64
        assert reference(s, t, term) >= best - 1e-12 or name == "HardKDCrossEntropy"
        if name not in ("KDCrossEntropy", "HardKDCrossEntropy"):
            assert abs(best) < 1e-12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), real=st.integers(1, 4))
def test_what_is_masked_does_not_count(seed, real):
    s, t = arrays(seed, (3, 5, 4))
    mask = np.zeros((3, 5))
    mask[:, :real] = 1
    other = s.copy()
    other[:, real:] += 7
    for name in LOSSES:
        if name != "AttentionMse":
            term = LossTerm(name, 1.0)
            assert np.isclose(reference(s, t, term, mask), reference(other, t, term, mask), atol=1e-12), name
            if name not in ("MMD", "Relation"):
                whole = reference(s[:, :real], t[:, :real], term)
                assert np.isclose(reference(s, t, term, mask), whole, atol=1e-12), name


def test_cross_entropy_and_kl_differ_by_the_teachers_entropy():
    s, t = arrays(0, (4, 6))
    p = np.exp(t) / np.exp(t).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1).mean()
    gap = reference(s, t, LossTerm("KDCrossEntropy", 1.0)) - reference(s, t, LossTerm("KDKLDiv", 1.0))
    assert np.isclose(gap, entropy, atol=1e-12)


def test_attention_maps_with_other_numbers_of_heads_are_averaged():
    rng = np.random.default_rng(0)
    s, t = rng.random((2, 2, 5, 5)), rng.random((2, 4, 5, 5))
    expected = ((s.mean(1) - t.mean(1)) ** 2).mean()
    assert np.isclose(reference(s, t, LossTerm("AttentionMse", 1.0)), expected)


def test_the_projection_keeps_the_size_of_a_state():
    w = projection_values(64, 256, 0)
    x = np.random.default_rng(0).standard_normal((500, 64))
    # 500 x 256 samples of variance 1: a relative error of a few per cent
    assert abs((x @ w.T).var() - 1) < 0.1
    assert (w == projection_values(64, 256, 0)).all()
    assert (w[:2, :2] != projection_values(64, 256, 1)[:2, :2]).any()
