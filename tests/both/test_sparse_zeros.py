"""Zeros that stay zero while a model goes on training."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig


def sparse_net(kit):
    model = kit.fill(kit.named(first=kit.linear(8, 12), act=kit.relu(), last=kit.linear(12, 4)))
    kit.slim.Compressor(model, SparseConfig()).compress()
    return model


def train(kit, model, optimizer="adamw", steps=3):
    rng = np.random.default_rng(0)
    x = kit.tensor(rng.standard_normal((16, 8)).astype(np.float32))
    y = kit.tensor(rng.standard_normal((16, 4)).astype(np.float32))
    if kit.name == "torch":
        torch = kit.torch
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adam": torch.optim.RAdam}
        extra = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1} if optimizer == "sgd" else {}
        stepper = kinds[optimizer](model.parameters(), lr=0.05, **extra)
        for _ in range(steps):
            stepper.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            stepper.step()
        return
    ms = kit.ms
    parameters = model.trainable_params()
    stepper = {
        "adamw": lambda: ms.nn.AdamWeightDecay(parameters, 0.05, weight_decay=0.1),
        "sgd": lambda: ms.nn.Momentum(parameters, 0.05, 0.9, weight_decay=0.1, use_nesterov=True),
        "adam": lambda: ms.nn.Adam(parameters, 0.05),
    }[optimizer]()
    step = ms.nn.TrainOneStepCell(ms.nn.WithLossCell(model, ms.nn.MSELoss()), stepper)
    step.set_train()
    for _ in range(steps):
        step(x, y)


def zeros(kit, model):
    return {n: v == 0 for n, v in kit.values(model).items() if v.ndim == 2}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam"])
def test_zeros_stay_and_the_rest_trains(kit, optimizer):
    model = sparse_net(kit)
    before, values = zeros(kit, model), kit.values(model)
    with kit.slim.freeze_zeros(model) as frozen:
        assert list(frozen.masks) == ["first", "last"]
        train(kit, model, optimizer)
        after = zeros(kit, model)
        assert all((before[n] == after[n]).all() for n in before)
        assert all((kit.values(model)[n] != v).any() for n, v in values.items())
    train(kit, model, optimizer)
    # Let go, they move again, but for those behind a dead ReLU.
    assert all(v.mean() < 0.3 for v in zeros(kit, model).values())


def test_zeros_stay_in_a_compiled_graph(kit):
    model = sparse_net(kit)
    before = zeros(kit, model)
    if kit.name == "mindspore":
        mode = kit.ms.get_context("mode")
        kit.ms.set_context(mode=kit.ms.GRAPH_MODE)
    try:
        frozen = kit.slim.freeze_zeros(model)
        train(kit, model)
        frozen.remove()
    finally:
        if kit.name == "mindspore":
            kit.ms.set_context(mode=mode)
    after = zeros(kit, model)
    assert all((before[n] == after[n]).all() for n in before)


def test_apply_brings_zeros_back_after_weights_are_set_by_hand(kit):
    model = sparse_net(kit)
    before = zeros(kit, model)
    frozen = kit.slim.freeze_zeros(model)
    kit.fill(model, seed=5)
    frozen.apply()
    after = zeros(kit, model)
    assert all((before[n] == after[n]).all() for n in before)


def test_masks_of_a_compressor_are_taken(kit):
    model = kit.fill(kit.named(only=kit.linear(8, 4)))
    compressor = kit.slim.Compressor(model, SparseConfig(pattern="2:4"))
    compressor.compress()
    frozen = kit.slim.freeze_zeros(model, compressor.masks)
    kit.fill(model, seed=5)
    frozen.remove() if kit.name == "mindspore" else frozen.apply()
    assert (zeros(kit, model)["only.weight"].reshape(4, 2, 4).sum(2) == 2).all()


@pytest.mark.parametrize("keep_zeros", [None, False])
def test_zeros_stay_through_lora_training_and_merge(kit, keep_zeros):
    model = kit.fill(kit.named(first=kit.linear(8, 12), act=kit.relu(), last=kit.linear(12, 4)))
    compressor = kit.slim.Compressor(model, SparseConfig())
    compressor.compress()
    before, values = zeros(kit, model), kit.values(model)
    frozen = kit.slim.freeze_zeros(model, compressor.masks)
    kit.slim.apply_delta(model, "lora", targets=["first", "last"], rank=2, alpha=4, keep_zeros=keep_zeros)
    train(kit, model)
    kit.slim.merge_delta(model, unload=True)
    if keep_zeros is False:  # the plain merge fills them
        frozen.apply()
    after = kit.values(model)
    assert after.keys() == values.keys()
    for name, mask in before.items():
        np.testing.assert_array_equal(after[name] == 0, mask, err_msg=name)
        assert (after[name] != values[name]).any()
    train(kit, model)
    assert all((zeros(kit, model)[n] == mask).all() for n, mask in before.items())


def test_masks_go_through_a_safetensors_file(kit, tmp_path):
    from safetensors.numpy import load_file, save_file

    def net():
        return kit.fill(kit.named(conv=kit.conv(4, 6, 3), dense=kit.linear(16, 8)))

    compressor = kit.slim.Compressor(net(), SparseConfig(pattern="2:4"))
    compressor.compress()
    save_file({name: np.asarray(mask) for name, mask in compressor.masks.items()}, tmp_path / "masks.safetensors")
    masks = load_file(tmp_path / "masks.safetensors")
    model = net()
    frozen = kit.slim.freeze_zeros(model, masks)
    frozen.remove()
    for name, mask in masks.items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(kit.values(model)[f"{name}.weight"] != 0, mask)
