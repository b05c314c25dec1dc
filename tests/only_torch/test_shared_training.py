"""The trainer on models of which each process holds a part (FSDP2): two processes do as one, and nothing is silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slimkit
from slimkit import together
from tests.only_torch.test_sparse_checkpoint_processes import processes

import torch

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "shared_training.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the cases of the script gave: in one process, and in the first and the second of two."""
    folder = tmp_path_factory.mktemp("shared")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how in ([], torchrun):  # the second goes on from a checkpoint of the first
        command = [sys.executable, *how, str(SCRIPT), str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("case", ["plain", "tokens", "distilled", "zeros", "deltas", "deltas_after", "files"])
def test_two_processes_with_parts_of_a_model_train_as_one(found, case):
    one, first, second = (each[case] for each in found)
    assert first == second
    assert set(one) == set(first)
    for name, values in one.items():
        if name == "values":
            assert set(values) == set(first[name])
            for path, value in values.items():
                # float32: gradients are means of the processes' means
                np.testing.assert_allclose(first[name][path], value, atol=1e-6, err_msg=path)
        else:
            np.testing.assert_allclose(first[name], values, atol=3e-6, err_msg=name)
    assert case == "files" or one["train_loss_epoch"][1] < one["train_loss_epoch"][0]


@pytest.mark.parametrize("case", ["resumed", "refused"])
def test_each_process_asserts_for_itself(found, case):
    assert all(each[case] == {} for each in found)


def test_an_evaluation_reads_no_ready_batch_twice():
    from slimkit.core.train.loading import LoaderOptions, shared_out

    def read(epoch):
        how = [LoaderOptions(0, epoch, rank, 3, None, {"shuffle": False}) for rank in range(3)]
        return [list(shared_out([1, 2, 3, 4], options)) for options in how]

    assert read(1) == [[1, 4], [2, 1], [3, 1]]
    assert read(0) == [[1, 4], [2], [3]]


def test_zeros_stay_in_a_parameter_that_took_the_place_of_another():
    from slimkit import freeze_zeros

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    freeze_zeros(model)
    model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert not model[0].weight[:, ::2].any()
    assert model[0].weight[:, 1::2].all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_trainer_from_before_the_processes_joined_hinders_no_later_one():
    def trained():
        torch.manual_seed(0)
        model, x = torch.nn.Linear(3, 2), torch.arange(12.0).reshape(4, 3)
        data = torch.utils.data.TensorDataset(x, x[:, :2])
        trainer = slimkit.Trainer(model, torch.nn.functional.mse_loss, lambda ps: torch.optim.SGD(ps, lr=0.01))
        trainer.train(data, 1, per_device_batch_size=4 // together.processes())
        return trainer.accelerator.num_processes, model.weight.detach().numpy()

    alone, expected = trained()  # accelerate remembers one process

    def work():
        together.join(torch.device("cpu"))
        seen, weight = trained()
        np.testing.assert_allclose(weight, expected, rtol=1e-5)
        os._exit(10 + seen)

    assert (alone, processes(2, work)[0]) == (1, [12, 12])
