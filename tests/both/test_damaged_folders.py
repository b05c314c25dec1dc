"""Pruned folders and trainer checkpoints that were cut short or replaced by links are refused."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import SlimkitError


def network(kit):
    return kit.fill(kit.named(first=kit.linear(8, 32), act=kit.relu(), last=kit.linear(32, 4)))


def pruned(kit, folder):
    x = kit.tensor(np.ones((2, 8), np.float32))
    net = network(kit)
    desc = kit.slim.Pruner(net, x).set_alignment(4).prune(0.7, un_prune_list=["last"])
    kit.slim.save_pruned(folder, net, desc)
    return lambda: kit.slim.load_pruned(folder, network(kit))


def trained(kit, folder):
    batches = [kit.tensor(np.ones((2, 8), np.float32)), kit.tensor(np.zeros((2, 8), np.float32))]

    def trainer():
        return kit.slim.Trainer(network(kit), compute_loss=lambda model, batch: (model(batch) ** 2).mean())

    one = trainer()
    one.train(batches, 1)
    one.save_checkpoint(folder)
    return lambda: trainer().train(batches, 2, resume_from=folder)


@pytest.mark.parametrize("make", [pruned, trained])
def test_what_was_cut_short_or_linked_is_refused(kit, tmp_path, make):
    folder = tmp_path / "kept"
    load = make(kit, folder)
    load()
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    assert len(names) >= 2
    for name in names:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[: len(good) // 2])
        with pytest.raises(SlimkitError):
            load()
        (tmp_path / "elsewhere").write_bytes(good)
        (folder / name).unlink()
        with pytest.raises(SlimkitError):
            load()
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SlimkitError):
            load()
        (folder / name).unlink()
        (folder / name).write_bytes(good)
    load()
