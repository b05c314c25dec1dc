"""The MindSpore trainer's own: compiled graphs, dataset pipelines, mappings, two workers under msrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimkit.core.errors import ConfigError
from slimkit_ms import TrainableParamsCheckPoint, Trainer
from tests.both.test_train import Pairs, by_hand
from tests.only_ms.two_workers import Pairs as Shared

import mindspore as ms
from mindspore import nn

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _device():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


@pytest.fixture
def graph():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


def net():
    cell = nn.SequentialCell(nn.Dense(5, 4), nn.ReLU(), nn.Dense(4, 2))
    rng = np.random.default_rng(0)
    for p in cell.get_parameters():
        p.set_data(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32) * 0.3))
    return cell


def sgd(parameters):
    return nn.SGD(parameters, learning_rate=0.1)


def test_a_compiled_graph_trains_as_numpy_does(graph):
    trainer = Trainer(net(), nn.MSELoss(), sgd)
    history = trainer.train(Pairs(), 2, gradient_accumulation_steps=2, gradient_clip_value=0.5)
    expected = by_hand(2, accumulate=2, clip=0.5)
    # float32 against float32 in another order of sums
    np.testing.assert_allclose(history.get_metric_values("train_loss_step"), expected, rtol=2e-5)
    assert trainer.evaluate(Pairs())["loss"] > 0


def test_a_pipeline_is_shuffled_by_the_seed_and_resumes_to_the_bit(tmp_path):
    def data():
        return ms.dataset.GeneratorDataset(Pairs(), ["x", "y"], shuffle=True).batch(8)

    class Save:
        def on_step_end(self, trainer):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "at")

    def make(callbacks=()):
        return Trainer(net(), nn.MSELoss(), lambda p: nn.Adam(p, learning_rate=0.01), callbacks)

    whole = make([Save()]).train(data(), 2)
    resumed = make().train(data(), 2, resume_from=tmp_path / "at")
    assert resumed.state_dict() == whole.state_dict()
    other = make().train(data(), 2, seed=1)
    assert other.state_dict() != whole.state_dict()


def test_keys_of_a_mapping_are_arguments_of_the_cell():
    class Named(nn.Cell):
        def __init__(self):
            super().__init__()
            self.net = net()

        def construct(self, x, scale):
            return self.net(x) * scale

    one = ms.Tensor(1.0, ms.float32)
    batches = [{"scale": one, "x": ms.Tensor(Pairs().x), "labels": ms.Tensor(Pairs().y)}]
    found = Trainer(Named(), nn.MSELoss(), sgd).train(batches, 1).get_metric_values("train_loss_step")
    np.testing.assert_allclose(found, by_hand(1, batch_size=40), rtol=1e-5)
    with pytest.raises(ValueError, match="first arguments"):
        Trainer(Named(), nn.MSELoss(), sgd).train([{"y": one, "labels": one}], 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_fp16_trains_close_to_float32_and_is_undone(compiled, request):
    if compiled:
        request.getfixturevalue("graph")
    model = net()
    half = (
        Trainer(model, nn.MSELoss(), sgd, mixed_precision="fp16").train(Pairs(), 1).get_metric_values("train_loss_step")
    )
    # three digits of fp16 in each matrix product
    np.testing.assert_allclose(half, by_hand(1), rtol=2e-2)
    assert (np.array(half) != by_hand(1).astype(np.float32)).any()
    assert model(ms.Tensor(Pairs().x)).dtype == ms.float32
    assert all(p.dtype == ms.float32 for p in model.get_parameters())


class Watch(ms.train.Callback):
    """What a user's own MindSpore callback sees."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at, self.steps, self.losses = stop_at, [], []

    def on_train_step_end(self, run_context):
        seen = run_context.original_args()
        self.steps.append((seen.cur_epoch_num, seen.cur_step_num, seen.batch_num))
        self.losses.append(float(seen.net_outputs))
        if seen.cur_step_num == self.stop_at:
            run_context.request_stop()


@pytest.mark.parametrize("compiled", [False, True])
def test_mindspore_callbacks_see_a_model_at_work(compiled, request):
    if compiled:
        request.getfixturevalue("graph")
    watch = Watch()
    trainer = Trainer(net(), nn.MSELoss(), sgd, callbacks=[watch])
    history = trainer.train(Pairs(), 2, gradient_accumulation_steps=2)
    updates = trainer.run_config.num_update_steps_per_epoch
    expected = [(1 + k // updates, k + 1, updates) for k in range(2 * updates)]
    assert watch.steps == expected
    # the same numbers, once read from the device each and once all together
    np.testing.assert_allclose(watch.losses, history.get_metric_values("train_loss_step"), rtol=1e-6)


def test_a_mindspore_callback_ends_the_run():
    trainer = Trainer(net(), nn.MSELoss(), sgd, callbacks=[Watch(stop_at=2)])
    history = trainer.train(Pairs(), 3)
    assert len(history.get_metric_values("train_loss_step")) == 2
    assert len(history.get_metric_values("train_loss_epoch")) == 1
    assert "callback" in trainer.stop_reason


def test_a_delta_checkpoint_callback_serves_the_trainer(tmp_path):
    cell = net()
    for p in cell[0].get_parameters():
        p.requires_grad = False
    keep = TrainableParamsCheckPoint(str(tmp_path / "delta"), config=ms.train.CheckpointConfig(save_checkpoint_steps=1))
    Trainer(cell, nn.MSELoss(), sgd, callbacks=[keep]).train(Pairs(), 1)
    (last,) = sorted((tmp_path / "delta").glob("*.ckpt"), key=lambda f: f.stat().st_mtime)[-1:]
    found = ms.load_checkpoint(str(last))
    assert set(found) == {"2.weight", "2.bias"}
    np.testing.assert_array_equal(found["2.weight"].asnumpy(), cell[2].weight.asnumpy())


def test_an_error_in_a_step_reaches_the_caller_and_the_modes_come_back():
    cell = nn.SequentialCell(nn.Dense(5, 4), nn.Dropout(p=0.5), nn.Dense(4, 2))
    cell.set_train(False)
    with pytest.raises(ConfigError, match="no such thing"):
        Trainer(cell, compute_loss=refuse).train(Pairs(), 1)
    assert not any(c.training for _, c in cell.cells_and_names())
    # A gradient broken off within the forward leaves nothing that the next one trips over.
    norm = nn.SequentialCell(nn.Dense(5, 4), nn.LayerNorm((4,)), nn.Dense(4, 2))
    assert np.isfinite(Trainer(norm, nn.MSELoss(), sgd).train(Pairs(), 1).get_latest_metric("train_loss_epoch"))


def refuse(model, batch):
    raise ConfigError("no such thing")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_workers_have_the_loss_curve_of_one(tmp_path):
    script = str(FOLDER / "two_workers.py")
    bin_folder = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER.parents[1]),
        "GLOG_v": "3",
    }
    one = subprocess.run([sys.executable, script, tmp_path, "8"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert one.returncode == 0, one.stderr[-2000:]
    command = [
        f"{bin_folder}/msrun",
        "--worker_num=2",
        "--local_worker_num=2",
        f"--master_port={free_port()}",
        "--join=True",
    ]
    command += [f"--log_dir={tmp_path / 'log'}", script, str(tmp_path), "4"]
    two = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert (tmp_path / "2-1.json").exists(), two.stdout[-2000:] + two.stderr[-2000:]
    single, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    for name in ("loss", "eval"):
        assert first[name] == second[name]
        # the same samples per update; means of means in float32
        np.testing.assert_allclose(first[name], single[name], rtol=1e-5)
    assert single["config"]["train_total_batch_size"] == first["config"]["train_total_batch_size"] == 8
    assert first["config"]["is_distributed"]
    assert [c["config"]["is_world_process_zero"] for c in (first, second)] == [True, False]
    assert len(Shared()) == 40
