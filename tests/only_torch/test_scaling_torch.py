"""Channels that may carry another scale: models of many families answer the same bits' worth when all of them do."""

import copy

import numpy as np
import pytest

from slimkit.core.prune.scaling import NONE, scalable

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from slimkit.trace import trace
from slimkit.turning import rescale
from tests.zoo import language

# family -> groups of readers in its two blocks and head: norms, values and inner widths as far as each has them
PLACES = {
    "llama": 9, "qwen2": 8, "qwen3": 9, "phi3": 9, "gemma": 4, "mixtral": 5, "opt": 8, "gpt2": 7, "bert": 2, "phi": 5,
    "bart": 6, "t5": 9, "falcon": 3, "neox": 5, "deepseek3": None, "whisper": None, "vit": None,
}  # fmt: skip


def scaled(model, inputs, seed=0):
    """The model with every scalable channel at a scale of its own, and how many groups of readers there are."""
    found = scalable(trace(model, [inputs]).graph)
    top = max((int(e.channels.max()) for e in found.writers), default=NONE)
    powers = np.random.default_rng(seed).integers(-4, 5, top + 1)
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
        assert moved > 0
        if PLACES[name] is not None:
            assert places == PLACES[name]
        undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
