"""Models and optimizers of torch that are not ready for what is asked: one line of ours at every door."""

import pytest

import slimkit
from slimkit.core.errors import ArgumentError, ConfigError, UnsupportedError

import torch
from torch import nn


def test_lazy_layers_are_named_by_every_door(tmp_path):
    """One line of ours, where torch speaks of `UninitializedParameter` at whatever line comes upon it first."""
    for layers in (
        (nn.LazyLinear(4),),
        (nn.Linear(3, 3), nn.LazyBatchNorm1d()),
        (nn.Linear(3, 3), nn.LazyConv2d(2, 1)),
    ):
        model = nn.Sequential(*layers)
        at = len(layers) - 1
        for door in (
            lambda m: slimkit.apply_delta(m, "lora", rank=2),
            lambda m: slimkit.freeze_delta(m, "bitfit"),
            slimkit.trainable_summary,
            lambda m: slimkit.Compressor(m, slimkit.SparseConfig()),
            lambda m: slimkit.PruneTorch(m, torch.ones(1, 3)),
        ):
            with pytest.raises(ArgumentError, match=rf": {at} \(Lazy\w+\) has no weight yet; run the model"):
                door(model)
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(UnsupportedError, match=r"0\.weight. has no shape yet"):
        slimkit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    model(torch.ones(2, 3))
    assert slimkit.apply_delta(model, "lora", rank=2).layers


def test_an_optimizer_that_runs_the_model_itself_is_refused_by_the_trainer():
    model = nn.Linear(3, 1)
    trainer = slimkit.Trainer(model, nn.functional.mse_loss, torch.optim.LBFGS(model.parameters()))
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"LBFGS\.step needs a closure"):
        trainer.train([(torch.ones(4, 3), torch.ones(4, 1))], num_epochs=1)
    assert torch.equal(model.weight, before)
