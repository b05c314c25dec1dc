"""PruneConfig, renumbering of blocks, and pairing of names."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError, PatternError
from slimkit.core.weights import blocks, names
from slimkit.core.weights.blocks import BlocksParams, PruneConfig


def test_setters_return_the_config_and_spec_is_plain():
    config = PruneConfig()
    assert config.set_steps(["prune_blocks"]) is config
    assert config.add_blocks_params(r"h.(\d+).", {0: 1}) is config
    assert config.set_selection("importance") is config
    assert config.set_head_size(32) is config
    spec = config.spec()
    assert spec.steps == ("prune_blocks",)
    assert spec.blocks == (BlocksParams(r"h.(\d+).", ((0, 1),)),)
    assert (spec.selection, spec.head_size) == ("importance", 32)


def test_the_callers_list_and_dict_are_copied():
    steps, layers = ["prune_blocks"], {0: 0}
    config = PruneConfig().set_steps(steps).add_blocks_params(r"(\d+)", layers)
    steps.append("nonsense")
    layers[5] = 9
    assert config.spec().steps == ("prune_blocks",)
    assert config.spec().blocks[0].layer_id_map == ((0, 0),)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.set_steps([]), ArgumentTypeError),
        (lambda c: c.set_steps("prune_blocks"), ArgumentTypeError),
        (lambda c: c.set_steps(["prune_block"]), ArgumentError),
        (lambda c: c.set_steps(["prune_blocks", "prune_blocks"]), ArgumentError),
        (lambda c: c.add_blocks_params(3, {0: 0}), ArgumentTypeError),
        (lambda c: c.add_blocks_params(r"h.\d+.", {0: 0}), PatternError),
        (lambda c: c.add_blocks_params(r"h.(\d+", {0: 0}), PatternError),
        (lambda c: c.add_blocks_params(r"(a+)+(\d+)", {0: 0}), PatternError),
        (lambda c: c.add_blocks_params("(" + "a" * 600 + ")", {0: 0}), PatternError),
        (lambda c: c.add_blocks_params(r"(\d+)", [0]), ArgumentTypeError),
        (lambda c: c.add_blocks_params(r"(\d+)", {}), ArgumentError),
        (lambda c: c.add_blocks_params(r"(\d+)", {True: 0}), ArgumentTypeError),
        (lambda c: c.add_blocks_params(r"(\d+)", {0: "1"}), ArgumentTypeError),
        (lambda c: c.add_blocks_params(r"(\d+)", {0: -1}), ArgumentError),
        (lambda c: c.set_selection("best"), ArgumentError),
        (lambda c: c.set_selection(1), ArgumentTypeError),
        (lambda c: c.set_head_size(0), ArgumentError),
    ],
)
def test_bad_arguments_are_named(call, error):
    with pytest.raises(error, match="Received"):
        call(PruneConfig())


def test_prune_blocks_needs_blocks_params_and_the_other_way_round():
    with pytest.raises(ValueError, match="add_blocks_params"):
        PruneConfig().set_steps(["prune_blocks"]).spec()
    with pytest.raises(ConfigError, match="prune_blocks"):
        PruneConfig().set_steps(["prune_bert_intra_block"]).add_blocks_params(r"(\d+)", {0: 0}).spec()
    with pytest.raises(ConfigError, match="set_steps"):
        PruneConfig().spec()


def test_blocks_are_renumbered_and_the_rest_is_dropped():
    names = [f"bert.encoder.layer.{i}.{k}" for i in range(12) for k in ("a.weight", "b.bias")] + ["bert.pooler.weight"]
    seeds = BlocksParams(r"bert.encoder.layer.(\d+).", tuple({0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 11}.items()))
    kept, dropped = blocks.rename_blocks(names, [seeds])
    assert kept["bert.encoder.layer.6.b.bias"] == "bert.encoder.layer.11.b.bias"
    assert kept["bert.pooler.weight"] == "bert.pooler.weight"
    assert len(kept) == 15
    assert sorted(dropped) == sorted(
        f"bert.encoder.layer.{i}.{k}" for i in (1, 3, 5, 7, 9) for k in ("a.weight", "b.bias")
    )


def test_one_block_may_feed_two_and_stacks_are_apart():
    names = ["enc.0.w", "enc.1.w", "dec.0.w", "dec.1.w"]
    kept, dropped = blocks.rename_blocks(
        names, [BlocksParams(r"enc\.(\d+)", ((0, 1), (1, 1))), BlocksParams(r"dec\.(\d+)", ((0, 0),))]
    )
    assert kept == {"enc.0.w": "enc.1.w", "enc.1.w": "enc.1.w", "dec.0.w": "dec.0.w"}
    assert dropped == ["enc.0.w", "dec.1.w"]


@pytest.mark.parametrize(
    ("pattern", "layers", "error", "words"),
    [
        (r"decoder.(\d+)", {0: 0}, PatternError, "matches none"),
        (r"(enc).\d+", {0: 0}, PatternError, "must be a number"),
        (r"enc.(\d+)", {0: 7}, ConfigError, "blocks 0 to 1"),
    ],
)
def test_blocks_are_checked_against_the_file(pattern, layers, error, words):
    with pytest.raises(error, match=words):
        blocks.rename_blocks(["enc.0.w", "enc.1.w"], [BlocksParams(pattern, tuple(layers.items()))])


def test_two_names_must_not_become_one():
    with pytest.raises(ConfigError, match="would both become"):
        blocks.rename_blocks(["a.0.w", "a.1.w"], [BlocksParams(r"a.(1)", ((0, 1),))])


def test_new_numbers_must_be_the_models_own():
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        blocks.check_targets(["enc.0.w", "enc.1.w"], [BlocksParams(r"enc.(\d+)", ((0, 0),))])
    blocks.check_targets(["enc.0.w"], [BlocksParams(r"enc.(\d+)", ((0, 5),))])
    blocks.check_targets(["other"], [BlocksParams(r"enc.(\d+)", ((0, 5),))])


def test_names_pair_as_they_are_under_a_prefix_and_across_frameworks():
    pair = names.pair_names
    assert pair(["a.weight"], ["a.weight", "bert.a.weight"]) == {"a.weight": "a.weight"}
    assert pair(["a.weight", "b.bias"], ["bert.a.weight", "bert.b.bias", "cls.b.x"]) == {
        "a.weight": "bert.a.weight",
        "b.bias": "bert.b.bias",
    }
    assert pair(["model.a.weight", "head.weight"], ["a.weight"]) == {"model.a.weight": "a.weight"}
    assert pair(["n.gamma", "e.embedding_table"], ["n.weight", "e.weight"]) == {
        "n.gamma": "n.weight",
        "e.embedding_table": "e.weight",
    }
    assert pair(["n.weight"], ["n.gamma", "n.weight"]) == {"n.weight": "n.weight"}
    assert pair(["n.weight"], ["m.weight"]) == {}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["a.weight", "b.gamma"])), min_size=1, max_size=12, unique=True
    ),
    st.dictionaries(st.integers(0, 5), st.integers(0, 5), min_size=1, max_size=6),
)
def test_every_name_is_kept_or_dropped_and_nothing_is_invented(names, layers):
    names = [f"enc.layer.{i}.{k}" for i, k in names]
    have = {int(n.split(".")[2]) for n in names}
    layers = {n: o for n, o in layers.items() if o in have}
    if not layers:
        return
    kept, dropped = blocks.rename_blocks(names, [BlocksParams(r"layer.(\d+).", tuple(layers.items()))])
    assert set(kept.values()) | set(dropped) == set(names)
    assert not set(kept.values()) & set(dropped)
    for new, old in kept.items():
        assert layers[int(new.split(".")[2])] == int(old.split(".")[2])
        assert new.split(".")[3:] == old.split(".")[3:]
    json.dumps(kept)
