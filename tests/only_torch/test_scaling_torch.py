"""Channels that may carry another scale: models of many families answer the same when all of them do."""

import copy

import numpy as np
import pytest

from slimkit.core.prune.moves import NONE
from slimkit.core.prune.scaling import scalable
from slimkit.trace import trace
from slimkit.turning import rescale
from tests.zoo import language

import torch

pytest.importorskip("transformers")

# family -> groups of readers in its two blocks and head: norms, values and inner widths as far as each has them
PLACES = {
    "bert": 3, "gpt2": 6, "opt": 8, "llama": 9, "qwen2": 8, "phi3": 9, "gemma": 4, "t5": 21, "mixtral": 5, "bloom": 6,
    "qwen2moe": 7, "deepseek3": 12, "mamba": 4, "swin": 10, "whisper": 17, "levit": 0,
}  # fmt: skip


def scaled(model, inputs, seed=0):
    """The model with every scalable channel at a scale of its own, and how many groups of readers there are."""
    found = scalable(trace(model, [inputs]).graph)
    top = max((int(e.channels.max()) for e in found.writers), default=NONE)
    powers = np.random.default_rng(seed).integers(-4, 5, top + 2)
    changes = [
        {e.path: (e.axis, sign * np.where(e.channels == NONE, 0, powers[e.channels])) for e in ends}
        for ends, sign in ((found.writers, -1), (found.readers, 1))
    ]
    return rescale(model, *changes), len(found.places()), int(sum(np.any(p) for c in changes for _, p in c.values()))


@pytest.mark.parametrize("name", PLACES)
def test_every_channel_that_may_be_scaled_changes_nothing(name):
    model, inputs = language.build(name)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        told = model(**inputs)[0]
        undo, places, moved = scaled(model, inputs)
        after = model(**inputs)[0]
        # Powers of two leave the same products and sums; kernels may still add them up otherwise.
        torch.testing.assert_close(after, told, rtol=1e-5, atol=1e-5 * float(told.abs().max()))
        assert places == PLACES[name]
        assert moved >= 2 * places
        undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
