"""The torch trainer's own: accelerate, data loaders, precision, two processes, HF Trainer and Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimkit import KnowledgeDistillConfig, Trainer, get_distill_model
from slimkit.core.errors import ConfigError, UnsupportedError

import torch

FOLDER = Path(__file__).parent


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=generator)
    return torch.utils.data.TensorDataset(x, x @ torch.randn(5, 2, generator=generator))


MSE = torch.nn.functional.mse_loss


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    script = str(FOLDER / "two_processes.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    one = subprocess.run([sys.executable, script, tmp_path, "8"], env=env, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr[-2000:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    two = subprocess.run([*command, tmp_path, "4"], env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-2000:]
    single, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    for name in ("loss", "eval", "distilled"):
        assert first[name] == second[name]
        # the same samples per update; means of means in float32
        np.testing.assert_allclose(first[name], single[name], rtol=1e-5)
    assert single["config"]["train_total_batch_size"] == first["config"]["train_total_batch_size"] == 16
    assert first["config"]["is_distributed"]
    assert not single["config"]["is_distributed"]
    assert [c["config"]["is_world_process_zero"] for c in (first, second)] == [True, False]
    assert first["config"]["num_update_steps_per_epoch"] == single["config"]["num_update_steps_per_epoch"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffling_loader_with_dropout_resumes_to_the_bit(tmp_path, workers):
    loader = torch.utils.data.DataLoader(data(), batch_size=8, shuffle=True, num_workers=workers)

    class Save:
        def on_step_end(self, trainer):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "at")

    def make(callbacks=()):
        return Trainer(net(), MSE, lambda p: torch.optim.AdamW(p, lr=0.01), callbacks)

    step = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)
    whole = make([Save()]).train(loader, 2, create_scheduler_fn=step)
    torch.manual_seed(99)
    resumed = make().train(loader, 2, create_scheduler_fn=step, resume_from=tmp_path / "at")
    assert resumed.state_dict() == whole.state_dict()


def test_bf16_trains_and_leaves_the_model_as_it_was():
    model = net()
    forward = model.forward
    history = Trainer(model, MSE, mixed_precision="bf16").train(data(), 2)
    assert Trainer(net(), MSE, mixed_precision="bf16").accelerator.mixed_precision == "bf16"
    losses = history.get_metric_values("train_loss_epoch")
    assert losses[1] < losses[0]
    assert model.forward == forward
    assert next(model.parameters()).dtype == torch.float32
    assert Trainer(net(), MSE, mixed_precision="no").train(data(), 1).get_latest_metric("train_loss_epoch") > 0


def test_a_model_that_returns_its_loss_needs_no_loss_func():
    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {"loss": MSE(self.net(x), labels)}

    batches = [{"x": x[None], "labels": y[None]} for x, y in data()]
    assert Trainer(WithLoss()).train(batches, 1).get_latest_metric("train_loss_epoch") > 0
    with pytest.raises(ConfigError, match="no scalar loss"):
        Trainer(net()).train([torch.ones(2, 5)], 1)


def test_frozen_batch_norms_stay_in_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    Trainer(model, MSE).train(data(), 1)
    assert torch.equal(model[1].running_mean, before)


def test_frozen_zeros_stay_zero_through_the_trainer():
    from slimkit import freeze_zeros

    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    before = model[0].weight.detach().clone()
    with freeze_zeros(model):
        Trainer(model, MSE).train(data(), 2)
    assert (model[0].weight[:, ::2] == 0).all()
    assert (model[0].weight[:, 1::2] != before[:, 1::2]).all()


def distilled():
    teacher, student = net(), net()
    config = (
        KnowledgeDistillConfig()
        .set_hard_label(0.5, 0)
        .add_output_soft_label(
            {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDMse", "func_weight": 1}]}
        )
    )
    return get_distill_model(teacher, student, config)


def test_the_terms_of_a_distillation_are_recorded():
    dual = distilled()
    history = Trainer(dual, MSE, metrics={"gap": lambda out, y: (out - y).abs().mean()}).train(data(), 2, data())
    assert len(history.get_metric_values("train_output/KDMse_epoch")) == 2
    assert len(history.get_metric_values("eval_gap_epoch")) == 2


@pytest.mark.slow
def test_hugging_face_trainer_trains_a_distillation(tmp_path):
    from transformers import Trainer as HFTrainer
    from transformers import TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dual = distilled()

        def forward(self, x, labels):
            _, student, _ = self.dual(x)
            return {"loss": self.dual.get_total_loss(MSE(student, labels))}

    model = Wrapped()
    before = model.dual.student_model[0].weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    samples = [{"x": x, "labels": y} for x, y in data()]
    result = HFTrainer(model, arguments, train_dataset=samples).train()
    assert result.training_loss > 0
    assert not torch.equal(model.dual.get_student_model()[0].weight, before)


@pytest.mark.slow
def test_lightning_trains_a_distillation(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.dual = distilled()

        def training_step(self, batch, _):
            _, student, _ = self.dual(batch[0])
            return self.dual.get_total_loss(MSE(student, batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.dual.parameters(), lr=0.1)

    module = Module()
    before = module.dual.student_model[0].weight.detach().clone()
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=8))
    assert not module.dual.teacher_model.training
    assert not torch.equal(module.dual.get_student_model()[0].weight, before)


class Wide(torch.optim.Optimizer):
    """An optimizer over bfloat16 parameters that keeps its moments in float32, and a byte of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": torch.tensor(0.1)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                moment = state.setdefault("moment", torch.zeros(p.shape))
                moment.mul_(0.9).add_(p.grad.float(), alpha=0.1)
                state["code"] = torch.tensor([7], dtype=torch.uint8)
                p.add_((group["lr"] * moment).to(p.dtype), alpha=-1)


def test_an_optimizers_state_comes_back_in_its_own_type(tmp_path):
    from slimkit import Trainer

    class Save:
        def on_step_end(self, trainer):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "at")

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    batches = [(x * i, torch.ones(4, 1).bfloat16()) for i in range(1, 5)]

    def run(callbacks, **more):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).bfloat16()
        trainer = Trainer(model, torch.nn.functional.mse_loss, Wide, callbacks=callbacks)
        losses = trainer.train(batches, 2, **more).get_metric_values("train_loss_step")
        return losses, trainer.optimizer

    whole, _ = run([Save()])
    resumed, optimizer = run([], resume_from=tmp_path / "at")
    assert resumed == whole  # to the bit, which rounded moments would not give
    for state in optimizer.state.values():
        assert (state["moment"].dtype, state["code"].dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.empty(2, device="meta"), "meta device"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (object(), "object"),
    ],
)
def test_an_optimizer_state_that_no_file_holds_is_refused_when_it_is_saved(tmp_path, state, words):
    from slimkit import Trainer

    class Holds(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["odd"] = state

    class Save:
        def on_step_end(self, trainer):
            trainer.save_checkpoint(tmp_path / "at")

    trainer = Trainer(
        torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, lambda p: Holds(p, lr=0.1), callbacks=[Save()]
    )
    with pytest.raises(UnsupportedError, match=words):
        trainer.train([(torch.ones(2, 3), torch.ones(2, 1))], 1)
    assert not list(tmp_path.iterdir())
