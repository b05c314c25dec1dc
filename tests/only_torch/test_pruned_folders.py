"""Folders of pruned torch models: modules with versions and extra state; loading is taken back on any error."""

from __future__ import annotations

import pytest

from slimkit import Compressor, PruneTorch, SparseConfig, load_pruned, save_pruned
from slimkit.core.errors import FileFormatError, SlimkitError, UnsupportedError

import torch
from torch import nn

X = torch.ones(2, 8)


class Versioned(nn.Module):
    """Its first version called the scale "gain", as a module does that was renamed."""

    _version = 2

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "scale"] = state.pop(prefix + "gain")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Remembering(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, x):
        return x

    def get_extra_state(self):
        return self.memory

    def set_extra_state(self, state):
        self.memory = state


class Stubborn(nn.Module):
    def forward(self, x):
        return x

    def _load_from_state_dict(self, *rest):
        raise ValueError("not today")


def network(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), *more, nn.Linear(32, 4))


def pruned(folder, *more):
    model = network(*more).eval()
    save_pruned(folder, model, PruneTorch(model, X).set_alignment(4).prune(0.6, [-1]))
    return model


def test_modules_with_versions_load(tmp_path):
    model = pruned(tmp_path / "small", Versioned(32))
    with torch.no_grad():
        model[4].scale.mul_(3)
    save_pruned(tmp_path / "again", model, PruneTorch(model, X).whole_desc())
    fresh = network(Versioned(32)).eval()
    load_pruned(tmp_path / "again", fresh)
    assert torch.equal(fresh(X), model(X))
    assert torch.equal(fresh[4].scale, model[4].scale)


@pytest.mark.parametrize("memory", [{"steps": 3, "seen": ["a", 1.5]}, torch.arange(5), None, [1, 2]])
def test_extra_state_comes_back(tmp_path, memory):
    pruned(tmp_path / "small", Remembering(memory))
    fresh = network(Remembering("nothing"))
    load_pruned(tmp_path / "small", fresh)
    assert torch.equal(fresh[4].memory, memory) if isinstance(memory, torch.Tensor) else fresh[4].memory == memory


@pytest.mark.parametrize("memory", [object(), {1: "a"}, (1, 2), float("nan")])
def test_extra_state_that_needs_pickle_is_refused(tmp_path, memory):
    with pytest.raises(UnsupportedError, match="_extra_state"):
        pruned(tmp_path / "small", Remembering(memory))
    assert not (tmp_path / "small").exists()


def test_tensors_that_are_views_of_one_another_are_kept_apart(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            table = torch.arange(16.0).reshape(4, 4)
            self.register_buffer("table", table)
            self.register_buffer("turned", table.t())

        def forward(self, x):
            return x + (self.table - self.turned).sum()

    model = pruned(tmp_path / "small", Views())
    fresh = network(Views()).eval()
    load_pruned(tmp_path / "small", fresh)
    assert torch.equal(fresh[4].turned, model[4].turned)


def everything(model):
    """All that a failed load must leave: objects, values, gradients, attributes, modes, plans."""
    return {
        "tensors": {n: (id(t), t.shape, t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "plain": {
            n: {k: v for k, v in vars(m).items() if isinstance(v, (int, str, tuple))} for n, m in model.named_modules()
        },
        "kinds": [type(m) for m in model.modules()],
        "plans": vars(model).get("_slimkit_plans"),
    }


def same(one, other):
    tensors = all(
        one["tensors"][n][:2] == other["tensors"][n][:2] and torch.equal(one["tensors"][n][2], other["tensors"][n][2])
        for n in one["tensors"]
    )
    grads = all(
        g is None if one["grads"][n] is None else torch.equal(one["grads"][n], g) for n, g in other["grads"].items()
    )
    return tensors and grads and all(one[k] == other[k] for k in ("plain", "kinds", "plans"))


def test_a_load_that_fails_late_is_taken_back(tmp_path):
    pruned(tmp_path / "small", nn.Identity())
    fresh = network(Stubborn())
    fresh(X).sum().backward()
    before = everything(fresh)
    with pytest.raises(FileFormatError, match="not today"):
        load_pruned(tmp_path / "small", fresh)
    assert same(before, everything(fresh))
    fresh(X).sum().backward()


def test_kinds_of_numbers_are_not_mixed(tmp_path):
    from safetensors.torch import load_file, save_file

    pruned(tmp_path / "small", nn.Identity())
    file = str(tmp_path / "small" / "model.safetensors")
    tensors = load_file(file)
    tensors["0.weight"] = tensors["0.weight"].to(torch.int32)
    save_file(tensors, file)
    with pytest.raises(FileFormatError, match=r"'0.weight' as torch.int32"):
        load_pruned(tmp_path / "small", network(nn.Identity()))


@pytest.mark.parametrize("edit", [
    {"tied": {"0.bias": "nothing"}},
    {"tied": 3},
    {"versions": [1]},
    {"extra": [1]},
    {"axes": {"nothing": ["d0"]}},
    {"axes": {"0.weight": ["d0"]}},
    {"made": 3},
])  # fmt: skip
def test_damaged_plans_are_told(tmp_path, edit):
    from slimkit.core import files

    pruned(tmp_path / "small", nn.Identity())
    plan = files.read_json(tmp_path / "small" / "plan.json")
    files.write_json(tmp_path / "small" / "plan.json", {**plan, **edit})
    fresh = network(nn.Identity())
    before = everything(fresh)
    with pytest.raises(SlimkitError):
        load_pruned(tmp_path / "small", fresh)
    assert same(before, everything(fresh))


def test_folders_without_versions_still_load(tmp_path):
    from slimkit.core import files

    model = pruned(tmp_path / "small", Versioned(32))
    plan = files.read_json(tmp_path / "small" / "plan.json")
    files.write_json(
        tmp_path / "small" / "plan.json", {k: v for k, v in plan.items() if k not in ("versions", "extra")}
    )
    fresh = network(Versioned(32)).eval()
    load_pruned(tmp_path / "small", fresh)
    assert torch.equal(fresh(X), model(X))


def test_offloaded_weights_are_named():
    import accelerate

    for job in (
        lambda net: PruneTorch(net, X),
        lambda net: Compressor(net, SparseConfig(method="magnitude")).compress([X]),
    ):
        net = network()
        accelerate.cpu_offload(net, execution_device="cpu")
        with pytest.raises(SlimkitError, match="offload"):
            job(net)


def test_data_parallel_networks_are_refused_and_holders_told(tmp_path, caplog):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = network().train()
        holder = nn.parallel.DistributedDataParallel(net)
        holder(X).sum().backward()
        with pytest.raises(UnsupportedError, match="prune the module inside"):
            PruneTorch(holder, X)
        PruneTorch(net, X).set_alignment(4).prune(0.6, [-1])
        assert "wrap the pruned network anew" in caplog.text
        again = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):
            net.zero_grad()
            again(X).sum().backward()
        assert all(p.grad.shape == p.shape for p in net.parameters())
    finally:
        distributed.destroy_process_group()


def test_a_model_without_layers_has_nothing_to_leave_out():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(4, 32))

        def forward(self, x):
            return torch.relu(x @ self.a.t()) @ self.b.t()

    left, _ = PruneTorch(Bare(), X).analysis(0.8)
    assert left <= 32 * 12
    with pytest.raises(ValueError, match="no Conv or Linear layer ran"):
        PruneTorch(Bare(), X).analysis(0.8, [0])
