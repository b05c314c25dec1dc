"""The trainer for PyTorch, on accelerate: one device or many, mixed precision, resumable to the bit."""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from slimkit import bridge, together
from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.distill.joined import TotalLoss
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.lazy import door as _door
from slimkit.core.lazy import library
from slimkit.core.train.counting import one_number, refuse_several
from slimkit.core.train.loading import LoaderOptions, samples_in, split_batch
from slimkit.core.train.updates import UpdateOptions, factor_at
from slimkit.loading import batches_of
from slimkit.shared_training import SharedTraining, one_by_one
from slimkit.train_state import TrainState

import torch
import torch.distributed as dist

__getattr__, __dir__ = _door("slimkit", "train")


class Trainer(TrainState):
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
        self._shared: SharedTraining | None = None
        self._called = True

    @property
    def accelerator(self) -> Any:
        """The accelerate.Accelerator of this trainer, made when first needed."""
        if self._accelerator is None:
            accelerate = library("accelerate", "torch")
            state = accelerate.state.AcceleratorState
            known = accelerate.state.PartialState._shared_state.get("num_processes")
            if dist.is_available() and dist.is_initialized() and known not in (None, dist.get_world_size()):
                # accelerate keeps for its life what it saw first: an earlier trainer came before the processes joined.
                state._reset_state(reset_partial_state=True)
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
        if together.is_alone() and run.num_processes > 1:
            raise ConfigError("Trainer: one process works here alone, and a trainer would wait for the others")
        joined = dist.is_available() and dist.is_initialized()
        if joined and dist.get_world_size() != run.num_processes:
            raise ConfigError(
                f"torch.distributed has {dist.get_world_size()} processes, and accelerate sees "
                f"{run.num_processes}: it reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which "
                "torchrun sets"
            )
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
        world = self._processes()[1]
        self._shared = SharedTraining.of(self.model, world)
        if self.optimizer is None or inspect.isclass(self.optimizer) or not hasattr(self.optimizer, "step"):
            wanted = [p for p in self.model.parameters() if p.requires_grad]
            if not wanted:
                raise ConfigError("model: no parameter wants a gradient, so there is nothing to train")
            make = self.optimizer or (lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=one_by_one(ps)))
            self.optimizer = check.function(make, "optimizer")(wanted)
        # The class is asked: a scheduler puts a function of its own in the place of the object's method.
        step = getattr(type(self.optimizer), "step", None)
        asked = [] if step is None else list(inspect.signature(step).parameters.values())[1:]
        if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in asked):
            name = type(self.optimizer).__name__
            raise ConfigError(f"optimizer: {name}.step needs a closure that runs the model again; Trainer gives none")
        self._check_optimizer(world)
        if self._shared is None:
            self._run_model, self._run_optimizer = run.prepare(self.model, self.optimizer)
            self._shared = SharedTraining.of(self.model, world)  # accelerate can be told to share it out
            if isinstance(self._run_model, torch.nn.parallel.DistributedDataParallel):
                self._called = False
                self._run_model.register_forward_pre_hook(self._note_call)
        else:
            if run.mixed_precision == "fp16":
                raise UnsupportedError("mixed_precision: fp16 scales losses by whole gradients; bf16 trains in parts")
            # Its parameters are in step by themselves; accelerate has nothing to add but the precision.
            self._run_model = run.prepare_model(self.model, evaluation_mode=True)
            self._run_optimizer = run.prepare_optimizer(self.optimizer)
        if self._shared is not None:
            self._shared.begin()
        # The scheduler is left outside accelerate, which would step it once per process.
        self._scheduler = options.scheduler(self.optimizer)
        if self._scheduler is not None and not hasattr(self._scheduler, "step"):
            schedule = self._scheduler
            self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor_at(schedule, step))
        self._clip = (options.clip_value, options.clip_norm)
        kinds = library("accelerate.utils", "torch").DistributedType
        self._plain_kinds = (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU, kinds.MULTI_NPU)

    def _check_optimizer(self, world: int) -> None:
        """Refuse parameters that would go their own way in each process."""
        own = set(map(id, self.model.parameters()))
        strange = [p for p in self._optimized() if p.requires_grad and id(p) not in own]
        if strange and world > 1:
            made = "; fully_shard puts new ones in their places: make it afterwards" if self._shared else ""
            raise ConfigError(
                f"optimizer: {len(strange)} of its parameters are none of the model's, and nothing would keep them "
                f"the same in {world} processes{made}"
            )

    def _note_call(self, *_: Any) -> None:
        self._called = True

    def _meet(self) -> None:
        if self._shared is not None:
            self._shared.settle()
        if self._processes()[1] > 1:
            dist.barrier()

    def asked_anywhere(self, number: int) -> int:
        if self._processes()[1] == 1:
            return number
        told = torch.tensor(number, device=self.accelerator.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def _finish(self) -> None:
        if self._shared is not None:
            self._shared.end()
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
                if not self._called:
                    raise ConfigError(
                        "compute_loss must call the model that it is given: what it called instead learns apart in "
                        "each process"
                    )
                backward(loss)
            loss = loss.detach()
            total = loss if total is None else total + loss
        value, norm = self._clip
        if self._shared is not None:
            self._shared.clip(model.parameters(), value, norm)
            value = norm = None
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
        shared = SharedTraining.of(model, self._processes()[1])
        if shared is not None:
            shared.settle()
        rounds = ((batch, True) for batch in batches) if shared is None else shared.rounds(batches)
        names = ["loss", *self.metrics]
        sums, tokens = torch.zeros(len(names) + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with bridge.evaluating(model), run.autocast():
            for batch, counts in rounds:
                batch = bridge.to_device(batch, device)
                loss, outputs, targets = self._loss(model, batch)
                if not counts:
                    continue
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
