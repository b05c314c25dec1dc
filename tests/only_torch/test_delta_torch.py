"""Deltas under torch's own machinery: the fused step, compile, checkpointing, half precision, several processes."""

import copy
import os
import socket

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError
from slimkit.delta.fused import _LoraLinear, lora_linear, lora_linear_plain

import torch
from torch import nn
from torch.nn import functional as F


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def put_lora(model, dropout=0.0):
    torch.manual_seed(1)
    slimkit.apply_delta(model, "lora", rank=2, dropout=dropout)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def net(dropout=0.0):
    return put_lora(plain_net(), dropout)


X = torch.linspace(-1, 1, 30).reshape(5, 6)


def grads(model, x=X):
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_step_has_the_right_derivatives(bias):
    inputs = (draw(2, 3, 5), draw(4, 5), draw(4) if bias else None, draw(2, 5), draw(4, 2), 1.5)
    assert torch.autograd.gradcheck(_LoraLinear.apply, inputs)
    assert torch.autograd.gradgradcheck(_LoraLinear.apply, inputs)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_the_fused_step_equals_three_linear_calls(shape):
    x, weight, bias, a, b = draw(*shape), draw(4, 5), draw(4), draw(2, 5), draw(4, 2)
    fused, plain = lora_linear(x, weight, bias, a, b, 0.7), lora_linear_plain(x, weight, bias, a, b, 0.7)
    torch.testing.assert_close(fused, plain)
    for one, other in zip(
        torch.autograd.grad(fused.sum(), (x, weight, bias, a, b)),
        torch.autograd.grad(plain.sum(), (x, weight, bias, a, b)),
    ):
        torch.testing.assert_close(one, other)


def test_the_fused_step_takes_inputs_that_are_not_contiguous():
    x, weight, a, b = draw(5, 3, 2).transpose(0, 2), draw(4, 5), draw(2, 5), draw(4, 2)
    torch.testing.assert_close(lora_linear(x, weight, None, a, b, 1.0), lora_linear_plain(x, weight, None, a, b, 1.0))


def test_the_input_of_a_frozen_first_layer_gets_no_gradient_work():
    model = net()
    x = X.clone()
    grads(model, x)
    assert x.grad is None
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)


def test_dropout_acts_in_training_only():
    model = net(dropout=0.5)
    model.train()
    torch.manual_seed(0)
    first, second = model(X), model(X)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(X), model(X))


def test_compile_computes_the_same_and_notices_switching():
    model = net().eval()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    want = grads(model)
    model.zero_grad()
    compiled(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name])
    slimkit.merge_delta(model)
    torch.testing.assert_close(compiled(X), model(X))
    slimkit.unmerge_delta(model)
    with slimkit.disable_delta(model):
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint_sequential

    model = net()
    want = grads(model)
    model.zero_grad()
    checkpoint_sequential(model, 2, X.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name])


def test_float32_delta_over_a_half_precision_base_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(torch.bfloat16)
    slimkit.apply_delta(model, "lora", rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    target = torch.linspace(-1, 1, 10).reshape(5, 2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X.bfloat16()).float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["adapter", "low_rank_adapter"])
def test_adapters_over_a_half_precision_base(kind):
    model = nn.Sequential(nn.Linear(6, 8)).to(torch.bfloat16)
    slimkit.apply_delta(model, kind, ["0"])
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_autocast_and_mixed_precision():
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(X), rtol=0.05, atol=0.05)  # bfloat16 keeps two digits
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_state_dict_goes_round():
    model = net()
    twin = net()
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))


def test_deepcopy_keeps_the_original_layers_apart():
    model = net()
    twin = copy.deepcopy(model)
    twin[0].weight.data.zero_()
    slimkit.remove_delta(twin)
    assert twin[0].weight.abs().sum() == 0
    slimkit.remove_delta(model)
    assert model[0].weight.abs().sum() > 0


def test_onnx_and_export_see_plain_operators(tmp_path):
    model = net().eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))


def test_functional_calls_and_vmap_see_through():
    model = net()
    params = {n: p.detach() for n, p in model.named_parameters()}
    with torch.no_grad():
        out = torch.func.vmap(lambda x: torch.func.functional_call(model, params, (x,)))(X.unsqueeze(1))
    torch.testing.assert_close(out.squeeze(1), model(X).detach())


def test_the_encoder_layers_fast_path_does_not_pass_the_delta_by():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 3, 8)
    slimkit.apply_delta(model, "lora", ["*linear1"], rank=2)
    nn.init.normal_(model.layers[0].linear1.mindpet_delta_lora_b)
    slow = model(x)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_layers_that_are_never_called_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(slimkit.UnsupportedError, match="MultiheadAttention"):
        slimkit.apply_delta(model, "lora", ["attention.out_proj"], rank=2)


def test_a_subclass_with_its_own_forward_is_not_taken_for_a_linear_layer():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4))
    with pytest.raises(slimkit.UnsupportedError, match="Scaled"):
        slimkit.apply_delta(model, "lora", ["0"], rank=2)


def test_merging_in_place_keeps_the_parameter_object():
    model = net()
    weight = model[0].weight
    slimkit.merge_delta(model, unload=True)
    assert model[0].weight is weight


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_group(rank, port, folder):
    """One of two gloo processes; all jobs in one start, which costs more than they do."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        result = {"shard": sharded(rank), "ddp": ddp(rank), "fsdp": fsdp(rank)}
        result |= {when: merged_under_fsdp(rank, when) for when in ("before", "after")}
    finally:
        torch.distributed.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


COLUMN = {"strategy_org_dense_matmul": ((1, 1), (2, 1)), "strategy_org_bias_add": ((1, 2), (2,)),
          "strategy_lora_b_matmul": ((1, 1), (2, 1))}  # fmt: skip
ROW = {"strategy_org_dense_matmul": ((1, 2), (1, 2)), "strategy_lora_a_matmul": ((1, 2), (1, 2))}
ADAPTER = {"strategy_matmul_org": ((1, 1), (2, 1)), "strategy_bias_org": ((1, 2), (2,)),
           "strategy_matmul_down_sampler": ((1, 1), (2, 1)), "strategy_bias_down_sampler": ((1, 2), (2,)),
           "strategy_matmul_up_sampler": ((1, 2), (1, 2))}  # fmt: skip
LOW_RANK = {"strategy_matmul_org": ((1, 1), (2, 1)), "strategy_matmul_up_sampler_weight": ((2, 1), (1, 1))}


def layers():
    torch.manual_seed(0)
    made = [
        (slimkit.LoRADense(6, 8, 2, 4, lora_b_init="normal", activation="tanh"), COLUMN),
        (slimkit.LoRADense(6, 8, 2, 4, lora_b_init="normal"), ROW),
        (slimkit.AdapterDense(6, 8, bottleneck_size=4), ADAPTER),
        (slimkit.LowRankAdapterDense(6, 8, reduction_factor=2), LOW_RANK),
    ]
    for layer, _ in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for layer, strategies in layers():
        plan = layer.shard(**strategies)
        plan.apply(mesh)
        out = layer(X)
        out.square().sum().backward()
        local = {n: tuple(p.to_local().shape) for n, p in layer.named_parameters()}
        found.append((out.detach(), {n: p.grad.full_tensor() for n, p in layer.named_parameters()}, local))
    return found


def ddp(rank):
    model = nn.parallel.DistributedDataParallel(net())
    half = X[:4][rank * 2 : rank * 2 + 2]
    model(half).square().sum().backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}


def fsdp(rank):
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    half = X[:4][rank * 2 : rank * 2 + 2]
    model(half).square().sum().backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def merged_under_fsdp(rank, when):
    """Outputs with the delta on and after it is merged for good, and the gradients of the plain model that is left."""
    from torch.distributed.fsdp import fully_shard

    model = plain_net()
    if when == "before":
        put_lora(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    if when == "after":
        model(X)  # some layers hold gathered copies now
        put_lora(model)
    half = X[:4][rank * 2 : rank * 2 + 2]
    model(half).square().sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    trained = {n: g.full_tensor() if isinstance(g, torch.distributed.tensor.DTensor) else g for n, g in trained.items()}
    model.zero_grad()
    with_delta = model(X).detach()
    slimkit.merge_delta(model)
    slimkit.unmerge_delta(model)
    slimkit.merge_delta(model, unload=True)
    merged = model(X).detach()
    model(X).square().sum().backward()
    return with_delta, merged, {n: p.grad.full_tensor() for n, p in model.named_parameters()}, trained


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(in_group, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_shard_plan_on_two_processes_equals_one(two):
    for results in two:
        found = results["shard"]
        for (layer, _), (out, its_grads, _local) in zip(layers(), found):
            torch.testing.assert_close(out, layer(X).detach(), rtol=1e-5, atol=1e-5)
            for name, grad in grads(layer).items():
                torch.testing.assert_close(its_grads[name], grad, rtol=1e-4, atol=1e-5)
        assert found[0][2]["weight"] == (4, 6)  # outputs cut in two
        assert found[0][2]["mindpet_delta_lora_b"] == (4, 2)
        assert found[1][2]["weight"] == (8, 3)  # inputs cut in two
        assert found[1][2]["mindpet_delta_lora_a"] == (2, 3)


@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_data_parallel_gradients_equal_the_single_process(two, job):
    want = grads(net(), X[:4])
    for results in two:
        assert results[job].keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(
                results[job][name], grad / 2, rtol=1e-4, atol=1e-5
            )  # both average over processes


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_delta_is_merged_for_good_under_fsdp(two, when):
    alone = net()
    want = alone(X).detach()
    slimkit.merge_delta(alone, unload=True)
    plain, half = grads(alone), grads(net(), X[:4])
    for results in two:
        with_delta, merged, found, trained = results[when]
        assert trained.keys() == half.keys()
        for name, grad in half.items():
            torch.testing.assert_close(trained[name], grad / 2, rtol=1e-4, atol=1e-5)  # averaged over two processes
        torch.testing.assert_close(with_delta, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged, want, rtol=1e-4, atol=1e-5)
        assert found.keys() == plain.keys()
        for name, grad in plain.items():  # both processes have the same batch, so the average is one's own
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_a_view_of_anothers_values_is_not_merged():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = torch.nn.Parameter(net[0].weight.data)  # as a tie is after accelerate's hooks were taken off
    slimkit.apply_delta(net, "lora", ["0"], rank=2)
    with pytest.raises(UnsupportedError, match="shared"):
        slimkit.merge_delta(net)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in ("linear", "conv2d") for options in ({}, {"dora": True}, {"dropout": 0.1})),
        *(("embedding", options) for options in ({}, {"dora": True})),
        ("heads", {}),
    ],
    ids=str,
)
def test_a_delta_held_in_float8_is_computed_in_a_wider_type(kind, options):
    torch.manual_seed(0)
    layer, x = {
        "linear": (nn.Linear(8, 8), torch.randn(3, 8)),
        "embedding": (nn.Embedding(8, 4), torch.arange(8)),
        "conv2d": (nn.Conv2d(2, 4, 3), torch.randn(1, 2, 5, 5)),
        "heads": (nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)),
    }[kind]
    net = nn.ModuleDict({"layer": layer}).eval()
    slimkit.apply_delta(net, "lora", ["layer"], rank=2, **options)
    wide = copy.deepcopy(net)
    for parameter, twin in zip(net.parameters(), wide.parameters()):
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape).to(torch.float8_e4m3fn)
            twin.data = parameter.data.float()
    call = (x, x, x) if kind == "heads" else (x,)
    got, want = net["layer"](*call), wide["layer"](*call)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)  # float32; plain calls here, one step there
    slimkit.merge_delta(net, unload=True)
    assert torch.allclose(net["layer"](*call)[0], got[0], atol=1e-4)
