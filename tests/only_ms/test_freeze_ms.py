"""Freezing by the names that MindSpore's parameters carry themselves."""

import pytest

import slimkit_ms
from slimkit.core.errors import PatternError

from mindspore import nn


@pytest.fixture
def net():
    """Two layers of which the second carries names of its own."""
    net = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 2))
    net[1].weight.name, net[1].bias.name = "head.weight", "head.bias"
    return net


def trained(net):
    return [name for name, p in net.parameters_and_names() if p.requires_grad]


def test_a_pattern_matches_own_names_beside_the_paths_of_others(net):
    report = slimkit_ms.freeze_modules(net, include=["0.weight", "head.bias"])
    assert trained(net) == ["0.bias", "1.weight"]
    assert report.frozen == ("0.weight", "1.bias")
    report = slimkit_ms.freeze_modules(net, include=["*d.weight", "0.*"], exclude=["1"])
    assert report.left_alone == ("1.weight",)
    assert trained(net) == ["1.weight", "1.bias"]


def test_own_names_count_where_every_pattern_finds_a_path(net):
    net[1].bias.name = "0.other"
    report = slimkit_ms.freeze_modules(net, include=["0.*"])
    assert report.frozen == ("0.weight", "0.bias", "1.bias")
    assert trained(net) == ["1.weight"]


def test_a_pattern_that_matches_no_name_changes_nothing(net):
    with pytest.raises(PatternError, match=r"'hed\.bias'.*head\.bias"):
        slimkit_ms.freeze_modules(net, include=["*", "hed.bias"])
    assert len(trained(net)) == 4


def test_a_mode_finds_own_names(net):
    net[1].weight.name = "mindpet_delta_lora_a"
    slimkit_ms.freeze_delta(net, "lora")
    assert trained(net) == ["1.weight"]


def test_a_list_finds_the_own_name_of_what_a_mode_found_by_its_path(net):
    net[1].weight.name, net[1].bias.name = "1.weight", "0.shift"
    report = slimkit_ms.freeze_delta(net, "bitfit", include=["0.*"])
    assert trained(net) == []
    assert report.frozen == ("0.weight", "0.bias", "1.weight", "1.bias")
