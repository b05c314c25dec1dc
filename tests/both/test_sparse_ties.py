"""Masks that rounding does not decide: ties go by place, and what is promised beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths.par import PAR, PAR_V2, refine
from slimkit.core.sparse.maths.pattern import NM
from tests import kits
from tests.conftest import INSTALLED

HALF = 32


def twins(seed):
    """A weight on a coarse grid whose columns and inputs come in equal pairs: every score ties with another."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, HALF)) @ (0.3 * rng.standard_normal((HALF, HALF)) + np.eye(HALF))
    w = rng.integers(-7, 8, (24, HALF)) * 0.1
    return np.concatenate([x, x], 1).astype(np.float32), np.tile(w, (2, 2)).astype(np.float32)


@pytest.mark.parametrize("nm", [None, NM(2, 4)])
@pytest.mark.parametrize("schedule", [PAR, PAR_V2], ids=["par", "par_v2"])
def test_ties_go_by_place_whatever_the_order_of_sums_the_scale_or_the_library(schedule, nm):
    for seed in range(3):
        x, w = twins(seed)
        found = []
        for inputs in (x, x[::-1], (x * (1 + 2e-7)).astype(np.float32)):
            rows = inputs.astype(np.float64)
            gram = rows.T @ rows / len(rows)
            found.append(refine(w.astype(np.float64), gram, [0.5], nm, None, len(rows), schedule)[1])
        if "torch" in INSTALLED:
            import torch

            rows = torch.from_numpy(x).double()
            target = torch.from_numpy(w).double()
            found.append(refine(target, rows.T @ rows / len(rows), [0.5], nm, None, len(rows), schedule)[1].numpy())
        for mask in found[1:]:
            np.testing.assert_array_equal(mask, found[0])


@pytest.mark.parametrize("method", ["wanda", "hessian", "par", "par_v2"])
def test_layers_of_up_to_256_inputs_get_one_mask_in_every_framework_and_scale(method):
    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        for scale in (1.0, 1 + 2e-7):
            model = kit.fill(kit.named(first=kit.linear(48, 96), act=kit.relu(), last=kit.linear(96, 24)))
            rng = np.random.default_rng(5)
            mix = rng.standard_normal((12, 48))
            rows = [rng.standard_normal((64, 12)) @ mix + 0.3 * rng.standard_normal((64, 48)) for _ in range(4)]
            data = [kit.tensor((r.astype(np.float32) * scale).astype(np.float32)) for r in rows]
            kit.slim.Compressor(model, SparseConfig(method=method)).compress(data)
            found.append({n: v == 0 for n, v in kit.values(model).items() if v.ndim > 1})
    for masks in found[1:]:
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask, found[0][name])


@pytest.mark.parametrize(("method", "least"), [("hessian", 0.99), ("par", 0.999), ("par_v2", 0.97)])
def test_wider_layers_agree_but_for_what_float32_decides(method, least):
    """320 columns, 512 rows: their sums and searches are float32; the bounds leave several times what was seen."""
    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        model = kit.fill(kit.named(only=kit.linear(320, 40)))
        rng = np.random.default_rng(5)
        mix = rng.standard_normal((80, 320))
        rows = [rng.standard_normal((128, 80)) @ mix + 0.3 * rng.standard_normal((128, 320)) for _ in range(4)]
        data = [kit.tensor(r.astype(np.float32)) for r in rows]
        kit.slim.Compressor(model, SparseConfig(method=method)).compress(data)
        found.append(kit.values(model)["only.weight"] == 0)
    for mask in found[1:]:
        assert (mask == found[0]).mean() >= least
