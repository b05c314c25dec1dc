"""Run alone: what most users of slimkit_ms do, once each, so that a test reads what MindSpore says of it."""

import sys
import tempfile
from pathlib import Path

import numpy as np

import slimkit_ms
from tests.only_ms.two_workers import Pairs

import mindspore as ms
from mindspore import nn


def net(width):
    """Two layers."""
    return nn.SequentialCell(nn.Dense(5, width), nn.ReLU(), nn.Dense(width, width), nn.ReLU(), nn.Dense(width, 2))


def main(folder):
    """Every job, small."""
    ms.set_device("CPU")
    for name in slimkit_ms.__all__:
        getattr(slimkit_ms, name)
    x = ms.Tensor(np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32))
    teacher, student = net(16), net(16)
    slimkit_ms.PruneMindSpore(student, x).set_alignment(1).prune(0.7)
    slimkit_ms.Compressor(student, slimkit_ms.SparseConfig(method="par")).compress([x])
    slimkit_ms.freeze_zeros(student)
    losses = [{"func_name": "KDMse", "func_weight": 1}]
    label = {"t_output_idx": 0, "s_output_idx": 0, "loss_func": losses}
    config = slimkit_ms.KnowledgeDistillConfig().set_hard_label(0.5, 0).add_output_soft_label(label)
    slimkit_ms.get_distill_model(teacher, student, config)(x)
    trainer = slimkit_ms.Trainer(student, nn.MSELoss(), lambda p: nn.Adam(p, learning_rate=0.01))
    trainer.train(Pairs(), 1, per_device_batch_size=8)
    slimkit_ms.apply_delta(teacher, "lora", ["*"], rank=2)
    slimkit_ms.freeze_delta(teacher, "lora")
    slimkit_ms.save_delta(teacher, folder / "lora")
    slimkit_ms.load_delta(net(16), folder / "lora")
    slimkit_ms.merge_delta(teacher)
    layer = slimkit_ms.LoRADense(8, 16, 8, 16)
    layer.shard(strategy_org_dense_matmul=((2, 1), (4, 1)), strategy_lora_a_matmul=((2, 1), (1, 1)))
    slimkit_ms.export_mindir(student, x, folder / "student.mindir")
    print("done")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
    sys.exit(0)
