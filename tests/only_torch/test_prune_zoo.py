"""Every family of the zoo, pruned and proved by the zero-mask oracle."""

from __future__ import annotations

import pytest

from tests.zoo import language, oracle, vision


@pytest.mark.parametrize("name", vision.NETS)
def test_own_definitions_prune_exactly_and_hit_the_target(name):
    net, inputs = vision.build(name)
    for ratio in (0.8, 0.5):
        _, _, report = oracle.check(net, inputs, ratio)
        assert abs(report["reached"] - ratio) <= 0.02
        assert not report["without_rule"]


@pytest.mark.parametrize("name", language.MODELS)
def test_hugging_face_models_prune_exactly(name):
    model, inputs = language.build(name)
    _, _, report = oracle.check(model, inputs, 0.7)
    assert abs(report["reached"] - 0.7) <= 0.02


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen2", "t5", "vit", "swin", "mixtral", "convnext", "opt"])
def test_hidden_width_is_prunable_too(name):
    model, inputs = language.build(name)
    _, desc, report = oracle.check(model, inputs, 0.7, hidden=True)
    kinds = {report["variables"][n]["kind"] for n in desc["variables"]}
    assert "hidden" in kinds
    assert abs(report["reached"] - 0.7) <= 0.02


@pytest.mark.parametrize("name", language.MORE)
def test_families_without_a_rule_of_their_own(name):
    model, inputs = language.build(name)
    for hidden in (False, True):
        _, _, report = oracle.check(model, inputs, 0.7, hidden=hidden)
        assert abs(report["reached"] - 0.7) <= 0.02
