"""The trainer for PyTorch, on accelerate: one device or many, mixed precision, resumable to the bit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core import check, files
from slimkit.core.batch import as_call
from slimkit.core.distill.joined import TotalLoss
from slimkit.core.errors import ConfigError, FileFormatError, UnsupportedError
from slimkit.core.lazy import door as _door
from slimkit.core.lazy import library
from slimkit.core.train import packing
from slimkit.core.train.counting import one_number, refuse_several
from slimkit.core.train.loading import LoaderOptions, samples_in, split_batch
from slimkit.core.train.loop import TrainerLoop
from slimkit.core.train.updates import UpdateOptions, factor_at
from slimkit.loading import batches_of
from slimkit.torchfile import storable

import torch

__getattr__, __dir__ = _door("slimkit", "train")


class Trainer(TrainerLoop):
    """Train, evaluate, checkpoint and resume a model with accelerate underneath.

    Args:
        model: trained in place. A model whose first output is its loss, or that returns an object with `.loss`, needs
            neither loss_func nor compute_loss; a `DistillDualModels` mixes its soft losses with loss_func's.
        loss_func: f(outputs, targets) -> scalar, for batches of (inputs, targets).
        optimizer: an optimizer over the model's parameters, or f(parameters) -> optimizer; None: AdamW with rate 1e-3
            over the parameters that want a gradient.
        callbacks: objects with methods of `TrainerCallback`.
        compute_loss: f(model, batch) -> scalar, for any batch.
        metrics: name -> f(outputs, targets) -> number, averaged over samples in evaluation.
        run_history: where metrics go; None: in memory.
        mixed_precision: "no", "fp16", "bf16"; None: what accelerate was launched with.
        count_tokens: f(batch) -> over how many tokens its loss is a mean: several batches of one update, and those of
            an evaluation, are then averaged per token. None: by the labels that are not -100, where a batch has whole
            numbers as labels, else each batch of an update counts alike.

    Raises:
        ArgumentTypeError: an argument of another kind.
        ConfigError: both loss_func and compute_loss.

    Example:
        >>> batches = [(torch.ones(4, 3), torch.ones(4, 1))] * 3
        >>> trainer = Trainer(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss)
        >>> len(trainer.train(batches, num_epochs=2).get_metric_values("train_loss_epoch"))
        2
    """

    framework = "torch"

    def _checked(self, model: Any) -> torch.nn.Module:
        return bridge.check_model(model, lazy=True)

    def _begin(self) -> None:
        self._accelerator: Any = None
        self._run_model: torch.nn.Module = self.model
        self._run_optimizer: Any = None
        self._scheduler: Any = None
        self._clip: tuple[float | None, float | None] = (None, None)
        self._plain_kinds: tuple[Any, ...] = ()
        self._kept_modes: dict[torch.nn.Module, bool] = {}

    @property
    def accelerator(self) -> Any:
        """The accelerate.Accelerator of this trainer, made when first needed."""
        if self._accelerator is None:
            accelerate = library("accelerate", "torch")
            state = accelerate.state.AcceleratorState
            asked = self.mixed_precision
            if asked is not None and state._shared_state and state._shared_state.get("_mixed_precision") != asked:
                # accelerate keeps one precision for the process; a second trainer may want another.
                state._reset_state()
            on_cpu = bridge.device_of(self.model).type == "cpu" and not torch.accelerator.is_available()
            self._accelerator = accelerate.Accelerator(mixed_precision=asked, cpu=on_cpu)
            self.mixed_precision = str(self._accelerator.mixed_precision)
        return self._accelerator

    def _processes(self) -> tuple[int, int, int]:
        run = self.accelerator
        return run.process_index, run.num_processes, run.local_process_index

    def _start(self, seed: int | None) -> int:
        if seed is None:
            seed = int(torch.randint(2**31, ()).item())
            if self.accelerator.num_processes > 1:
                seed = library("accelerate.utils", "torch").broadcast_object_list([seed])[0]
            return seed
        # Each process draws its own dropout.
        torch.manual_seed(seed + self._processes()[0])
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return seed

    def _prepare(self, options: UpdateOptions) -> None:
        run = self.accelerator
        if path := self._sharded():
            raise UnsupportedError(
                f"model must hold whole parameters, which the trainer shares out itself. {path} is sharded: hand over "
                f"the plain model, or train it by a loop of your own."
            )
        if self.optimizer is None or inspect.isclass(self.optimizer) or not hasattr(self.optimizer, "step"):
            wanted = [p for p in self.model.parameters() if p.requires_grad]
            if not wanted:
                raise ConfigError("model: no parameter wants a gradient, so there is nothing to train")
            make = self.optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
            self.optimizer = check.function(make, "optimizer")(wanted)
        # The class is asked: a scheduler puts a function of its own in the place of the object's method.
        step = getattr(type(self.optimizer), "step", None)
        asked = [] if step is None else list(inspect.signature(step).parameters.values())[1:]
        if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in asked):
            name = type(self.optimizer).__name__
            raise ConfigError(f"optimizer: {name}.step needs a closure that runs the model again; Trainer gives none")
        self._run_model, self._run_optimizer = run.prepare(self.model, self.optimizer)
        # The scheduler is left outside accelerate, which would step it once per process.
        self._scheduler = options.scheduler(self.optimizer)
        if self._scheduler is not None and not hasattr(self._scheduler, "step"):
            schedule = self._scheduler
            self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor_at(schedule, step))
        self._clip = (options.clip_value, options.clip_norm)
        kinds = library("accelerate.utils", "torch").DistributedType
        self._plain_kinds = (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU, kinds.MULTI_NPU)

    def _finish(self) -> None:
        if self._accelerator is not None:
            self.model = self._accelerator.unwrap_model(self._run_model, keep_fp32_wrapper=False)
            self._accelerator.free_memory()
        self._run_model, self._run_optimizer = self.model, None

    def _modes(self, training: bool) -> None:
        if training:
            self._kept_modes = {m: m.training for m in self.model.modules()}
            # Modules put into eval mode on purpose inside a training model (frozen batch norms) stay there.
            if not self.model.training:
                self.model.train()
        else:
            for module, mode in self._kept_modes.items():
                module.training = mode
            self._kept_modes = {}

    def _learning_rate(self) -> float | None:
        return float(self.optimizer.param_groups[0]["lr"])

    def _optimized(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _optimize(self, parameters: list[Any]) -> None:
        # Into the first group and not a new one: a scheduler knows the groups it was made with.
        self.optimizer.param_groups[0]["params"].extend(parameters)

    def _loader(self, dataset: Any, batch_size: int, options: LoaderOptions) -> Iterable[Any]:
        return batches_of(dataset, batch_size, options)

    def _loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, Any, Any]:
        """(loss, what metrics see of the outputs, targets) of one batch."""
        if self.compute_loss is not None:
            return self.compute_loss(model, batch), None, None
        if self.loss_func is None:
            args, kwargs = as_call(batch)
            outputs = model(*args, **kwargs)
            loss = outputs["loss"] if isinstance(outputs, Mapping) and "loss" in outputs else outputs
            loss = loss[0] if isinstance(loss, (tuple, list)) else loss
            if not isinstance(loss, torch.Tensor) or loss.ndim:
                raise ConfigError("the model's output holds no scalar loss: give loss_func or compute_loss")
            return loss, None, None
        inputs, targets = split_batch(batch)
        args, kwargs = as_call(inputs)
        outputs = model(*args, **kwargs)
        if isinstance(self.model, TotalLoss):
            outputs = outputs[1]
            return self.model.get_total_loss(self.loss_func(outputs, targets)), outputs, targets
        return self.loss_func(outputs, targets), outputs, targets

    def _update(self, batches: list[Any]) -> torch.Tensor:
        run, model, total = self.accelerator, self._run_model, None
        # Without a scaler accelerate's own step and backward only add a search for optional packages to every call.
        scaled = run.scaler is not None or run.distributed_type not in self._plain_kinds
        optimizer = self._run_optimizer if scaled else self._run_optimizer.optimizer
        backward = run.backward if scaled else torch.Tensor.backward
        shares = [1.0] if len(batches) == run.num_processes == 1 else self._shares(batches, self._mean_of_processes)
        for i, batch in enumerate(batches):
            waits = contextlib.nullcontext() if i + 1 == len(batches) else run.no_sync(model)
            with waits:
                loss = _scalar(self._loss(model, bridge.to_device(batch, run.device))[0])
                # Without labels that count, a mean is no number, and so would be its gradients.
                loss = loss / shares[i] if math.isfinite(shares[i]) else torch.nan_to_num(loss) * 0.0
                backward(loss)
            loss = loss.detach()
            total = loss if total is None else total + loss
        value, norm = self._clip
        if value is not None:
            run.clip_grad_value_(model.parameters(), value)
        if norm is not None:
            run.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        if self._scheduler is not None and not (scaled and optimizer.step_was_skipped):
            self._scheduler.step()
        optimizer.zero_grad()
        assert total is not None
        return total

    def _mean_of_processes(self, count: float) -> float:
        if self.accelerator.num_processes == 1:
            return count
        return float(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "mean"))

    def _array(self, value: Any) -> Any:
        return value.detach().cpu().numpy() if _whole(value) else None

    def _to_floats(self, losses: list[Any]) -> list[float]:
        stacked = torch.stack([loss.float() for loss in losses])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, "mean")
        return [float(v) for v in stacked.tolist()]

    def _evaluate_batches(self, batches: Iterable[Any]) -> dict[str, float]:
        run, model = self.accelerator, self.model
        device = run.device if self._run_optimizer is not None else bridge.device_of(model)
        names = ["loss", *self.metrics]
        sums, tokens = torch.zeros(len(names) + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with bridge.evaluating(model), run.autocast():
            for batch in batches:
                batch = bridge.to_device(batch, device)
                loss, outputs, targets = self._loss(model, batch)
                if self.metrics and outputs is None:
                    raise ConfigError("metrics need loss_func and batches of (inputs, targets)")
                n = samples_in(batch)
                told = self._counts(batch)
                if told != 0:
                    weight = n if told is None else told
                    tokens += torch.tensor([weight * one_number(loss, "the loss"), weight], dtype=torch.float64)
                found = (one_number(f(outputs, targets), f"metrics[{k!r}]") for k, f in self.metrics.items())
                values = [0.0, *found]
                sums += n * torch.tensor([*values, 1.0], dtype=torch.float64)
        if run.num_processes > 1:
            sums, tokens = (run.reduce(found.to(run.device), "sum").cpu() for found in (sums, tokens))
        if not sums[-1]:
            check.wrong_value("dataset", "a data set with at least one batch", batches)
        means = {name: float(total / sums[-1]) for name, total in zip(names, sums)}
        return {**means, "loss": float(tokens[0] / tokens[1])}

    def _sharded(self) -> str:
        return next((n for n, p in self.model.named_parameters() if hasattr(p, "full_tensor")), "")

    def _save_state(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import save

        tensors: dict[str, torch.Tensor] = {}

        def keep(value: Any) -> str | None:
            if not isinstance(value, torch.Tensor):
                return None
            # A copy: safetensors refuses tensors that share memory, and two states may.
            name = f"t{len(tensors)}"
            tensors[name] = storable(value, "a state of this run").detach().cpu().clone().contiguous()
            return name

        state: dict[str, Any] = {
            "weights": self.accelerator.unwrap_model(self._run_model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else _state_of(self._scheduler),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "random": {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
        }
        if self.accelerator.device.type != "cpu":
            module = torch.get_device_module(self.accelerator.device)
            state["random"]["device"] = module.get_rng_state()
        packed = packing.pack(state, keep)
        with files.atomic_file(folder / "state.safetensors") as handle:
            handle.write(save(tensors))
        return packed

    def _load_state(self, folder: Path, state: dict[str, Any]) -> None:
        found = self._unpacked(folder, state)
        self.accelerator.unwrap_model(self._run_model).load_state_dict(found["weights"])
        self._load_optimizer(found["optimizer"])
        if (found["scheduler"] is None) != (self._scheduler is None):
            raise ConfigError("resume_from: one of the checkpoint and this run has a scheduler, the other has none")
        if self._scheduler is not None:
            self._scheduler.load_state_dict(found["scheduler"])
        if self.accelerator.scaler is not None and found["scaler"]:
            self.accelerator.scaler.load_state_dict(found["scaler"])
        torch.set_rng_state(found["random"]["torch"])
        random.setstate(found["random"]["python"])
        np.random.set_state(found["random"]["numpy"])
        if "device" in found["random"] and self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).set_rng_state(found["random"]["device"])

    def _load_optimizer(self, kept: dict[str, Any]) -> None:
        """Take the optimizer's state back whole: torch casts it to the parameters' type, and so rounds it."""
        self.optimizer.load_state_dict(kept)
        order = [i for group in kept["param_groups"] for i in group["params"]]
        for number, parameter in zip(order, self._optimized()):
            for slot, value in kept["state"].get(number, {}).items():
                here = self.optimizer.state[parameter].get(slot)
                if isinstance(value, torch.Tensor) and isinstance(here, torch.Tensor) and here.dtype != value.dtype:
                    self.optimizer.state[parameter][slot] = value.to(here.device)

    def _load_model(self, folder: Path, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self._run_model).load_state_dict(self._unpacked(folder, state)["weights"])

    def _unpacked(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = files.readable_file(folder / "state.safetensors", "checkpoint")
        try:
            tensors = load(file.read_bytes())
        except SafetensorError as error:
            raise FileFormatError(f"{file} is damaged: {error}") from None
        found: dict[str, Any] = packing.unpack(state, tensors.__getitem__)
        return found


def _whole(value: Any) -> bool:
    """Whether a value is a tensor of whole numbers, such as classes."""
    return isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def _scalar(loss: Any) -> torch.Tensor:
    """A loss without axes; refused where it is several numbers, or none of a graph."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        refuse_several(loss, "the loss")
    return loss.reshape(())


def _state_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's state without its functions, which its own maker supplies again."""
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise UnsupportedError(
            f"a checkpoint cannot hold a {type(scheduler).__name__}: it lacks state_dict and load_state_dict"
        )
    state = scheduler.state_dict()
    return {k: v for k, v in state.items() if not all(map(_is_code, v if isinstance(v, list) and v else [v]))}


def _is_code(value: Any) -> bool:
    """Whether a value is a function or a class, and not an object that may remember something."""
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, functools.partial)
