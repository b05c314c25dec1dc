"""suggest_layer_map: block influence against NumPy, on both frameworks."""

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError
from slimkit.core.weights.blocks import PruneConfig
from slimkit.core.weights.influence import Influence, find_stack


def chain(kit, scales=(1.0, 0.01, 0.5, 0.02)):
    """Blocks that add a little or much to what runs through them."""
    blocks = kit.sequential(*(kit.linear(4, 4) for _ in scales))
    model = kit.named(stem=kit.linear(4, 4), layer=blocks)
    rng = np.random.default_rng(0)
    for name, parameter in kit.params(model).items():
        if name.startswith("layer."):
            scale = scales[int(name.split(".")[1])]
            noise = rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * scale
            value = np.eye(4, dtype=np.float32) + noise if name.endswith("weight") else 0 * noise
            room = kit.room("checkpoint")
            room.load_param_into_net(model, {name: value})
    return model


def test_blocks_that_turn_their_input_stay_in_order(kit, rng):
    model = chain(kit)
    data = [kit.tensor(rng.standard_normal((5, 3, 4)).astype(np.float32)) for _ in range(2)]
    found = kit.room("weights").suggest_layer_map(model, data, keep=2)
    assert found.layer_id_map == {0: 0, 1: 2}
    assert found.pattern == r"layer\.(\d+)\."
    PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(found.pattern, found.layer_id_map).spec()
    # The referee: the same chain in NumPy.
    values = kit.values(model)
    total, count = np.zeros(4), 0
    for batch in data:
        x = kit.array(batch) @ values["stem.weight"].T + values["stem.bias"]
        for i in range(4):
            y = x @ values[f"layer.{i}.weight"].T
            cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            total[i] += cosine.sum()
            x = y
        count += cosine.size
    assert np.allclose(found.influence, 1 - total / count, atol=1e-5)  # float32, 4 terms


def test_one_block_of_all_and_all_of_them(kit, rng):
    model, data = chain(kit), [kit.tensor(np.ones((2, 4), np.float32))]
    suggest = kit.room("weights").suggest_layer_map
    assert len(suggest(model, data, keep=1).layer_id_map) == 1
    assert suggest(model, data, keep=4, blocks="layer").layer_id_map == {i: i for i in range(4)}


def test_what_cannot_be_measured_is_refused(kit):
    suggest, model = kit.room("weights").suggest_layer_map, chain(kit)
    data = [kit.tensor(np.ones((2, 4), np.float32))]
    with pytest.raises(ArgumentError, match="keep"):
        suggest(model, data, keep=5)
    with pytest.raises(ArgumentError, match="two numbered blocks"):
        suggest(model, data, keep=1, blocks="stem")
    with pytest.raises(TypeError, match="calibration"):
        suggest(model, (x for x in data), keep=1)
    with pytest.raises(ArgumentError, match="calibration"):
        suggest(model, [], keep=1)
    with pytest.raises(TypeError, match="model_or_file"):
        suggest(3, data, keep=1)


def test_only_tokens_of_the_mask_count():
    influence = Influence(["h.0", "h.1"], 1)
    before = np.ones((1, 3, 2))
    after = before.copy()
    after[0, 2] = [1, -1]  # cosine 0, masked away
    for path in ("h.0", "h.1"):
        influence.add(path, before, after, np.array([[1, 1, 0]]))
    assert np.allclose(influence.suggestion().influence, 0)


def test_the_heaviest_stack_is_found_in_the_order_of_numbers():
    classes = {f"enc.{i}": "Layer" for i in (10, 2, 1)} | {"dec.0": "Layer", "dec.1": "Layer"}
    sizes = dict.fromkeys(classes, 5) | {"dec.0": 50}
    assert find_stack(classes, sizes) == ["dec.0", "dec.1"]
    assert find_stack(classes, sizes, "enc") == ["enc.1", "enc.2", "enc.10"]
