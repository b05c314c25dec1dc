"""TrainableParamsCheckPoint on PyTorch in a plain loop, in slimkit's trainer, in Hugging Face's and in Lightning's."""

import os

import numpy as np
import pytest

from slimkit.checkpoint import CheckpointConfig, TrainableParamsCheckPoint, load_checkpoint, load_param_into_net
from slimkit.core import files
from slimkit.core.errors import ArgumentTypeError, PlanError

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.norm, self.head = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.base.requires_grad_(False)

    def forward(self, x, labels=None):
        out = self.head(self.norm(self.base(x)))
        return out if labels is None else {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


TRAINABLE = ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def test_a_plain_loop(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    saver = TrainableParamsCheckPoint(tmp_path, "D", CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2))
    for epoch in (1, 2):
        for _ in range(3):
            update(model, optimizer)
            saver.step_end(model, epoch=epoch)
    saver.end(model)
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors")
    assert names == ["D-2_1.safetensors", "D-2_3.safetensors"]
    held = load_checkpoint(saver.latest_ckpt_file_name)
    assert sorted(held) == TRAINABLE
    assert all(torch.equal(v, dict(model.named_parameters())[n]) for n, v in held.items())


def test_the_seeds_recipe_pretrained_then_delta(tmp_path):
    torch.manual_seed(1)
    pretrained, tuned = Net(), Net()
    tuned.load_state_dict(pretrained.state_dict())
    torch.save(pretrained.state_dict(), tmp_path / "pretrained.pt")
    update(tuned, torch.optim.SGD(tuned.parameters(), 0.1))
    saver = TrainableParamsCheckPoint(tmp_path / "delta", batch_norm_statistics=True)
    saver.step_end(tuned)
    fresh = Net()
    load_param_into_net(fresh, tmp_path / "pretrained.pt", strict_load=True)
    report = load_param_into_net(fresh, saver.latest_ckpt_file_name)
    assert report.missing == ["base.weight", "base.bias"]
    x = torch.randn(3, 4)
    assert torch.equal(fresh.eval()(x), tuned.eval()(x))


def test_going_on_with_the_optimizers_state_is_exact(tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        model = Net()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model, optimizer = start(0)
    saver = TrainableParamsCheckPoint(tmp_path, batch_norm_statistics=True, optimizer_state=True)
    for _ in range(3):
        update(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    saver.step_end(model, optimizer=optimizer)
    base = {n: v.clone() for n, v in model.base.state_dict().items()}
    path = saver.latest_ckpt_file_name
    torch.manual_seed(5)
    update(model, optimizer)
    again, other = start(1)
    again.base.load_state_dict(base)
    load_param_into_net(again, path, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.05
    torch.manual_seed(5)
    update(again, other)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    with pytest.raises(PlanError, match="no place in the network"):
        load_param_into_net(again, path)
    load_param_into_net(again, path, filter_prefix="optimizer")
    with pytest.raises(ArgumentTypeError, match="optimizer_state=True"):
        saver.step_end(model)
    plain = TrainableParamsCheckPoint(tmp_path, "PLAIN")
    plain.step_end(model)
    with pytest.raises(PlanError, match="no optimizer state"):
        load_param_into_net(again, plain.latest_ckpt_file_name, optimizer=other)


def test_background_other_network_values_and_pt_format(tmp_path):
    model = Net()
    config = CheckpointConfig(
        async_save=True, saved_network=model.head, append_info=["step_num", {"lr": 0.1}], format="pt"
    )
    saver = TrainableParamsCheckPoint(tmp_path, config=config)
    saver.step_end(model, step=7, epoch=2)
    saver.end(model)
    held = load_checkpoint(saver.latest_ckpt_file_name)
    assert saver.latest_ckpt_file_name.endswith(".pt")
    assert {n: v for n, v in held.items() if not isinstance(v, torch.Tensor)} == {"step_num": 7, "lr": 0.1}
    assert set(held) == {"weight", "bias", "step_num", "lr"}


def test_slimkits_trainer(tmp_path):
    from slimkit.train import Trainer

    saver = TrainableParamsCheckPoint(tmp_path, config=CheckpointConfig(keep_checkpoint_max=0), optimizer_state=True)
    batches = [(torch.randn(4, 4), torch.randn(4, 1)) for _ in range(3)]
    Trainer(Net(), torch.nn.functional.mse_loss, callbacks=[saver]).train(batches, num_epochs=2)
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors")
    assert names == [f"DELTA_CKP-{e}_{s}.safetensors" for e in (1, 2) for s in (1, 2, 3)]


def test_hugging_faces_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"x": np.float32(np.ones(4)), "labels": np.float32([1])} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    saver = TrainableParamsCheckPoint(tmp_path / "delta", optimizer_state=True)
    Trainer(Net(), arguments, train_dataset=rows, callbacks=[saver]).train()
    names = sorted(p.name for p in (tmp_path / "delta").iterdir() if p.suffix == ".safetensors")
    assert names == [f"DELTA_CKP-{e}_{s}.safetensors" for e in (1, 2) for s in (1, 2)]
    assert set(TRAINABLE) <= set(load_checkpoint(saver.latest_ckpt_file_name))


def test_lightnings_trainer(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    saver = TrainableParamsCheckPoint(tmp_path / "delta")
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[saver], logger=False, enable_checkpointing=True, enable_progress_bar=False,
        default_root_dir=tmp_path, accelerator="cpu", enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 4), 4))
    names = sorted(p.name for p in (tmp_path / "delta").iterdir() if p.suffix == ".safetensors")
    assert names == [f"DELTA_CKP-{e}_{s}.safetensors" for e in (1, 2) for s in (1, 2)]
    assert sorted(load_checkpoint(saver.latest_ckpt_file_name)) == [f"net.{n}" for n in TRAINABLE]


def test_wrapped_models_are_saved_under_their_own_names(tmp_path):
    saver = TrainableParamsCheckPoint(tmp_path)
    saver.step_end(torch.nn.DataParallel(Net()))
    assert sorted(load_checkpoint(saver.latest_ckpt_file_name)) == TRAINABLE
    with pytest.raises(AttributeError):
        _ = saver.nonsense


def test_the_only_file_stays_until_the_next_one_is_whole(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 1)
    saver = TrainableParamsCheckPoint(tmp_path, config=CheckpointConfig(keep_checkpoint_max=1))
    saver.step_end(model)
    first = saver.latest_ckpt_file_name
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            saver.step_end(model)
    assert sorted(load_checkpoint(first)) == ["bias", "weight"]
    saver.step_end(model)
    left = [p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    assert left == [os.path.basename(saver.latest_ckpt_file_name)]


def test_views_that_are_worked_out_on_reading_are_saved_as_what_they_show(tmp_path):
    import slimkit

    x = torch.view_as_complex(torch.arange(6.0).reshape(3, 2))
    views = {"conjugate": x.conj(), "negated": x.conj().imag, "plain": x}
    for ending in (".safetensors", ".pt"):
        slimkit.save_checkpoint(views, tmp_path / f"x{ending}")
        found = slimkit.load_checkpoint(tmp_path / f"x{ending}")
        for name, view in views.items():
            assert torch.equal(found[name], view.resolve_conj().resolve_neg()), name


def test_numbers_alone_come_back_from_every_format(tmp_path):
    import slimkit

    for ending in (".safetensors", ".pt"):
        slimkit.save_checkpoint({"epoch": 3, "loss": 0.5, "name": "x"}, tmp_path / f"x{ending}")
        assert slimkit.load_checkpoint(tmp_path / f"x{ending}") == {"epoch": 3, "loss": 0.5, "name": "x"}
