"""Repair of a chain of blocks: what it costs, what it gives, and that both frameworks give the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests import kits
from tests.both.test_sparse import residual_chain
from tests.conftest import INSTALLED


def data(kit):
    return [kit.tensor(np.random.default_rng(k).standard_normal((4, 6, 16)).astype(np.float32)) for k in range(3)]


def pruned(kit, compensate=True, norm_last=False):
    model = residual_chain(kit, norm_last)
    dense = copy.deepcopy(model)
    pruner = kit.room("prune").Pruner(model, data(kit)[0]).set_alignment(1)
    pruner.set_importance_evaluation_function("l2").set_compensation(data(kit) if compensate else None)
    pruner.prune(0.7, ["*.down"])
    return dense, model, pruner.report()


@pytest.mark.parametrize("norm_last", [False, True])
def test_every_kit_repairs_to_the_same_weights(norm_last):
    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        _, model, report = pruned(kit, norm_last=norm_last)
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


def test_what_a_norm_at_the_end_of_a_block_is_given_makes_up_for_the_stream(kit, monkeypatch):
    errors = []
    for norms in (True, False):
        if not norms:
            monkeypatch.setattr(kit.room("compensate").ChainPair, "norms", lambda *_: [])
        dense, model, _ = pruned(kit, norm_last=True)
        # On the data of the repair: what its least squares are of.
        errors.append(sum(float(np.square(kit.array(model(x)) - kit.array(dense(x))).mean()) for x in data(kit)))
    assert errors[0] < 0.97 * errors[1]  # both are exact: .957


def chain_with_layers_between(kit):
    """Blocks of one list, and between two of them a layer in none."""
    blocks = residual_chain(kit).blocks

    class Between(kit.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks
            self.wide, self.act, self.narrow = kit.linear(16, 24), kit.relu(), kit.linear(24, 16)

        def forward(self, x):
            x = self.blocks[1](self.blocks[0](x))
            return self.blocks[2](self.narrow(self.act(self.wide(x))))

        construct = forward

    return kit.fill(Between())


def test_a_layer_between_two_blocks_is_repaired_too(kit):
    """It was passed over, and no word of it in the report."""
    model = chain_with_layers_between(kit)
    pruner = kit.room("prune").Pruner(model, data(kit)[0]).set_alignment(1)
    pruner.set_importance_evaluation_function("l2").set_compensation(data(kit)).prune(0.7, ["*.down", "narrow"])
    behind = ["blocks.0.down", "blocks.1.down", "narrow", "blocks.2.down"]
    # Where the layer between makes the blocks no chain, all layers are refitted.
    assert [path for path in pruner.report()["compensation"]["refitted"] if path in behind] == behind
