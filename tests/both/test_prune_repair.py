"""Repair of a chain of blocks: what it costs, what it gives, and that both frameworks give the same."""

from __future__ import annotations

import copy

import numpy as np

from tests import kits
from tests.both.test_sparse import residual_chain
from tests.conftest import INSTALLED


def data(kit):
    return [kit.tensor(np.random.default_rng(k).standard_normal((4, 6, 16)).astype(np.float32)) for k in range(3)]


def pruned(kit, compensate=True):
    model = residual_chain(kit)
    dense = copy.deepcopy(model)
    pruner = kit.room("prune").Pruner(model, data(kit)[0]).set_alignment(1)
    pruner.set_importance_evaluation_function("l2").set_compensation(data(kit) if compensate else None)
    pruner.prune(0.7, ["*.down"])
    return dense, model, pruner.report()


def test_every_kit_repairs_to_the_same_weights():
    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        _, model, report = pruned(kit)
        assert list(report["compensation"]["refitted"]) == [f"blocks.{k}.down" for k in range(3)]
        found.append([kit.array(model.blocks[k].down.weight) for k in range(3)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)  # float32 sums of 72 rows, solved


def test_the_last_layer_of_a_block_makes_up_for_the_stream(kit):
    """What is left of the error after the last block is below what layers fitted each to its own output would leave."""
    x = kit.tensor(np.random.default_rng(9).standard_normal((16, 6, 16)).astype(np.float32))
    errors = []
    for compensate in (False, True):
        dense, model, _ = pruned(kit, compensate)
        errors.append(float(np.square(kit.array(model(x)) - kit.array(dense(x))).mean()))
    assert errors[1] < 0.5 * errors[0]
