"""A delta trained in one framework opens in the other with equal outputs."""

import importlib.util

import numpy as np
import pytest

from tests import attention_twins as twins
from tests import kits
from tests.both.test_delta_apply import KINDS, stir
from tests.both.test_delta_front import FRONTS
from tests.both.test_delta_front import IDS as FRONT_IDS
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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_peft_adapter_opens_in_both_frameworks_and_goes_back(options, tmp_path, rng):
    peft = pytest.importorskip("peft")
    torch_kit = kits.make("torch")
    torch = torch_kit.torch
    x = rng.standard_normal((5, 6)).astype(np.float32)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["head"], **options)
    theirs = peft.get_peft_model(build(torch_kit), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32)) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    want = theirs(torch_kit.tensor(x)).detach().numpy()
    for name in kits.KITS if BOTH else ("torch",):
        kit = kits.make(name)
        net = build(kit)
        kit.slim.load_delta(net, tmp_path / "theirs")
        np.testing.assert_allclose(out(kit, net, kit.tensor(x)), want, atol=1e-5)  # the contract's float32 bound
        kit.slim.save_delta(net, tmp_path / name, format="peft")
        again = peft.PeftModel.from_pretrained(build(torch_kit), tmp_path / name).eval()
        np.testing.assert_allclose(again(torch_kit.tensor(x)).detach().numpy(), want, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), FRONTS, ids=FRONT_IDS)
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_a_prefix_or_prompt_opens_in_the_other_framework(here, there, kind, options, tmp_path):
    first, second = kits.make(here), kits.make(there)
    net, twin = twins.build(first), twins.build(second)
    given = {"inputs": twins.batch(first)} if kind == "prefix" else {}
    first.slim.apply_delta(net, kind, also_train=["head"], **options, **given)
    stir(first, net)
    first.slim.save_delta(net, tmp_path / "d")
    second.slim.load_delta(twin, tmp_path / "d")
    ours, theirs = first.array(net(*twins.batch(first))), second.array(twin(*twins.batch(second)))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)  # the contract's float32 bound


@pytest.mark.parametrize(("kind", "options"), [FRONTS[0], FRONTS[2]], ids=["prefix", "prompt"])
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_pefts_prefix_and_prompt_files_pass_between_the_frameworks(here, there, kind, options, tmp_path):
    first, second = kits.make(here), kits.make(there)
    net, twin = twins.build(first), twins.build(second)
    given = {"inputs": twins.batch(first), "positions": ["places"]} if kind == "prefix" else {}
    first.slim.apply_delta(net, kind, **options, **given)
    first.slim.save_delta(net, tmp_path / "d", format="peft")
    if kind == "prefix" and there == "torch":
        twin.dummy_inputs = dict(zip(("ids", "attention_mask"), twins.batch(second)))
    # PEFT's files know no other way: positions start behind the prefix.
    second.slim.load_delta(twin, tmp_path / "d", positions=["places"] if kind == "prefix" else None)
    ours, theirs = first.array(net(*twins.batch(first))), second.array(twin(*twins.batch(second)))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)  # the contract's float32 bound
