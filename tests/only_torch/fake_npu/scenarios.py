"""What slimkit does to models on a device called npu; run in a process of its own, whose torch keeps the device.

Prints one JSON object: scenario -> null, or the error it ended in.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
import traceback

from tests.only_torch import fake_npu
from tests.only_torch.fake_npu import folders

import torch
from torch import nn
from torch.nn import functional

DEVICE = None


class Net(nn.Module):
    """A convolution, a norm, an attention layer and a head, in few numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.deep(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def network():
    torch.manual_seed(0)
    return Net()


def images(n=8):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def on_device(model):
    return all(t.device.type == "npu" for t in model.state_dict().values())


def compare(model, twin, tolerance=1e-4):
    """The model on the device answers like its twin on the CPU."""
    gap = (model.eval()(images().npu()).cpu() - twin.eval()(images())).abs().max().item()
    assert gap <= tolerance, gap  # float32, both computed by the CPU's kernels


def the_device_is_one():
    assert torch.accelerator.current_accelerator().type == "npu"
    try:
        torch.ones(2).npu() + torch.ones(2)
    except RuntimeError:
        return
    raise AssertionError("a device that mixes with the CPU proves nothing")


def prune():
    from slimkit import Pruner

    twin, model = network(), network().npu()
    expected = Pruner(twin, images()).set_alignment(4).prune(0.6)
    found = Pruner(model, images().npu()).set_alignment(4).prune(0.6)
    assert {k: v for k, v in found.items() if k != "report"} == {k: v for k, v in expected.items() if k != "report"}
    assert on_device(model)
    compare(model, twin)


def prune_with_compensation_and_gradients():
    from slimkit import Pruner

    model = network().npu()
    batches = [images().npu(), images().npu() * 0.5]
    Pruner(model, images().npu()).set_alignment(4).set_compensation(batches).prune(0.6)
    assert on_device(model)
    model = network().npu()
    labelled = [(images().npu(), torch.zeros(8, dtype=torch.long).npu())]
    pruner = Pruner(model, images().npu()).set_alignment(4)
    pruner.set_importance_evaluation_function(
        "taylor", calibration=labelled, loss=lambda output, batch: functional.cross_entropy(output, batch[1])
    ).prune(0.6)
    assert on_device(model)


def sparsify():
    from slimkit import Compressor, SparseConfig

    for method in ("magnitude", "wanda", "hessian", "par"):
        twin, model = network(), network().npu()
        cfg = SparseConfig(method=method, sparse_ratio=0.5, min_tokens=1)
        Compressor(twin, cfg).compress([images()])
        Compressor(model, cfg).compress([images().npu()])
        assert on_device(model)
        for name, weight in model.named_parameters():
            same = ((weight.cpu() == 0) == (twin.get_parameter(name) == 0)).float().mean().item()
            # The device calculates in float32 and the CPU in float64: near ties may fall the other way.
            assert same > 0.97, (method, name, same)


def linear_algebra_that_the_device_lacks_runs_on_the_cpu_and_says_so_once():
    from slimkit import Compressor, SparseConfig

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("slimkit").addHandler(handler)
    operators = ("linalg_cholesky_ex", "linalg_solve_triangular")
    for operator in operators:
        DEVICE.forbid(f"aten::{operator}")
    try:
        model = network().npu()
        cfg = SparseConfig(method="hessian", sparse_ratio=0.5, min_tokens=1)
        Compressor(model, cfg).compress([images().npu()])
    finally:
        for operator in operators:
            DEVICE.allow(f"aten::{operator}")
        logging.getLogger("slimkit").removeHandler(handler)
    assert on_device(model)
    zeros = (model.hidden.weight == 0).float().mean().item()
    assert abs(zeros - 0.5) < 0.02, zeros
    for what in ("cholesky", "inverse_lower"):
        lines = [line for line in said if line.startswith(f"{what} is missing on npu")]
        assert len(lines) == 1, said
        assert "no kernel on this device" in lines[0]


def train_a_lora_and_carry_it_to_the_cpu():
    from slimkit import apply_delta, freeze_delta, load_delta, merge_delta, save_delta

    model, fresh = network().npu(), network()
    apply_delta(model, "lora", ["hidden", "head"], rank=2, alpha=4)
    freeze_delta(model, "lora")
    model.eval()  # the norm's statistics belong to the base and do not travel
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(images().npu()), torch.zeros(8, dtype=torch.long).npu()).backward()
        optimizer.step()
    assert on_device(model)
    with tempfile.TemporaryDirectory() as folder:
        save_delta(model, folder)
        load_delta(fresh, folder)
    compare(model, fresh)
    merge_delta(model)
    assert on_device(model)
    compare(model, fresh)


def freeze():
    from slimkit import ModelFreezer, freeze_modules

    model = network().npu()
    report = freeze_modules(model, include=["conv.*"])
    assert report.frozen == ("conv.weight", "conv.bias")
    ModelFreezer(model).unfreeze()
    assert all(p.requires_grad for p in model.parameters())


def save_and_load():
    from slimkit import Pruner, load_checkpoint, load_pruned, save_checkpoint, save_pruned

    model = network().npu()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, f"{folder}/net.safetensors")
        for fresh in (network().npu(), network()):
            with torch.no_grad():
                fresh.head.bias.add_(1.0)
            load_checkpoint(f"{folder}/net.safetensors", fresh, strict_load=True)
            assert torch.equal(fresh.head.bias.cpu(), model.head.bias.cpu())
        desc = Pruner(model, images().npu()).set_alignment(4).prune(0.6)
        save_pruned(f"{folder}/pruned", model, desc)
        fresh = network().npu()
        load_pruned(f"{folder}/pruned", fresh)
        assert on_device(fresh)
        assert torch.equal(fresh.hidden.weight.cpu(), model.hidden.weight.cpu())


def distil_a_step():
    from slimkit import KnowledgeDistillConfig, get_distill_model

    config = KnowledgeDistillConfig()
    outputs = {"t_output_idx": 0, "s_output_idx": 0}
    config.add_output_soft_label({**outputs, "loss_func": [{"func_name": "KDMse", "func_weight": 1}]})
    config.add_inter_soft_label({
        "t_module": "hidden", "s_module": "hidden", "t_output_idx": 0, "s_output_idx": 0,
        "loss_func": [{"func_name": "HiddenMse", "func_weight": 1}],
    })  # fmt: skip
    student = network().npu()
    with torch.no_grad():
        student.head.weight.mul_(0.5)
    dual = get_distill_model(network().npu(), student, config)
    soft, mine, theirs = dual(images().npu())
    assert {t.device.type for t in (soft, mine, theirs)} == {"npu"}
    before = student.head.weight.detach().clone()
    dual.get_total_loss().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert not torch.equal(before, student.head.weight)
    assert dual.get_student_model() is student


def measure_and_export():
    from slimkit import export_onnx
    from slimkit.measurement import measure_model

    model = network().npu()
    assert measure_model(model, images().npu(), 0.01).macs == measure_model(network(), images(), 0.01).macs
    with tempfile.TemporaryDirectory() as folder:
        assert export_onnx(model, images().npu(), f"{folder}/net.onnx").max_difference < 1e-4
    assert on_device(model)
    assert on_device(copy.deepcopy(model))


NETS = """
import torch
from tests.only_torch.fake_npu.scenarios import Net

def net():
    torch.manual_seed(0)
    return Net()
"""


def the_commands_compute_where_they_are_told():
    import os
    from pathlib import Path

    import numpy as np
    from typer.testing import CliRunner

    from slimkit.cli import app
    from slimkit.jobs import TorchJobs

    seen = []
    opened = TorchJobs.open

    def watched(self, *arguments):
        found = opened(self, *arguments)
        seen.append({t.device.type for t in found.model.state_dict().values()})
        return found

    before = os.getcwd()
    TorchJobs.open = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("nets.py").write_text(NETS)
            np.savez("x.npz", x=images().numpy(), labels=np.arange(8) % 4)
            np.save("calib.npy", images().numpy())
            net = ("--factory", "nets.py:net", "--device", "npu:0", "-q")
            example = ("--example", "2,3,8,8")
            weights = ("--model", "s")
            for command in (
                ("prune", *net, *example, "--align", "4", "-r", "0.7", "-o", "p"),
                ("sparsify", *net, "--model", "p", "--calib", "calib.npy", "-o", "s"),
                ("adapt", *net, *weights, "-d", "x.npz", "--rank", "2", "--eval", "x.npz", "-o", "a"),
                # accelerate does not know this device and trains on the CPU, where the teacher does not follow.
                ("distill", *net, "--student", "p", "-d", "calib.npy", "-o", "d", "--dry-run"),
                ("export", *net, *weights, *example, "--delta", "a", "-o", "m.onnx"),
                ("inspect", "s", *net[:-1], *example, "--macs", "-q"),
            ):
                done = CliRunner().invoke(app, list(command))
                assert done.exit_code == 0, (command[0], done.exception, traceback.format_exception(done.exception))
            assert seen, "no command opened a model"
            assert all(kinds == {"npu"} for kinds in seen), seen
            too_many = CliRunner().invoke(app, ["inspect", "s", *net[:2], "--device", "npu:7", *example, "--macs"])
            assert "counted from 0" in str(too_many.exception), too_many.exception
    finally:
        TorchJobs.open = opened
        os.chdir(before)


def a_folder_block_by_block():
    folders.sparsified_block_by_block_in_little_memory(DEVICE)


SCENARIOS = [
    the_commands_compute_where_they_are_told,
    the_device_is_one, prune, prune_with_compensation_and_gradients, sparsify, train_a_lora_and_carry_it_to_the_cpu,
    freeze, save_and_load, distil_a_step, measure_and_export,
    linear_algebra_that_the_device_lacks_runs_on_the_cpu_and_says_so_once, a_folder_block_by_block,
]  # fmt: skip


def main():
    global DEVICE
    DEVICE = fake_npu.build()
    wanted = sys.argv[1:]
    found = {}
    for scenario in SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        try:
            scenario()
            found[scenario.__name__] = None
        except Exception:  # noqa: BLE001  # the test that reads this shows it
            found[scenario.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
