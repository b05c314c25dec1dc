"""A model under one `fully_shard`, after a bare forward: FSDP2 leaves gathered copies there, which look whole."""

from __future__ import annotations

import pytest

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.sharded import is_distributed, written_once
from slimkit.shared_training import SharedTraining

import torch
from torch import distributed, nn


@pytest.fixture
def gathered():
    """The model in such a state, as the one process of a group has it."""
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    fully_shard(model)
    with torch.no_grad():
        model(torch.ones(1, 4))
    yield model
    distributed.destroy_process_group()


def test_gathered_copies_are_not_taken_for_a_whole_model(gathered, tmp_path):
    import slimkit

    assert not any(map(is_distributed, gathered.parameters()))
    for call in (
        lambda: bridge.check_whole(gathered),
        lambda: slimkit.Compressor(gathered, slimkit.SparseConfig(method="magnitude")),
        lambda: slimkit.Pruner(gathered, torch.ones(1, 4)),
        lambda: bridge.check_whole(gathered[0]),
    ):
        with pytest.raises(UnsupportedError, match="whole parameters"):
            call()


def test_training_saving_and_files_see_the_parts(gathered, tmp_path):
    # Taken for a whole one it would train apart in each process, and the first would wait for ever as it saves.
    assert isinstance(SharedTraining.of(gathered, 1), SharedTraining)
    with torch.no_grad():
        gathered(torch.ones(1, 4))
    with written_once(gathered, tmp_path / "delta") as place:
        assert place == tmp_path / "delta"
        assert all(map(is_distributed, gathered.parameters()))


def test_a_checkpoint_after_an_evaluation_is_that_of_parts(gathered, tmp_path):
    from slimkit import Trainer

    inputs = torch.ones(4, 4)
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :2])
    trainer = Trainer(gathered, nn.functional.mse_loss, lambda ps: torch.optim.SGD(ps, lr=0.1))
    trainer.train(data, 1, per_device_batch_size=4)
    before = trainer.evaluate(data)["loss"]
    assert not any(map(is_distributed, gathered.parameters()))
    trainer.save_checkpoint(tmp_path / "last")
    trainer.train(data, 1, per_device_batch_size=4)
    assert trainer.evaluate(data)["loss"] != before
    trainer.load_weights(tmp_path / "last")
    assert trainer.evaluate(data)["loss"] == before
