"""Run by test_shared_training.py, alone or under torchrun: trainings of which each process holds a part, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import slimkit
from slimkit import KnowledgeDistillConfig, Trainer, get_distill_model
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.sharded import own_part, whole

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
SIZE = 8 // WORLD  # samples of a process: an update reads the same 8 however many there are


class Block(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(self.act(self.up(x))))


class Net(nn.Module):
    def __init__(self, seed, width=6, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(width, momentum=0.5), nn.Linear(width, 2)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        # Batch norm in eval mode alone: over the samples of a process it is another function than over all.
        return self.head(x if self.training else self.norm(x))


def shared(model):
    if WORLD > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=generator)
    return torch.utils.data.TensorDataset(x, x @ torch.randn(5, 2, generator=generator))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, foreach=False)


def values(model):
    """Every parameter, whole."""
    return {n: whole(p).detach().tolist() for n, p in model.named_parameters()}


def told(history, model):
    names = [n for n in history.get_metric_names() if n.endswith(("_step", "_epoch")) and n != "learning_rate_epoch"]
    return {**{n: list(history.get_metric_values(n)) for n in sorted(names)}, "values": values(model)}


HOW = {"num_epochs": 2, "per_device_batch_size": SIZE}


def plain(folder):
    """Accumulated, clipped by norm and by value, evaluated on five batches: not as many in each process."""
    model, metrics = shared(Net(0)), {"gap": lambda out, y: (out - y).abs().mean()}
    trainer = Trainer(model, mse_loss, adamw, metrics=metrics)
    history = trainer.train(
        data(), **HOW, eval_dataset=data(), eval_per_device_batch_size=8, gradient_accumulation_steps=2,
        gradient_clip_norm=0.4, gradient_clip_value=0.2,
    )  # fmt: skip
    ready = [data()[i : i + 8] for i in range(0, 40, 8)]
    alone = trainer.evaluate(ready[:1])  # which leaves one of two processes without any
    return {**told(history, model), "ready": list(trainer.evaluate(ready).values()), "alone": list(alone.values())}


def tokens(folder):
    """Losses are means over labels that count, of which each process has another number."""
    x, y = data().tensors
    labels = (y[:, 0] > 0).long().where(torch.arange(40) % 3 > 0, -100)
    model = shared(Net(0))
    loss = lambda out, target: nn.functional.cross_entropy(out, target)
    return told(Trainer(model, loss, adamw).train(torch.utils.data.TensorDataset(x, labels), **HOW), model)


def distilled(folder):
    """A hidden state from the middle of a block, a projection that every process holds whole, and labels."""
    teacher, student = Net(1, 8), Net(2)
    config = KnowledgeDistillConfig().set_hard_label(0.3, 0)
    term = {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "HiddenMse", "func_weight": 1.0}]}
    config.add_inter_soft_label({"t_module": "blocks.0", "s_module": "blocks.0", **term})
    config.add_inter_soft_label({"t_module": "blocks.1.act", "s_module": "blocks.1.act", **term})
    shared(teacher)
    torch.manual_seed(50 + RANK)
    dual = get_distill_model(teacher, shared(student), config, data()[:2][0])
    history = Trainer(dual, mse_loss, adamw).train(data(), **HOW, gradient_clip_norm=0.1)
    assert dual.get_student_model() is student
    return told(history, dual)


def zeros(folder):
    model = Net(0)
    with torch.no_grad():
        model.blocks[0].up.weight[:, ::2] = 0
    shared(model)
    with slimkit.freeze_zeros(model) as held:
        assert list(held.masks) == ["blocks.0.up"]
        found = told(Trainer(model, mse_loss, adamw).train(data(), **HOW, gradient_clip_norm=0.1), model)
    assert not whole(model.blocks[0].up.weight)[:, ::2].any()
    return found


def deltas(folder, after=False):
    model = Net(0)
    if after:
        shared(model)
    torch.manual_seed(3)
    slimkit.apply_delta(model, "lora", ["blocks.*.up"], rank=2, also_train=["head.*"])
    if not after:
        slimkit.freeze_delta(model, "lora", exclude=["head.*"])
        shared(model)
    history = Trainer(model, mse_loss, adamw).train(data(), **HOW, gradient_clip_norm=0.1)
    slimkit.save_delta(model, folder / f"delta_{WORLD}_{after}")
    return told(history, model)


def deltas_after(folder):
    return deltas(folder, after=True)


class Stopped(Exception):
    pass


class Save:
    def __init__(self, folder, at, stop):
        self.folder, self.at, self.stop = folder, at, stop

    def on_step_end(self, trainer):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.folder)
            if self.stop:
                raise Stopped


def resumed(folder):
    """Stopped within the second epoch, and gone on from there by new models; dropout would tell other numbers."""

    def run(at=None, stop=False, dropout=0.3, **more):
        model = shared(Net(0, dropout=dropout))
        callbacks = [] if at is None else [Save(at, 7, stop)]
        return told(Trainer(model, mse_loss, adamw, callbacks).train(data(), **HOW, **more), model)

    at = folder / f"run_{WORLD}"
    expected = run(at)
    with pytest.raises(Stopped):
        run(at, stop=True)
    torch.manual_seed(99)
    assert run(resume_from=at) == expected
    # One of as many processes as the test says went before: it has the numbers of the other count of them.
    other = folder / "dry_1"
    if WORLD == 1:
        run(other, dropout=0.0)
        return {}
    found, dry = run(resume_from=other, dropout=0.0), run(dropout=0.0)
    assert found["train_loss_step"][:7] != dry["train_loss_step"][:7]  # what one process counted
    torch.testing.assert_close(torch.tensor(found["train_loss_step"]), torch.tensor(dry["train_loss_step"]))
    return {}


def files(folder):
    """Checkpoints by hand and of trained parameters: whole tensors, and back into parts with the optimizer's."""
    model = shared(Net(0))
    saver = slimkit.TrainableParamsCheckPoint(folder / f"trainable_{WORLD}", optimizer_state=True)
    trainer = Trainer(model, mse_loss, adamw, [saver])
    trainer.train(data(), **HOW)
    sizes = [(own_part(p).numel(), p.numel(), p[0].numel()) for p in model.parameters()]
    assert all(own <= whole / WORLD + row for own, whole, row in sizes)  # rows are not always shared out evenly
    slimkit.save_checkpoint(model, folder / f"by_hand_{WORLD}.safetensors")
    fresh = shared(Net(7))
    slimkit.load_checkpoint(folder / f"by_hand_{WORLD}.safetensors", fresh, strict_load=True)
    assert values(fresh) == values(model)
    fresh = shared(Net(7))
    optimizer = adamw(fresh.parameters())
    latest = [saver.latest_ckpt_file_name]  # only the first process writes
    if WORLD > 1:
        dist.broadcast_object_list(latest, src=0)
    slimkit.load_param_into_net(fresh, latest[0], optimizer=optimizer)
    assert values(fresh) == values(model)
    parts = [
        [whole(state["exp_avg"]).tolist() for state in o.state.values()] for o in (optimizer, trainer.optimizer)
    ]  # fmt: skip
    assert parts[0] == parts[1]
    return {"values": values(fresh)}


def refused(folder):
    """What would train apart, or not at all, in silence."""
    if WORLD == 1:
        return {}
    model = Net(0)
    early = adamw(model.parameters())
    with pytest.raises(ConfigError, match="none of the model's"):
        Trainer(shared(model), mse_loss, early).train(data(), **HOW)
    model = Net(0)
    with torch.no_grad():
        model.head.weight[0] = 0
    slimkit.freeze_zeros(model)
    with pytest.raises(UnsupportedError, match="before fully_shard"):
        Trainer(shared(model), mse_loss, adamw).train(data(), **HOW)
    inner = Net(0)
    with pytest.raises(ConfigError, match="must call the model"):
        Trainer(inner, optimizer=adamw, compute_loss=lambda _, b: mse_loss(inner(b[0]), b[1])).train(data(), **HOW)
    half = Net(0)
    meshes = [dist.device_mesh.DeviceMesh("cpu", [r]) for r in range(WORLD)]
    fully_shard(half, mesh=meshes[RANK])
    with pytest.raises(UnsupportedError, match="1 of 2 processes"):
        Trainer(half, mse_loss, adamw).train(data(), **HOW)
    # What works on weights as they are would take a part for all of it.
    whole_only = shared(Net(0))
    (term,) = [{"func_name": "KDMse", "func_weight": 1.0}]
    config = KnowledgeDistillConfig().add_output_soft_label({"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]})
    for call in (
        lambda: slimkit.Compressor(whole_only, slimkit.SparseConfig(method="magnitude")),
        lambda: slimkit.make_student(whole_only, layers=1),
        lambda: slimkit.save_w16a16s(folder / f"w{RANK}", whole_only),
        lambda: slimkit.export_onnx(whole_only, data()[:1][0], folder / f"x{RANK}.onnx"),
        lambda: slimkit.TeacherCache.build(whole_only, [data()[:1][0]], config, folder / f"c{RANK}"),
        lambda: slimkit.Pruner(whole_only, data()[:1][0]),
    ):
        with pytest.raises(UnsupportedError, match="whole parameters"):
            call()
    # A disk that fails in the first process fails in all.
    (folder / "file").write_text("in the way") if RANK == 0 else None
    dist.barrier()
    model = shared(Net(0))
    with pytest.raises(OSError):
        Trainer(model, mse_loss, adamw, [Save(folder / "file" / "run", 2, False)]).train(data(), **HOW)
    with pytest.raises(OSError):
        slimkit.save_checkpoint(model, folder / "file" / "model.safetensors")
    return {}


CASES = (plain, tokens, distilled, zeros, deltas, deltas_after, resumed, files, refused)


def main(folder, names):
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo")
    found = {case.__name__: case(folder) for case in CASES if case.__name__ in names or not names}
    (folder / f"{WORLD}-{RANK}.json").write_text(json.dumps(found))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
