"""A hidden width turned onto its principal axes before the cut, in both frameworks: exact, and alike."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.errors import FileFormatError, PlanError, UnsupportedError
from slimkit.core.prune.rotation import principal_axes, turned_values
from tests import kits
from tests.conftest import INSTALLED

IDS = np.random.default_rng(1).integers(0, 40, (8, 16)).astype(np.int32)
INNER = ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate"]  # what stays, so that the hidden width must go


def llama_torch(head):
    """The torch twin of `tests.zoo_ms.Llama`: the same names, the same arithmetic."""
    import torch
    from torch import nn

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    class Attention(nn.Module):
        def __init__(self, width, heads, kv_heads, length=16):
            super().__init__()
            self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, width // heads
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                setattr(self, f"{name}_proj", nn.Linear(width, n * self.head_dim, bias=False))
            self.o_proj = nn.Linear(width, width, bias=False)
            half = self.head_dim // 2
            angles = np.outer(np.arange(length), 100.0 ** (-np.arange(half) / half))
            angles = torch.tensor(np.concatenate([angles, angles], 1), dtype=torch.float32)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

        def turn(self, x):
            half = self.head_dim // 2
            return x * self.cos + torch.cat((-x[..., half:], x[..., :half]), -1) * self.sin

        def forward(self, x):
            q, k, v = (
                proj(x).unflatten(-1, (n, self.head_dim)).transpose(1, 2)
                for proj, n in (
                    (self.q_proj, self.num_heads),
                    (self.k_proj, self.num_key_value_heads),
                    (self.v_proj, self.num_key_value_heads),
                )
            )
            groups = self.num_heads // self.num_key_value_heads
            k, v = self.turn(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            shares = (self.turn(q) @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
            return self.o_proj((shares @ v).transpose(1, 2).flatten(2))

    class Layer(nn.Module):
        def __init__(self, width, heads, kv_heads, inner):
            super().__init__()
            self.input_norm, self.attention = Norm(width), Attention(width, heads, kv_heads)
            self.post_norm = Norm(width)
            self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
            self.down = nn.Linear(inner, width, bias=False)

        def forward(self, x):
            x = x + self.attention(self.input_norm(x))
            y = self.post_norm(x)
            return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 32)
            self.layers = nn.ModuleList([Layer(32, 4, 2, 48)])
            self.norm = Norm(32)
            self.head = None if head == "table" else nn.Linear(32, 40, bias=False)
            if head == "shared":
                self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            return nn.functional.linear(x, self.embed.weight) if self.head is None else self.head(x)

    return Llama().eval()


def built(kit, head="own"):
    """The same values in both frameworks, so that the stream lies near some of its axes."""
    if kit.name == "torch":
        model = llama_torch(head)
    else:
        from tests import zoo_ms

        model = zoo_ms.Llama(layers=1, head=head).set_train(False)
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((32, 32)) @ np.diag(np.logspace(0, -2, 32)) / 4
    for path, parameter in kit.params(model).items():
        shape = tuple(parameter.shape)
        values = rng.uniform(0.5, 1.5, shape) if "norm" in path else 0.2 * rng.standard_normal(shape)
        if path.startswith("embed"):
            values = 4 * values @ mix.T
        elif "o_proj" in path or "down" in path:
            values = mix @ values
        kit.assign(parameter, values.astype(np.float32))
    return model


def pruner(kit, model):
    job = kit.room("prune").Pruner(model, kit.tensor(IDS[:2])).set_alignment(4).set_rotation(True)
    data = [kit.tensor(IDS), kit.tensor(IDS[:, ::-1].copy())]
    return job.set_importance_evaluation_function("auto", calibration=data).set_compensation(None)


def logits(kit, model):
    return kit.array(model(kit.tensor(IDS)))


def is_shared(model):
    return model.head.weight is getattr(model.embed, "weight", getattr(model.embed, "embedding_table", None))


@pytest.mark.parametrize("head", ["own", "shared"])
def test_a_turned_model_says_the_same(kit, head):
    model = built(kit, head)
    before, weight = logits(kit, model), kit.array(model.layers[0].gate.weight)
    job = pruner(kit, model)
    job._solved()
    stream, wing = job._stream, job._wing
    data = job._scoring.calibration
    rotation = principal_axes(stream, lambda layers: wing.signals(data, layers, None, 0), wing.read)
    turn_back = wing.turn(turned_values(stream, rotation, np.arange(32), wing.read), job._parted)
    assert np.abs(kit.array(model.layers[0].gate.weight) - weight).max() > 0.1
    np.testing.assert_allclose(logits(kit, model), before, atol=1e-4)
    assert not is_shared(model)
    turn_back()
    np.testing.assert_array_equal(logits(kit, model), before)
    assert is_shared(model) is (head == "shared")


@pytest.mark.parametrize("head", ["own", "shared"])
def test_every_kit_turns_and_cuts_alike(head):
    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        model = built(kit, head)
        job = pruner(kit, model)
        desc = job.prune(0.85, INNER)
        assert job.report()["rotated"]["added_params"] == (40 * 32 if head == "shared" else 0)
        assert any("tied table twice" in note for note in job.report()["notes"]) == (head == "shared")
        found.append((desc, [kit.array(p) for p in kit.params(model).values()], logits(kit, model)))
    (desc, weights, said), *others = found
    assert weights[0].shape[1] < 32
    for other, values, answer in others:
        assert {n: v["keep"] for n, v in other["variables"].items()} == {
            n: v["keep"] for n, v in desc["variables"].items()
        }
        assert other["made"]["foretold_loss"] == pytest.approx(desc["made"]["foretold_loss"], rel=1e-3)
        for one, two in zip(weights, values, strict=True):
            np.testing.assert_allclose(one, two, atol=2e-4)  # axes of moments that are summed up in float32
        np.testing.assert_allclose(answer, said, atol=2e-4)


def test_what_is_cut_is_nearer_than_with_channels_picked_and_travels(kit, tmp_path):
    dense = built(kit, "shared")
    wanted, away = logits(kit, dense), {}
    for on in (False, True):
        model = copy.deepcopy(dense)
        job = pruner(kit, model).set_rotation(on)
        desc = job.prune(0.85, INNER)
        away[on] = float(np.square(logits(kit, model) - wanted).mean())
    assert away[True] < 0.5 * away[False]
    kit.slim.save_pruned(tmp_path / "small", model, desc)
    fresh = built(kit, "shared")
    np.testing.assert_allclose(
        logits(kit, kit.slim.load_pruned(tmp_path / "small", fresh)), logits(kit, model), atol=1e-6
    )
    with pytest.raises(PlanError, match="a plan holds no axes"):
        pruner(kit, built(kit, "shared")).prune_by_desc(desc)
    weights = tmp_path / "small" / "model.safetensors"
    tensors, about = files.read_tensors(weights)
    files.write_tensors(weights, {**tensors, "norm.weight": tensors["norm.weight"][1:]}, about)
    again = built(kit, "shared")
    with pytest.raises(FileFormatError):
        kit.slim.load_pruned(tmp_path / "small", again)
    assert is_shared(again)
    np.testing.assert_array_equal(logits(kit, again), wanted)


def test_an_error_in_the_repair_leaves_the_model(kit, monkeypatch):
    model = built(kit, "shared")
    before = logits(kit, model)
    job = pruner(kit, model)
    job.set_compensation(job._scoring.calibration)
    monkeypatch.setattr(job._wing, "compensate", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.prune(0.85, INNER)
    assert is_shared(model)
    np.testing.assert_array_equal(logits(kit, model), before)
    monkeypatch.undo()
    job.prune(0.85, INNER)
    assert {"head", "layers.0.gate"} <= job.report()["compensation"]["refitted"].keys()


def test_streams_that_cannot_be_turned_are_refused_with_the_reason(kit):
    with pytest.raises(UnsupportedError, match=r"is read behind a norm's scale too, by code that holds no matrix"):
        pruner(kit, built(kit, "table")).analysis(0.9, [])
    x = kit.tensor(np.ones((1, 8), np.float32))
    net = kit.named(a=kit.linear(8, 32), b=kit.relu(), c=kit.linear(32, 4))
    with pytest.raises(UnsupportedError, match="rotation needs one residual stream"):
        kit.room("prune").Pruner(net, x).set_rotation().analysis(0.9)
    net = kit.named(a=kit.embedding(40, 32), b=kit.layer_norm(32), c=kit.linear(32, 4))
    with pytest.raises(UnsupportedError, match="the residual stream cannot be turned: a LayerNorm in b"):
        kit.room("prune").Pruner(net, kit.tensor(IDS)).set_rotation().analysis(0.9)


def test_a_plan_with_nothing_to_turn_does_not_stand_for_the_next(kit):
    """A harder cut by the same pruner was one of channels, and no word of it."""
    job = pruner(kit, built(kit, "shared"))
    mild = job.analysis(0.9, ["*.o_proj", "*.down"])[1]  # what writes the stream stays, so that its width does
    assert "rotated" not in mild["made"]
    hard = job.analysis(0.7, INNER)[1]
    fresh = pruner(kit, built(kit, "shared")).analysis(0.7, INNER)[1]
    assert hard["made"]["rotated"] == fresh["made"]["rotated"]
    assert hard["variables"] == fresh["variables"]
