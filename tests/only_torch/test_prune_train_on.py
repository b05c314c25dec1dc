"""Train, prune, train: whatever the loop still holds, training goes on, and an optimizer's moments follow the cut."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest

from slimkit import PruneTorch, merge_desc, migrate_optimizer
from slimkit.core.errors import ArgumentError, GraphError, PlanError
from slimkit.core.prune.plan import PrunePlan
from slimkit.surgery import select

import torch
from torch import nn

X, Y = torch.randn(8, 3, 12, 12), torch.randint(0, 10, (8,))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model, steps=2, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return loss


def prune(model):
    return PruneTorch(model, X).set_alignment(8).prune(0.5, [-1])


def held_loss(model):
    return train(model)


def held_losses(model):
    return [train(model, 1), train(model, 1)]


def held_output(model):
    return model.eval()(X)


def held_retained_graph(model):
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward(retain_graph=True)
    return loss


def held_second_order(model):
    loss = nn.functional.cross_entropy(model(X), Y)
    return torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def held_accumulators(model):
    """What DistributedDataParallel does: it keeps every parameter's accumulator alive."""
    return [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]


def held_frozen(model):
    loss = train(model)
    for p in model[3].parameters():
        p.requires_grad_(False)
    return loss


HOLDERS = [
    held_loss,
    held_losses,
    held_output,
    held_retained_graph,
    held_second_order,
    held_accumulators,
    held_frozen,
]


@pytest.mark.parametrize("hold", HOLDERS)
def test_training_goes_on_whatever_the_loop_still_holds(hold):
    model, twin = network(), network()
    held = hold(model)
    hold(twin)
    desc = prune(model)
    for p in model.parameters():
        p.requires_grad_(True)
    assert held is not None
    # The same cut on a fresh object that no graph ever saw trains the same.
    fresh = network()
    fresh.load_state_dict(twin.state_dict())
    PruneTorch(fresh).prune_by_desc(desc)
    for p in (*model.parameters(), *fresh.parameters()):
        p.grad = None
    assert torch.equal(train(model), train(fresh))
    for mine, other in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_every_floating_type_gets_a_new_accumulator(dtype):
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)).to(dtype)
    x = torch.ones(2, 4, dtype=dtype)
    held = model(x).abs().sum()
    plain = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    _, desc = PruneTorch(plain, torch.ones(2, 4)).set_alignment(1).analysis(0.5, [-1])
    PruneTorch(model).prune_by_desc(desc)
    model(x).abs().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert held.grad_fn is not None


def test_an_old_graph_is_refused_and_leaves_no_gradient():
    model = network()
    loss = nn.functional.cross_entropy(model(X), Y)
    prune(model)
    with pytest.raises((GraphError, RuntimeError), match=r"before the model was pruned|inplace operation"):
        loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_hooks_and_gradients_are_carried_and_ties_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 20, bias=False)
            self.head.weight = self.embed.weight
            self.norm = nn.LayerNorm(32)

        def forward(self, ids):
            return self.head(self.norm(torch.relu(self.fc(self.embed(ids)))))

    model, ids = Tied(), torch.randint(0, 20, (2, 5))
    seen: dict[str, list[tuple[int, ...]]] = {"hook": [], "post": []}
    model.fc.weight.register_hook(lambda g: seen["hook"].append(tuple(g.shape)))
    model.fc.weight.register_post_accumulate_grad_hook(lambda p: seen["post"].append(tuple(p.grad.shape)))
    before = dict(model.named_parameters(remove_duplicate=False))
    loss = model(ids).square().mean()
    loss.backward(retain_graph=True)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    desc = PruneTorch(model, ids).set_alignment(8).prune(0.6, [])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is before[name]
    assert model.head.weight is model.embed.weight
    for name, axes in PrunePlan(
        desc
    ).indices.items():  # gradients that a loop accumulates are cut like their parameters
        assert torch.equal(dict(model.named_parameters())[name].grad, select(gradients[name], axes))
    model(ids).square().mean().backward()
    now = tuple(model.fc.weight.shape)
    assert now != (32, 32)
    assert seen == {"hook": [(32, 32), now], "post": [(32, 32), now]}


def test_sparse_gradients_are_cut_too():
    model = nn.Sequential(nn.Embedding(20, 32, sparse=True), nn.Linear(32, 4))
    ids = torch.randint(0, 20, (2, 5))
    model(ids).sum().backward()
    dense = model[0].weight.grad.to_dense()
    desc = PruneTorch(model, ids).set_alignment(8).prune(0.6, [-1])
    assert torch.equal(model[0].weight.grad.to_dense(), select(dense, PrunePlan(desc).indices["0.weight"]))
    torch.optim.SparseAdam(model[0].parameters()).step()


def test_a_failed_prune_leaves_old_graphs_alive():
    model = network()
    loss = train(model)
    kept = nn.functional.cross_entropy(model(X), Y)
    before = {n: (p.shape, p.grad.clone()) for n, p in model.named_parameters()}
    with pytest.raises(TypeError):
        PruneTorch(model, X).set_alignment(8).set_compensation(["no tensor"]).prune(0.5)
    for name, parameter in model.named_parameters():
        assert (parameter.shape, True) == (before[name][0], torch.equal(parameter.grad, before[name][1]))
    train(model)
    assert kept is not None
    assert loss is not None


def test_compiled_networks_train_on_and_plans_speak_of_the_plain_one(tmp_path):
    from slimkit import load_pruned, save_pruned

    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    train(compiled, 1, optimizer)
    desc = prune(compiled)
    assert set(desc["shapes"]) <= set(network().state_dict())
    migrate_optimizer(optimizer, compiled, desc)
    train(compiled, 1, optimizer)
    torch.testing.assert_close(compiled.eval()(X), model(X))  # the same graph, compiled or not
    save_pruned(tmp_path / "small", compiled, desc)
    assert torch.equal(load_pruned(tmp_path / "small", network()).eval()(X), model(X))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_that_step_inside_the_backward_pass_go_on(kind):
    model = network()
    optimizers = {p: kind([p], lr=0.01) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    held = model(X).sum()
    held.backward()
    desc = prune(model)
    for optimizer in optimizers.values():
        migrate_optimizer(optimizer, model, desc)
    before = model[3].weight.clone()
    model(X).sum().backward()
    assert not torch.equal(before, model[3].weight)


def test_ema_copies_and_schedulers_follow():
    model = network()
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    train(model, optimizer=optimizer)
    schedule.step()
    ema.update_parameters(model)
    desc = prune(model)
    PruneTorch(ema.module).prune_by_desc(desc)
    report = migrate_optimizer(optimizer, model, desc)
    assert report.cut
    train(model, optimizer=optimizer)
    schedule.step()
    ema.update_parameters(model)
    assert all(a.shape == b.shape for a, b in zip(ema.module.parameters(), model.parameters()))


def elementwise(name):
    """Optimizers that move each weight by its own gradients alone: cutting and stepping may change places."""
    return name not in ("Adafactor", "LBFGS", "Muon")


OPTIMIZERS = sorted(
    n
    for n, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def made(name, parameters):
    kind = getattr(torch.optim, name)
    extra = {
        "SGD": {"momentum": 0.9, "nesterov": True},
        "RMSprop": {"centered": True, "momentum": 0.5},
        "Adam": {"amsgrad": True},
        "AdamW": {"amsgrad": True},
    }.get(name, {})
    return kind(parameters, lr=0.01, **extra)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 24, bias=False), nn.Linear(24, 24, bias=False), nn.Linear(24, 4, bias=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_goes_on(name):
    model, whole = mlp(), mlp()
    _, desc = PruneTorch(mlp(), torch.ones(2, 4)).set_alignment(1).analysis(0.5, [-1])
    plan = PrunePlan(desc)
    paths = [n for n, _ in model.named_parameters()]
    mine, other = made(name, model.parameters()), made(name, whole.parameters())

    def step(net, optimizer, seed, cut):
        chance = torch.Generator().manual_seed(seed)
        for path, parameter in zip(paths, net.parameters()):
            gradient = torch.randn(plan.shapes[path], generator=chance)
            gradient = select(gradient, plan.indices[path]) if cut and path in plan.indices else gradient
            parameter.grad = gradient.to_sparse() if name == "SparseAdam" else gradient
        optimizer.step(lambda: torch.tensor(1.0))

    for seed in (1, 2):
        step(model, mine, seed, False)
        step(whole, other, seed, False)
    PruneTorch(model).prune_by_desc(desc)
    report = migrate_optimizer(mine, model, desc)
    assert (name == "LBFGS") == bool(report.restarted)
    assert (name == "LBFGS") or set(report.cut) == set(plan.indices)
    again = migrate_optimizer(mine, model, desc)  # a second call finds nothing left to do
    assert not again.cut
    for seed in (3, 4):
        step(model, mine, seed, True)
        step(whole, other, seed, False)
    for path, a, b in zip(paths, model.parameters(), whole.parameters()):
        assert torch.isfinite(a).all()
        if elementwise(name):
            kept = select(b.detach(), plan.indices[path]) if path in plan.indices else b
            torch.testing.assert_close(a.detach(), kept, rtol=0, atol=1e-7)  # float32, each weight by itself


def test_optimizers_that_do_not_fit_are_refused_and_left_alone():
    model, twin = network(), network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer=optimizer)
    _, desc = PruneTorch(model, X).set_alignment(8).analysis(0.5, [-1])
    with pytest.raises(PlanError, match="must be the one that desc pruned"):
        migrate_optimizer(optimizer, model, desc)
    PruneTorch(model).prune_by_desc(desc)
    with pytest.raises(ArgumentError, match="holds none of them"):
        migrate_optimizer(torch.optim.Adam(twin.parameters()), model, desc)
    with pytest.raises(TypeError, match="optimizer"):
        migrate_optimizer(model, model, desc)
    state = optimizer.state[model[3].weight]
    state["odd"] = torch.zeros(7, 5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(PlanError, match="odd"):
        migrate_optimizer(optimizer, model, desc)
    for slot, value in optimizer.state_dict()["state"][4].items():
        assert torch.equal(value, before["state"][4][slot])


def test_moments_follow_several_prunings():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer=optimizer)
    first = prune(model)
    second = prune(model)
    with pytest.raises(PlanError, match="merge_desc"):
        migrate_optimizer(optimizer, model, second)
    migrate_optimizer(optimizer, model, merge_desc(first, second))
    train(model, optimizer=optimizer)


def test_rows_and_columns_of_square_matrices_are_told_apart_by_name():
    from slimkit.core.prune.optimizer_state import state_axes

    rows, cols = [torch.arange(n).numpy() for n in (3, 2)]
    assert state_axes("exp_avg_sq_row", (4,), (4, 4), [rows, cols]) == [rows]
    assert state_axes("exp_avg_sq_col", (4,), (4, 4), [rows, cols]) == [cols]
    with pytest.raises(PlanError, match="shape"):
        state_axes("factor", (4,), (4, 4), [rows, cols])
    assert state_axes("step", (), (4, 4), [rows, cols]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state_axes("variance", (4, 1), (4, 4), [rows, cols]) == [rows, None]
