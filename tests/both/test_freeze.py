"""Freezing: the rules over names, the files, the exceptions and the groups, the same in both frameworks."""

import pytest

from slimkit.core.errors import ArgumentError, ModelConfigFreezeInfoError, PatternError, ReadYamlFileError


@pytest.fixture
def net(kit):
    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.embed = kit.linear(4, 4)
            self.body = kit.named(dense=kit.linear(4, 4), norm=kit.layer_norm(4))
            self.head = kit.linear(4, 2)

    return Net()


def trained(kit, net):
    return {name for name, p in kit.params(net).items() if kit.trains(p)}


def test_include_freezes_and_exclude_trains(kit, net):
    kit.slim.freeze_modules(net, include=["*"])
    assert trained(kit, net) == set()
    report = kit.slim.freeze_modules(net, exclude=["head", "body.dense.bias"])
    assert trained(kit, net) == {"head.weight", "head.bias", "body.dense.bias"}
    assert set(report.trained) == trained(kit, net)
    assert report.frozen == ()


def test_what_both_lists_match_is_left_alone(kit, net):
    kit.slim.freeze_modules(net, include=["head.bias"])
    report = kit.slim.freeze_modules(net, include=["*"], exclude=["head.*"])
    assert trained(kit, net) == {"head.weight"}  # as they were: bias frozen, weight not
    assert set(report.left_alone) == {"head.weight", "head.bias"}


def test_a_name_without_star_is_a_parameter_or_a_whole_module(kit, net):
    kit.slim.freeze_modules(net, include=["body", "head.weight"])
    assert trained(kit, net) == {"embed.weight", "embed.bias", "head.bias"}


def test_brackets_and_question_marks_are_plain_letters(kit, net):
    with pytest.raises(PatternError, match="include"):
        kit.slim.freeze_modules(net, include=["hea[d].weight"])


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(kit, net):
    before = trained(kit, net)
    with pytest.raises(ValueError, match=r"'head.weigth'.*Did you mean 'head.weight'"):
        kit.slim.freeze_modules(net, include=["*", "head.weigth"])
    assert trained(kit, net) == before
    report = kit.slim.freeze_modules(net, include=["*", "hed"], strict=False)
    assert report.unmatched == ("hed",)
    assert trained(kit, net) == set()


@pytest.mark.parametrize("lists", [{}, {"include": None, "exclude": None}])
def test_both_lists_missing_is_a_value_error(kit, net, lists):
    with pytest.raises(ValueError, match="include and exclude"):
        kit.slim.freeze_modules(net, **lists)


@pytest.mark.parametrize("bad", [[], "head", {"head": 1}, [1], 3])
@pytest.mark.parametrize("which", ["include", "exclude"])
def test_a_list_of_the_wrong_type_is_a_type_error(kit, net, which, bad):
    before = trained(kit, net)
    with pytest.raises(TypeError, match=which):
        kit.slim.freeze_modules(net, **{which: bad})
    with pytest.raises(TypeError, match=which):
        kit.slim.freeze_delta(net, "bitfit", **{which: bad})
    assert trained(kit, net) == before


@pytest.mark.parametrize("call", ["freeze_modules", "freeze_delta", "freeze_from_config", "ModelFreezer"])
def test_a_model_of_the_wrong_type_is_a_type_error(kit, call):
    arguments = {"freeze_modules": (["*"],), "freeze_delta": ("lora",), "freeze_from_config": ("x",)}.get(call, ())
    with pytest.raises(TypeError, match="model"):
        getattr(kit.slim, call)("net", *arguments)


@pytest.mark.parametrize("mode", ["bitfit", "BitFit", "BITFIT"])
def test_bitfit_trains_every_bias_and_every_beta(kit, net, mode):
    kit.slim.freeze_delta(net, mode)
    norm = "body.norm.bias" if kit.name == "torch" else "body.norm.beta"
    assert trained(kit, net) == {"embed.bias", "body.dense.bias", norm, "head.bias"}


@pytest.mark.parametrize("mode", ["lora", "LoRA", "prefixtuning", "prefix", "adapter", "low_rank_adapter"])
@pytest.mark.parametrize("extra", ["prompttuning", "Prompt", "ptuning2"])
def test_every_mode_trains_its_own_parameters_only(kit, mode, extra):
    names = {"prefix": "prefixtuning", "prompt": "prompttuning"}
    kinds = [names.get(m.lower(), m.lower()) for m in (mode, extra)]
    net = kit.named(dense=kit.linear(2, 2), **{f"mindpet_delta_{k}_x": kit.linear(2, 2) for k in kinds})
    for word, kind in zip((mode, extra), kinds):
        kit.slim.freeze_delta(net, word)
        assert trained(kit, net) == {f"mindpet_delta_{kind}_x.weight", f"mindpet_delta_{kind}_x.bias"}


def test_adapter_and_low_rank_adapter_do_not_mix(kit):
    net = kit.named(mindpet_delta_adapter=kit.linear(2, 2), mindpet_delta_low_rank_adapter=kit.linear(2, 2))
    kit.slim.freeze_delta(net, "adapter")
    assert trained(kit, net) == {"mindpet_delta_adapter.weight", "mindpet_delta_adapter.bias"}
    kit.slim.freeze_delta(net, "low_rank_adapter")
    assert trained(kit, net) == {"mindpet_delta_low_rank_adapter.weight", "mindpet_delta_low_rank_adapter.bias"}


def test_a_mode_with_nothing_to_train_is_an_error_and_changes_nothing(kit, net):
    before = trained(kit, net)
    with pytest.raises(ValueError, match=r"lora.*apply_delta"):
        kit.slim.freeze_delta(net, "LoRA")
    assert trained(kit, net) == before
    kit.slim.freeze_delta(net, "LoRA", strict=False)
    assert trained(kit, net) == set()


@pytest.mark.parametrize("mode", ["lara", "", 3, None, True])
def test_an_unknown_mode_is_a_value_error(kit, net, mode):
    with pytest.raises(ValueError, match="mode"):
        kit.slim.freeze_delta(net, mode)


def test_the_users_lists_come_after_the_mode(kit, net):
    report = kit.slim.freeze_delta(net, "bitfit", include=["embed"], exclude=["head", "embed.weight"])
    norm = "body.norm.bias" if kit.name == "torch" else "body.norm.beta"
    # embed.weight: both lists, so as the mode left it (frozen); embed.bias: frozen by the list.
    assert trained(kit, net) == {"body.dense.bias", norm, "head.weight", "head.bias"}
    assert report.left_alone == ("embed.weight",)


def test_config_file(kit, net, tmp_path):
    file = tmp_path / "freeze.yaml"
    file.write_text("freeze:\n  include: ['*']\n  exclude: ['head.*']\nother: 1\n")
    kit.slim.freeze_from_config(net, str(file))
    assert trained(kit, net) == {"head.weight", "head.bias"}  # both lists match the head; '*' froze the rest
    kit.slim.freeze_modules(net, exclude=["*"])
    file.write_text("freeze:\n  include: ['embed', 'body*']\n")
    kit.slim.freeze_from_config(net, file)
    assert trained(kit, net) == {"head.weight", "head.bias"}
    file.write_text("freeze: {exclude: [body]}")
    report = kit.slim.freeze_from_config(net, str(file))
    assert "body.dense.weight" in report.trained


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ModelConfigFreezeInfoError),
        ("- 1\n", ModelConfigFreezeInfoError),
        ("other: 1\n", ModelConfigFreezeInfoError),
        ("freeze:\n", ModelConfigFreezeInfoError),
        ("freeze: [a]\n", ModelConfigFreezeInfoError),
        ("freeze: {}\n", ModelConfigFreezeInfoError),
        ("freeze: {inclued: ['*']}\n", ModelConfigFreezeInfoError),
        ("freeze: {include: , exclude: }\n", ValueError),
        ("freeze: {include: [], exclude: []}\n", ValueError),
        ("freeze: {include: []}\n", TypeError),
        ("freeze: {include: head}\n", TypeError),
        ("freeze: {include: [1]}\n", TypeError),
        ("freeze: {include: ['*'], exclude: []}\n", TypeError),
        ("freeze: [unclosed\n", ReadYamlFileError),
        ("freeze: !!python/object/apply:os.system [true]\n", ReadYamlFileError),
        ("freeze: {include: ['nothing']}\n", PatternError),
    ],
)
def test_config_errors(kit, net, tmp_path, text, error):
    before = trained(kit, net)
    file = tmp_path / "freeze.yaml"
    file.write_text(text)
    with pytest.raises(error):
        kit.slim.freeze_from_config(net, str(file))
    assert trained(kit, net) == before


def test_config_path_errors(kit, net, tmp_path):
    real = tmp_path / "real.yaml"
    real.write_text("freeze: {include: ['*']}")
    link = tmp_path / "link.yaml"
    link.symlink_to(real)
    for bad in (tmp_path / "missing.yaml", link, tmp_path):
        with pytest.raises(ReadYamlFileError):
            kit.slim.freeze_from_config(net, str(bad))
    for bad in (3, None, ["a"]):
        with pytest.raises(TypeError, match="config_path"):
            kit.slim.freeze_from_config(net, bad)
    with pytest.raises(ValueError, match="config_path"):
        kit.slim.freeze_from_config(net, "")


def test_summary_says_what_trains(kit, net):
    kit.slim.freeze_modules(net, include=["*"], exclude=None)
    report = kit.slim.freeze_modules(net, exclude=["head"])
    assert (report.trainable_count, report.total) == (10, 58)
    assert "10 of 58 parameters train (17.2414%), in 2 tensors" in str(report)
    assert "head.weight" in str(kit.slim.trainable_summary(net))


def test_running_statistics_never_train(kit):
    net = kit.named(norm=kit.batch_norm(3))
    kit.slim.freeze_modules(net, include=["*"])
    report = kit.slim.freeze_modules(net, exclude=["*"])
    assert len(trained(kit, net)) == 2
    assert all("moving" in name for name in report.cannot_train)


@pytest.fixture
def grouped(kit):
    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.input = kit.linear(4, 4)
            self.block = kit.sequential(
                kit.conv(4, 4, 1), kit.batch_norm(4), kit.sequential(kit.conv(4, 4, 1), kit.batch_norm(4), kit.relu())
            )
            self.output = kit.linear(4, 2)

    return Net()


def test_freezer_finds_groups_and_flat_layers(kit, grouped):
    freezer = kit.slim.ModelFreezer(grouped)
    groups, layers = freezer.get_layer_groups(), freezer.get_layers()
    assert [g.module for g in groups] == [grouped.input, grouped.block, grouped.output]
    assert [g.layer_group_idx for g in groups] == [(0, -3), (1, -2), (2, -1)]
    assert [type(layer.module).__name__[:4] for layer in layers] == [
        type(grouped.input).__name__[:4], "Conv", "Batc", "Conv", "Batc", "ReLU", type(grouped.input).__name__[:4]
    ]  # fmt: skip
    assert [layer.layer_group_idx[0] for layer in layers] == [0, 1, 1, 1, 1, 1, 2]


def test_freezer_freezes_all_but_the_last_group_and_spares_batch_norms(kit, grouped):
    freezer = kit.slim.ModelFreezer(grouped)
    every = len(freezer.get_trainable_parameters())
    changed = freezer.freeze()
    assert {i: len(group["params"]) for i, group in changed.items()} == {0: 2, 1: 4}
    assert len(freezer.get_trainable_parameters()) == every - 6
    assert [layer.is_frozen for layer in freezer.get_layers()][:5] == [True, True, False, True, False]
    back = freezer.unfreeze()
    assert {i: len(group["params"]) for i, group in back.items()} == {0: 2, 1: 4}
    assert len(freezer.get_trainable_parameters()) == every
    assert freezer.unfreeze() == {}


def test_freezer_takes_batch_norms_when_asked(kit, grouped):
    freezer = kit.slim.ModelFreezer(grouped, freeze_batch_norms=True)
    freezer.freeze(1, 1)
    assert [g.is_frozen for g in freezer.get_layer_groups()] == [False, True, False]
    # The ReLU has no parameters, so it counts as frozen only in eval mode.
    assert [layer.is_frozen for layer in freezer.get_layers()][1:5] == [True] * 4


def test_freezer_flags_set_modes(kit, grouped):
    (grouped.train if kit.name == "torch" else grouped.set_train)(True)
    freezer = kit.slim.ModelFreezer(grouped)
    freezer.freeze()
    assert all(layer.module.training for layer in freezer.get_layers())
    freezer.unfreeze()
    freezer.freeze(set_modules_as_eval=True)
    modes = [layer.module.training for layer in freezer.get_layers()]
    assert modes == [False, False, True, False, True, False, True]  # batch norms keep theirs
    freezer.unfreeze(set_modules_as_training=False)
    assert [layer.module.training for layer in freezer.get_layers()] == modes
    freezer.unfreeze()
    assert all(layer.module.training for layer in freezer.get_layers())


def test_freezer_refuses_bad_arguments(kit, grouped):
    freezer = kit.slim.ModelFreezer(grouped)
    with pytest.raises(ValueError, match="from_index"):
        freezer.freeze(3)
    with pytest.raises(ValueError, match="to_index"):
        freezer.unfreeze(0, -4)
    with pytest.raises(TypeError, match="to_index"):
        freezer.freeze(0, True)
    with pytest.raises(TypeError, match="freeze_batch_norms"):
        kit.slim.ModelFreezer(grouped, freeze_batch_norms=1)
    with pytest.raises(ArgumentError, match="child"):
        kit.slim.ModelFreezer(kit.linear(2, 2))
