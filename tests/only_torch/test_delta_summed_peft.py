"""MiSS and SHiRA between here and Hugging Face PEFT itself: the same numbers in both directions."""

import pytest

import slimkit
from tests.only_torch.test_delta_peft_base import llama, logits, there_and_back

import torch

peft = pytest.importorskip("peft")

CONFIGS = {
    "miss": {"r": 4},
    "miss, padded": {"r": 5, "miss_dropout": 0.1},
    "miss, mini": {"r": 4, "init_weights": "mini", "mini_r": 8},
    "miss, biases": {"r": 4, "bias": "MiSS_only"},
    "shira": {"r": 2, "random_seed": 1},
    "shira, a head": {"r": 2, "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*hooks.*")
@pytest.mark.parametrize("case", CONFIGS)
def test_both_ways(case, tmp_path):
    kind = peft.MissConfig if case.startswith("miss") else peft.ShiraConfig
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(llama(), kind(target_modules=targets, **CONFIGS[case]))
    ours, report = there_and_back(theirs, llama, tmp_path)
    want = logits(ours)
    assert {p.rpartition(".")[2] for p in report.layers} == set(targets)
    slimkit.merge_delta(ours, unload=True)
    torch.testing.assert_close(logits(ours), want, rtol=1e-5, atol=1e-5)


def test_a_start_of_magnitude_loads_into_peft(tmp_path):
    ours = llama()
    slimkit.apply_delta(ours, "shira", ["*q_proj"], rank=2, support="magnitude")
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    want = logits(ours)
    slimkit.save_delta(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["miss", "shira"])
def test_bases_of_other_types(kind, dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(dtype)
    x = torch.randn(3, 8, dtype=dtype)
    before = net(x)
    slimkit.apply_delta(net, kind, ["0"], rank=2)
    (trained,) = (p for p in net.parameters() if p.requires_grad)
    assert trained.dtype == torch.float32
    assert torch.equal(net(x), before)
    net(x).float().square().sum().backward()
    assert trained.grad.abs().sum() > 0
    trained.data += 1e-4
    assert net(x).dtype == dtype
    reached = net(x)
    slimkit.merge_delta(net)
    torch.testing.assert_close(net(x), reached, rtol=2e-2, atol=2e-2)  # bfloat16 keeps three digits


@pytest.mark.parametrize("kind", ["miss", "shira"])
def test_a_forward_put_on_the_layer(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    layer, x = net[0], torch.randn(3, 8)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2
    slimkit.apply_delta(net, kind, ["0"], rank=2)
    (trained,) = (p for p in net.parameters() if p.requires_grad)
    trained.data.fill_(0.5)
    reached = net(x)
    slimkit.merge_delta(net, unload=True)
    torch.testing.assert_close(net(x), reached)


def test_second_derivatives_and_functional_calls_pass_through_entries():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 6))
    slimkit.apply_delta(net, "shira", ["0"], rank=1)
    (name, values), x = next((n, p) for n, p in net.named_parameters() if p.requires_grad), torch.randn(2, 6)

    def loss(v):
        return torch.func.functional_call(net, {name: v}, (x,)).pow(3).sum()

    dense = torch.func.grad(loss)(values)
    net(x).pow(3).sum().backward()
    torch.testing.assert_close(values.grad, dense)
    (first,) = torch.autograd.grad(net(x).pow(3).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), values)
    (want,) = torch.autograd.grad(torch.func.grad(loss)(values).pow(2).sum(), values)
    torch.testing.assert_close(second, want)
