"""Torch alone: what training over a held base keeps, copies of it, other types of input, and other forwards."""

import copy
import pickle

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError

import torch


def build(width=64, layers=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


@pytest.mark.parametrize("held", ["int8", "bfloat16"])
def test_nothing_as_large_as_a_weight_is_kept_for_the_way_back(held):
    net = build()
    slimkit.apply_delta(net, "lora", rank=2, base_dtype=held)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.randn(4, 64)).sum().backward()
    wide = [t for t in kept if t.numel() >= 64 * 64 and t.dtype == torch.float32]
    assert not wide
    assert sum(p.nbytes for n, p in net.named_parameters() if n.endswith("weight_held")) == 3 * 64 * 64 * (
        1 if held == "int8" else 2
    )


def test_copies_and_pickles_hold_it_too():
    net, x = build(8), torch.randn(2, 8)
    slimkit.apply_delta(net, "lora", rank=2, base_dtype="int8")
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), net(x))
        slimkit.remove_delta(again)
        assert type(again[0]) is torch.nn.Linear
    other = build(8)
    slimkit.apply_delta(other, "lora", rank=2, base_dtype="int8")
    with torch.no_grad():
        other[0].weight_scale.zero_()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net, x = build(8).to(dtype), torch.randn(2, 8, dtype=dtype)
    want = net(x)
    slimkit.apply_delta(net, "lora", rank=2, base_dtype="int8")
    assert net(x).dtype == dtype
    torch.testing.assert_close(net(x), want, rtol=0.1, atol=0.1)  # three layers of int8
    slimkit.merge_delta(net, unload=True)
    assert net[0].weight.dtype == dtype


@pytest.mark.parametrize("held", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moved_to_another_type_what_is_held_stays_and_the_weight_comes_back_in_it(held, dtype):
    net = build(8)
    slimkit.apply_delta(net, "lora", rank=2, base_dtype=held)
    before = {n: t.clone() for n, t in net.state_dict().items() if n.endswith(("weight_held", "weight_scale"))}
    net.to(dtype)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value)
        assert net.state_dict()[name].dtype == value.dtype
    x = torch.randn(2, 8, dtype=dtype)
    y = net(x)
    slimkit.merge_delta(net)
    torch.testing.assert_close(net(x), y, rtol=0.05, atol=0.05)  # three layers of bfloat16
    slimkit.unmerge_delta(net)
    assert torch.equal(net(x), y)
    slimkit.remove_delta(net)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert {p.requires_grad for p in net.parameters()} == {True}


def test_compiled_and_under_autocast():
    net, x = build(8), torch.randn(2, 8)
    slimkit.apply_delta(net, "lora", rank=2, base_dtype="int8")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x).float(), net(x).float())
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_a_forward_of_its_own_is_refused():
    net = build(8)
    plain = net[1].forward
    net[1].forward = lambda x: plain(x)
    with pytest.raises(UnsupportedError, match="forward of its class; 1 is otherwise"):
        slimkit.apply_delta(net, "lora", rank=2, base_dtype="int8")
    assert type(net[0]) is torch.nn.Linear
