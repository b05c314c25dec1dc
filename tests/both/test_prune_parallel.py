"""Numbers that devices divide among themselves, and forms that a framework cannot promise, in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, UnsupportedError


def pruner(kit):
    net = kit.fill(
        kit.named(a=kit.linear(6, 36), b=kit.relu(), c=kit.linear(36, 24), d=kit.relu(), e=kit.linear(24, 3))
    )
    return net, kit.room("prune").Pruner(net, kit.tensor(np.ones((2, 6), np.float32))).set_alignment(1)


def test_widths_divide_among_devices(kit):
    net, job = pruner(kit)
    desc = job.set_parallel(5).prune(0.6, [])
    kept = [len(v["keep"]) for v in desc["variables"].values()]
    assert len(kept) == 2
    assert all(number % 5 == 0 for number in kept)
    assert desc["made"]["parallel"] == 5
    assert tuple(net(kit.tensor(np.ones((2, 6), np.float32))).shape) == (2, 3)


def test_more_devices_than_channels_are_refused_by_the_layer(kit):
    with pytest.raises(ArgumentError, match="at most 24: c has no more channels"):
        pruner(kit)[1].set_parallel(30).analysis(0.6, [])


def test_a_form_needs_a_configuration(kit):
    _, job = pruner(kit)
    with pytest.raises(UnsupportedError, match=r"no configuration of Hugging Face's. Only form 'any' is"):
        job.set_form("config").analysis(0.6)
    assert job.set_form("any").analysis(0.6)[1]["made"]["form"] == "any"
