"""A delta trained in one framework opens in the other with equal outputs."""

import importlib.util

import numpy as np
import pytest

from tests import kits
from tests.both.test_delta_apply import KINDS, stir
from tests.both.test_delta_travel import build, out

BOTH = all(importlib.util.find_spec(name) for name in kits.KITS)
PAIRS = [("torch", "mindspore"), ("mindspore", "torch")] if BOTH else []


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_a_bundle_opens_in_the_other_framework(here, there, kind, options, tmp_path, rng):
    first, second = kits.make(here), kits.make(there)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    net, twin = build(first), build(second)
    first.slim.apply_delta(net, kind, ["*query", "*value"], also_train=["head", "*norm*"], **options)
    stir(first, net)
    stir(first, net, what="head", seed=2)
    stir(first, net, what="norm", seed=3)
    first.slim.save_delta(net, tmp_path / "d")
    report = second.slim.load_delta(twin, tmp_path / "d")
    assert report.notes == ()  # the fingerprint of the converted base is the same
    # The contract's 1e-5 for float32.
    np.testing.assert_allclose(out(second, twin, second.tensor(x)), out(first, net, first.tensor(x)), atol=1e-5)
    second.slim.save_delta(twin, tmp_path / "back")
    for name in ("manifest.json", "delta.safetensors"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
