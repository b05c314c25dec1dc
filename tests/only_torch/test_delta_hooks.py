"""What hangs on a torch layer stays on it under a delta: hooks of libraries, patches, computed weights, torch.func."""

import copy
import pickle

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError

import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

IDS = torch.tensor([[1, 2, 0], [3, 1, 2]])


def layer(kind):
    """A layer, an input, and the layer's class."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(6, 8), torch.randn(3, 6)
    if kind == "conv1d":
        made = Conv1D(8, 6)
        nn.init.normal_(made.weight)
        return made, torch.randn(3, 6)
    if kind == "embedding":
        return nn.Embedding(5, 8), IDS
    if kind == "conv_reflect":
        return nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="reflect"), torch.randn(2, 3, 6, 6)
    return nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), torch.randn(2, 3, 6, 6)


KINDS = ["linear", "conv1d", "embedding", "conv2d", "conv_reflect"]


def stir(model, scale=0.3):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "mindpet_delta" in name:
            nn.init.normal_(parameter, std=scale)


def with_lora(kind, **options):
    """What LoRA on the bare layer gives: the layer in a model, its input, and its output."""
    made, x = layer(kind)
    model = nn.Sequential(made)
    slimkit.apply_delta(model, "lora", ["0"], rank=2, **options)
    stir(model)
    return model, x, model(x).detach()


def double(module):
    """Patch a module's forward as libraries do."""
    before = module.forward
    module.forward = lambda *args: 2 * before(*args)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_was_patched_runs_with_the_delta_inside(kind):
    _, x, y = with_lora(kind)
    made, _ = layer(kind)
    model = nn.Sequential(made)
    plain = made(x)
    double(made)
    patched = made.forward
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    torch.testing.assert_close(model(x), 2 * plain)
    stir(model)
    torch.testing.assert_close(model(x), 2 * y)
    model(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "mindpet" in n)
    with slimkit.disable_delta(model):
        torch.testing.assert_close(model(x), 2 * plain)
    slimkit.merge_delta(model)
    torch.testing.assert_close(model(x), 2 * y, rtol=1e-4, atol=1e-5)
    slimkit.remove_delta(model)
    assert made.forward is patched
    torch.testing.assert_close(model(x), 2 * plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_over_a_delta_survives_the_delta(kind):
    model, x, y = with_lora(kind)
    double(model[0])
    torch.testing.assert_close(model(x), 2 * y)
    slimkit.remove_delta(model)
    made, _ = layer(kind)
    torch.testing.assert_close(model(x), 2 * made(x))


def test_a_patched_adapter_comes_after_the_patch():
    made, x = layer("linear")
    model = nn.Sequential(made)
    slimkit.apply_delta(model, "adapter", ["0"], bottleneck_size=2)
    stir(model)
    adapter = model[0].adapter
    slimkit.remove_delta(model)
    double(made)
    slimkit.apply_delta(model, "adapter", ["0"], bottleneck_size=2)
    model[0].adapter.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(model(x), adapter(2 * layer("linear")[0](x)))


def test_a_patch_that_computes_something_else_is_an_error_when_it_runs():
    made, x = layer("linear")
    made.forward = lambda x: x @ made.weight.t()
    model = nn.Sequential(made)
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    with pytest.raises(UnsupportedError, match="does not use its weight"):
        model(x)
    slimkit.remove_delta(model)
    model(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate(kind, when):
    from accelerate import hooks

    _, x, y = with_lora(kind)
    made, _ = layer(kind)
    model = nn.Sequential(made)
    if when == "before":
        hooks.add_hook_to_module(made, hooks.ModelHook())
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    stir(model)
    if when == "after":
        hooks.add_hook_to_module(made, hooks.ModelHook())
    torch.testing.assert_close(model(x), y)
    assert isinstance(made._hf_hook, hooks.ModelHook)
    hooks.remove_hook_from_module(made)
    torch.testing.assert_close(model(x), y)
    slimkit.remove_delta(model)
    torch.testing.assert_close(model(x), layer(kind)[0](x))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_accelerate_brings_for_each_call(kind):
    import accelerate

    _, x, y = with_lora(kind)
    made, _ = layer(kind)
    model = nn.Sequential(made)
    accelerate.cpu_offload(model, torch.device("cpu"))
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    stir(model)
    torch.testing.assert_close(model(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert made.weight.is_meta
    with pytest.raises(UnsupportedError, match="not in memory"):
        slimkit.merge_delta(model)
    if kind == "linear":
        with pytest.raises(UnsupportedError, match="not in memory"):
            slimkit.apply_delta(model, "lora", ["0"], rank=2, name="two", init="pissa")
    torch.testing.assert_close(model(x), y)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "hooked_weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda made: torch.nn.utils.prune.l1_unstructured(made, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_weights_that_are_computed(how):
    made, x = layer("linear")
    COMPUTED[how](made)
    made.eval()
    model, before = nn.Sequential(made), [n for n, _ in made.named_parameters()]
    values, plain = copy.deepcopy(made.state_dict()), made(x)
    report = slimkit.apply_delta(model, "lora", ["0"], rank=2)
    assert report.layers["0"]["keep_zeros"] is (how == "pruned")
    assert [n for n, _ in made.named_parameters() if "mindpet" not in n] == before
    torch.testing.assert_close(model(x), plain)
    stir(model)
    for _ in range(2):  # the weight is computed anew for each
        model(x).sum().backward()
    y = model(x)
    assert (y - plain).abs().max() > 1e-2
    if how in ("hooked_weight_norm", "spectral_norm"):
        with pytest.raises(UnsupportedError, match=r"computed from|parametrised"):
            slimkit.merge_delta(model)
    else:
        slimkit.merge_delta(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        if how == "pruned":
            assert (made.weight == 0).float().mean() == 0.5
        slimkit.unmerge_delta(model)
    torch.testing.assert_close(model(x), y)
    slimkit.remove_delta(model)
    model(x)
    for name, value in made.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_parametrisations_go_on_and_off_over_a_delta():
    model, x, y = with_lora("linear")
    made = model[0]
    parametrizations.weight_norm(made)
    torch.testing.assert_close(model(x), y)
    slimkit.remove_delta(model)
    torch.testing.assert_close(model(x), layer("linear")[0](x))
    assert parametrize.is_parametrized(made, "weight")
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    stir(model)
    parametrize.remove_parametrizations(made, "weight")
    torch.testing.assert_close(model(x), y)
    slimkit.remove_delta(model)
    assert type(made) is nn.Linear


def test_a_layer_with_a_delta_is_pickled_and_state_hooks_stay():
    model, x, y = with_lora("linear")
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), y)
    made, _ = layer("linear")
    made.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({prefix + "noted": 1}))
    model = nn.Sequential(made)
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    assert model.state_dict()["0.noted"] == 1


def test_untying_and_assigning_reach_the_layer():
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["table"].weight
    x = torch.randn(3, 4)
    slimkit.apply_delta(model, "lora", ["head"], rank=2)
    stir(model)
    y = model["head"](x)
    with pytest.raises(UnsupportedError, match="untie"):
        slimkit.merge_delta(model, unload=True)
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    slimkit.merge_delta(model, unload=True)
    torch.testing.assert_close(model["head"](x), y)


def test_a_copy_in_another_dtype_keeps_it():
    model, x, y = with_lora("linear")
    twin = copy.deepcopy(model).double()
    slimkit.merge_delta(twin, unload=True)
    assert twin[0].weight.dtype == torch.float64
    torch.testing.assert_close(twin(x.double()).float(), y)


def test_a_reference_run_between_forward_and_backward():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    slimkit.apply_delta(model, "lora", ["0"], rank=2, also_train=["1"])
    stir(model)
    nn.init.normal_(model[1].weight)
    model(x).sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model(x).sum()
    with slimkit.disable_delta(model), torch.no_grad():
        model(x)  # the base's answer, as preference losses ask for it
    loss.backward()
    for grad, p in zip(want, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(p.grad, grad)


FUNC = [
    ("linear", "lora", {"rank": 2}),
    ("linear", "lora", {"rank": 2, "dora": True}),
    ("linear", "lora", {"rank": 2, "init": "pissa"}),
    ("linear", "lora", {"rank": 2, "keep_zeros": True}),
    ("linear", "adapter", {"bottleneck_size": 2}),
    ("linear", "low_rank_adapter", {"reduction_factor": 2}),
    ("conv1d", "lora", {"rank": 2}),
    ("conv1d", "lora", {"rank": 2, "dora": True}),
    ("embedding", "lora", {"rank": 2}),
    ("conv2d", "lora", {"rank": 2}),
]


@pytest.mark.parametrize(("place", "kind", "options"), FUNC)
def test_torch_func_goes_through(place, kind, options):
    made, x = layer(place)
    model = nn.Sequential(made)
    slimkit.apply_delta(model, kind, ["0"], **options)
    stir(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(delta, x):
        return torch.func.functional_call(model, {**rest, **delta}, (x,)).square().sum()

    model(x).square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    got = torch.func.grad(loss)(trained, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x.unsqueeze(1))  # a gradient for each sample
    move = {n: torch.randn_like(p) for n, p in trained.items()}
    _, along = torch.func.jvp(lambda delta: loss(delta, x), (trained,), (move,))
    two = torch.func.vmap(loss, (0, None))({n: torch.stack((p, p + 1)) for n, p in trained.items()}, x)
    torch.testing.assert_close(along, sum((got[n] * move[n]).sum() for n in got), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(two[0], loss(trained, x), rtol=1e-4, atol=1e-4)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-4)  # float32 sums in another order
        torch.testing.assert_close(each[name].sum(0), grad, rtol=1e-4, atol=1e-4)


def test_forward_mode_derivatives_and_hessians():
    model, x, _ = with_lora("linear")
    move = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, move))
        along = torch.autograd.forward_ad.unpack_dual(out).tangent
    slimkit.merge_delta(model)
    torch.testing.assert_close(along, F.linear(move, model[0].weight), rtol=1e-4, atol=1e-5)
    slimkit.unmerge_delta(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    hessian = torch.func.hessian(
        lambda p: torch.func.functional_call(model, {**params, "0.mindpet_delta_lora_a": p}, (x,)).square().sum()
    )
    assert hessian(params["0.mindpet_delta_lora_a"]).abs().max() > 0


def test_compiling_a_layer_with_a_patched_forward():
    made, x = layer("linear")
    double(made)
    model = nn.Sequential(made)
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    stir(model)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
