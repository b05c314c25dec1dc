"""measure_activations, and importance by what runs through a model, on both frameworks against NumPy."""

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, PlanError
from slimkit.core.weights.activations import Energies
from slimkit.core.weights.blocks import PruneConfig
from tests.both.test_weights import INTRA, SIZE, large, transformer, write


def test_the_mean_square_of_every_input(kit, rng):
    model = kit.named(one=kit.linear(3, 5), two=kit.sequential(kit.linear(5, 2)))
    data = [rng.standard_normal((4, 3)).astype(np.float32) for _ in range(2)]
    found = kit.room("weights").measure_activations(model, [kit.tensor(x) for x in data])
    values, x = kit.values(model), np.concatenate(data)
    hidden = x @ values["one.weight"].T + values["one.bias"]
    assert set(found) == {"one.weight", "two.0.weight"}
    assert np.allclose(found["one.weight"], np.square(x).mean(0), rtol=1e-6)
    assert np.allclose(found["two.0.weight"], np.square(hidden).mean(0), rtol=1e-5)  # float32, 3 terms


def test_only_tokens_of_the_mask_count():
    energies = Energies({"a": "a.weight"})
    energies.add("a", np.array([[[1.0], [2.0], [9.0]]]), np.array([[1, 1, 0]]))
    energies.add("a", np.array([[3.0]]), np.array([[1, 1, 0]]))  # another shape: every row counts
    assert np.allclose(energies.mean()["a.weight"], (1 + 4 + 9) / 3)
    with pytest.raises(ArgumentError, match="no linear layer"):
        Energies({"a": "a.weight"}).mean()


def activations(kit, tensors, heads, channels):
    """As if the data ran through these heads and channels only."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            found[name] = np.full(value.shape[1], 1e-4)
            if "o_proj" in name:
                found[name][[h * SIZE + i for h in heads for i in range(SIZE)]] = 1.0
            elif "down_proj" in name:
                found[name][channels] = 1.0
    return found


def pruned(kit, tensors, seen, tmp_path, **kw):
    small = transformer(kit, heads=2, keys=2, ffn=3)
    config = PruneConfig().set_steps([INTRA]).set_selection("importance", seen)
    path = write(tmp_path / "w.safetensors", tensors)
    return small, kit.room("weights").prune_model_weight(small, config, path, **kw)


def test_what_the_data_runs_through_stays_whatever_the_weights_say(kit, rng, tmp_path):
    tensors = large(kit, rng)
    heads, channels = [0, 3], [1, 2, 5]
    small, report = pruned(kit, tensors, activations(kit, tensors, heads, channels), tmp_path)
    values, rows = kit.values(small), [h * SIZE + i for h in heads for i in range(SIZE)]
    for block in range(4):
        at = f"layers.{block}."
        assert report["choices"][f"{at}self_attn"] == {"heads": heads, "key_heads": heads}
        for role in "qkv":
            name = f"{at}self_attn.{role}_proj.weight"
            assert np.array_equal(values[name], tensors[name][rows])
        assert np.array_equal(values[f"{at}mlp.up_proj.bias"], tensors[f"{at}mlp.up_proj.bias"][channels])
        assert np.array_equal(values[f"{at}mlp.down_proj.weight"], tensors[f"{at}mlp.down_proj.weight"][:, channels])
    told = {v for k, v in report["choices"].items() if not k.endswith("self_attn")}
    assert told == {"activations"}


def test_activations_under_a_prefix_are_found(kit, rng, tmp_path):
    tensors = large(kit, rng)
    seen = {f"model.{n}": v for n, v in activations(kit, tensors, [1, 2], [0, 1, 2]).items()}
    _, report = pruned(kit, tensors, seen, tmp_path)
    assert report["choices"]["layers.0.self_attn"]["heads"] == [1, 2]


def test_activations_that_say_nothing_or_belong_elsewhere_are_refused(kit, rng, tmp_path, caplog):
    tensors = large(kit, rng)
    seen = activations(kit, tensors, [0, 1], [0, 1, 2])
    lacking = {n: v for n, v in seen.items() if "layers.2.mlp" not in n}
    with pytest.raises(PlanError, match=r"no layer that reads 'layers\.2"):
        pruned(kit, tensors, lacking, tmp_path)
    _, report = pruned(kit, tensors, lacking, tmp_path, strict=False)
    assert sorted({v for v in report["choices"].values() if isinstance(v, str)}) == ["activations", "importance"]
    assert "layers.2" in caplog.text
    other = {n: np.ones(5) for n in seen}
    with pytest.raises(PlanError, match="5 input channels"):
        pruned(kit, tensors, other, tmp_path)


@pytest.mark.parametrize(
    ("activations", "error"),
    [
        ([1.0], TypeError),
        ({}, ValueError),
        ({"w": "text"}, TypeError),
        ({"w": [[1.0]]}, ValueError),
        ({"w": [-1.0]}, ValueError),
        ({"w": [np.inf]}, ValueError),
        ({3: [1.0]}, TypeError),
    ],
)
def test_activations_are_checked(activations, error):
    with pytest.raises(error, match="activations"):
        PruneConfig().set_selection("importance", activations)


def test_first_does_not_take_activations():
    with pytest.raises(ArgumentError, match="does not read them"):
        PruneConfig().set_selection("first", {"w": [1.0]})
