"""Channels that may carry another scale: cells answer the same when all of them do."""

import numpy as np
import pytest

from slimkit.core.prune.moves import NONE
from slimkit.core.prune.scaling import scalable
from slimkit_ms.trace import trace
from slimkit_ms.turning import rescale
from tests import zoo_ms

# cell -> groups of readers
PLACES = {"bert": 3, "llama": 8, "vit": 7, "flat": 1, "residual": 0}


@pytest.mark.parametrize("name", PLACES)
def test_every_channel_that_may_be_scaled_changes_nothing(name):
    model, inputs = zoo_ms.build(name)
    model.set_train(False)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    told = model(inputs).asnumpy()
    found = scalable(trace(model, inputs))
    top = max((int(e.channels.max()) for e in found.writers), default=NONE)
    powers = np.random.default_rng(0).integers(-4, 5, top + 2)
    changes = [
        {e.path: (e.axis, sign * np.where(e.channels == NONE, 0, powers[e.channels])) for e in ends}
        for ends, sign in ((found.writers, -1), (found.readers, 1))
    ]
    undo = rescale(model, *changes)
    np.testing.assert_allclose(model(inputs).asnumpy(), told, rtol=1e-5, atol=1e-5 * np.abs(told).max())
    assert len(found.places()) == PLACES[name]
    undo()
    assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in model.get_parameters())
