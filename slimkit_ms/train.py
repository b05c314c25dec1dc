"""The trainer for MindSpore: the torch wing's loop, run by mindspore.train.Model, in PyNative and GRAPH mode."""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.batch import dataset as check_dataset
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.lazy import door as _door
from slimkit.core.train.counting import one_number, refuse_several
from slimkit.core.train.loading import LoaderOptions, is_samples, plan_batches, samples_in, split_batch
from slimkit.core.train.loop import TrainerLoop
from slimkit.core.train.packing import pack, unpack
from slimkit.core.train.updates import UpdateOptions, factor_at
from slimkit_ms import bridge, schedules
from slimkit_ms.loading import BatchedSamples, Pipeline, Shared, stack
from slimkit_ms.modelrun import EpochEnd, Feed, Update
from slimkit_ms.precision import lift, lower

import mindspore as ms
from mindspore import nn, ops

__getattr__, __dir__ = _door("slimkit_ms", "train")


class Trainer(TrainerLoop):
    """Train, evaluate, checkpoint and resume a cell.

    Args:
        model: trained in place. A cell whose (first) output is its loss needs neither loss_func nor compute_loss; a
            `DistillDualModels` is one.
        loss_func: f(outputs, targets) -> scalar, for batches of (inputs, targets).
        optimizer: an optimizer over the cell's parameters, or f(parameters) -> optimizer; None: AdamW with rate 1e-3
            over the parameters that want a gradient.
        callbacks: objects with methods of `TrainerCallback`, and MindSpore's own callbacks (`LossMonitor`,
            `ModelCheckpoint`, `TrainableParamsCheckPoint` ...), which see a `mindspore.train.Model` at work.
        compute_loss: f(model, batch) -> scalar, for any batch.
        metrics: name -> f(outputs, targets) -> number, averaged over samples in evaluation.
        run_history: where metrics go; None: in memory.
        mixed_precision: "no", "fp16" or "bf16" (the latter has no CPU kernels); None: "no".
        count_tokens: f(batch) -> over how many tokens its loss is a mean: several batches of one update, and those of
            an evaluation, are then averaged per token. None: by the labels that are not -100, where a batch has whole
            numbers as labels, else each batch of an update counts alike.

    Raises:
        ArgumentTypeError: an argument of another kind.
        ConfigError: both loss_func and compute_loss.

    Example:
        >>> batches = [(ops.ones((4, 3)), ops.ones((4, 1)))] * 3
        >>> trainer = Trainer(nn.Dense(3, 1), nn.MSELoss())
        >>> len(trainer.train(batches, num_epochs=2).get_metric_values("train_loss_epoch"))
        2
    """

    framework = "mindspore"

    def _checked(self, model: Any) -> nn.Cell:
        return bridge.check_model(model)

    def _begin(self) -> None:
        self._model_callbacks = [c for c in self.callbacks if isinstance(c, ms.train.Callback)]
        self.callbacks = [c for c in self.callbacks if not isinstance(c, ms.train.Callback)]
        self._objective: nn.Cell | None = None
        self._gradient: Any = None
        self._reducer: Any = None
        self._scheduler: Any = None
        self._began: list[float] = []  # the learning rate of each group before a schedule's factor
        self._clip: tuple[float | None, float | None] = (None, None)
        self._undo = _nothing
        self._kept_modes: list[tuple[nn.Cell, bool]] = []
        self._in_memory: dict[int, tuple[Any, Any]] = {}  # iterators of pipelines, and their batches in memory

    def _processes(self) -> tuple[int, int, int]:
        from mindspore import communication

        if not communication.GlobalComm.INITED:
            if "MS_ROLE" in os.environ:
                # Not done here: it must come before the first parameter is made, in msrun's scheduler as well.
                raise ConfigError("under msrun, call mindspore.communication.init() before building the model")
            return 0, 1, 0
        rank, world = communication.get_rank(), communication.get_group_size()
        return rank, world, int(os.environ.get("LOCAL_RANK", rank))

    def _start(self, seed: int | None) -> int:
        if seed is None:
            # Processes would have to agree on a number; one they all can compute is the global seed.
            return int(ms.get_seed() or 0) if self._processes()[1] > 1 else int(np.random.randint(2**31))
        ms.set_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return seed

    def _prepare(self, options: UpdateOptions) -> None:
        if not isinstance(self.optimizer, nn.Cell):
            wanted = self.model.trainable_params()
            if not wanted:
                raise ConfigError("model: no parameter wants a gradient, so there is nothing to train")
            make = self.optimizer or _adamw
            self.optimizer = check.function(make, "optimizer")(wanted)
        world = self._processes()[1]
        if world > 1:
            ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)
            self._reducer = nn.DistributedGradReducer(self.optimizer.parameters, mean=True)
        if self.mixed_precision in ("fp16", "bf16"):
            self._undo = lower(self.model, ms.float16 if self.mixed_precision == "fp16" else ms.bfloat16)
        self._objective = Objective(self.model, self.loss_func, self.compute_loss)
        self._gradient = ms.value_and_grad(self._objective, None, self.optimizer.parameters)
        self._scheduler = options.scheduler(self.optimizer)
        if self._scheduler is not None and not hasattr(self._scheduler, "step"):
            if not all(isinstance(rate, ms.Parameter) for rate in self._rates()):
                raise ConfigError("create_scheduler_fn: the optimizer's learning rate is a schedule already")
            self._began = [float(rate) for rate in self._rates()]
            self._set_rates(self.global_step)
        self._clip = (options.clip_value, options.clip_norm)

    def _drive(self) -> None:
        if not self._more():
            return
        ms.train.Model(Update(self)).train(
            self._epochs.last,
            Feed(self),
            callbacks=[EpochEnd(self), *self._model_callbacks],
            dataset_sink_mode=False,
            initial_epoch=self.epoch - 1,
        )
        if self._more():
            self.stop("a MindSpore callback asked for it")

    def _meet(self) -> None:
        self._all_sum(np.zeros(1))  # a sum needs them all

    def _finish(self) -> None:
        self._undo()
        self._undo = _nothing
        self._objective = self._gradient = self._reducer = None

    def _modes(self, training: bool) -> None:
        if training:
            self._kept_modes = [(cell, cell.training) for _, cell in self.model.cells_and_names()]
            # Cells put into eval mode on purpose inside a training cell (frozen batch norms) stay there.
            if not self.model.training:
                self.model.set_train(True)
        else:
            for cell, mode in self._kept_modes:
                cell.training = mode
            self._kept_modes = []

    def _learning_rate(self) -> float | None:
        rate = next(iter(self._rates()), None)
        if isinstance(rate, nn.Cell):  # a schedule of MindSpore's own
            rate = rate(self.optimizer.global_step)
        return None if rate is None else float(np.asarray(bridge.as_numpy(rate)).reshape(-1)[0])

    def _set_rates(self, step: int) -> None:
        factor = factor_at(self._scheduler, step)
        for held, began in zip(self._rates(), self._began):
            # assign, for set_data is not seen by an optimizer that has run before.
            ops.assign(held, ms.Tensor(began * factor, held.dtype).reshape(held.shape))

    def _rates(self) -> list[Any]:
        """The learning rate of each group; an experimental optimizer does not name them among its parameters."""
        groups = getattr(self.optimizer, "param_groups", None)
        if groups:
            return [g["lr"] for g in groups]
        rate = getattr(self.optimizer, "learning_rate", None)
        return list(rate) if isinstance(rate, (tuple, list, nn.CellList)) else [rate]

    def _optimized(self) -> list[Any]:
        return list(self.optimizer.parameters)

    def _optimize(self, parameters: list[Any]) -> None:
        raise UnsupportedError(
            "a MindSpore optimizer takes no parameters later: make it over all parameters before freezing some"
        )

    def _loader(self, dataset: Any, batch_size: int, options: LoaderOptions) -> Iterable[Any]:
        if hasattr(dataset, "create_tuple_iterator"):
            return Pipeline(dataset, batch_size, options)
        if type(dataset).__module__.startswith("mindspore.dataset."):  # what create_tuple_iterator() gives
            if id(dataset) not in self._in_memory:
                self._in_memory[id(dataset)] = dataset, check_dataset(dataset)
            dataset = self._in_memory[id(dataset)][1]
        if is_samples(dataset):
            batches = plan_batches(len(dataset), batch_size, options)
            if options.rest:
                raise ConfigError(f"dataloader_kwargs: only shuffle and drop_last here. Received: {list(options.rest)}")
            return BatchedSamples(dataset, batches, options.collate_fn or stack)
        if not isinstance(dataset, Iterable) or isinstance(dataset, (Iterator, str, bytes, Mapping, ms.Tensor)):
            check.wrong_type("dataset", "a mindspore.dataset, a map-style data set or a list of batches", dataset)
        return Shared(dataset, options)

    def _call(self, batch: Any) -> tuple[Any, ...]:
        """A batch as the positional arguments of the objective."""
        batch = bridge.tensors(batch)
        if self.compute_loss is not None:
            return (batch,)
        if self.loss_func is not None:
            inputs, targets = split_batch(batch)
            return (*self._positional(inputs), targets)
        return self._positional(batch)

    def _positional(self, inputs: Any) -> tuple[Any, ...]:
        if isinstance(inputs, Mapping):
            names = list(inspect.signature(self.model.construct).parameters)
            if set(inputs) != set(names[: len(inputs)]):
                raise ConfigError(
                    f"a mapping's keys must be the model's first arguments {names}. Received: {list(inputs)}"
                )
            return tuple(inputs[k] for k in names[: len(inputs)])
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)

    def _update(self, batches: list[Any]) -> Any:
        total: Any = None
        gradients: Any = None
        alone = len(batches) == self._processes()[1] == 1
        shares = [1.0] if alone else self._shares(batches, self._mean_of_processes)
        for batch, share in zip(batches, shares):
            with bridge.whole_gradient():
                loss, found = self._gradient(*self._call(batch))
            if isinstance(loss, ms.Tensor) and loss.size != 1:  # its gradients would be those of the sum
                refuse_several(loss, "the loss")
            if share != 1.0:
                # Without labels that count, a mean is no number, and so are its gradients.
                counts = math.isfinite(share)
                loss = loss / share if counts else ops.zeros_like(loss)
                found = tuple(g / share if counts else ops.zeros_like(g) for g in found)
            total = loss if total is None else total + loss
            gradients = found if gradients is None else tuple(a + b for a, b in zip(gradients, found))
        if self._reducer is not None:
            gradients = self._reducer(gradients)
        value, norm = self._clip
        if value is not None:
            gradients = tuple(ops.clamp(g, -value, value) for g in gradients)
        if norm is not None:
            gradients = ops.clip_by_global_norm(gradients, norm)
        self.optimizer(gradients)
        if self._began:
            self._set_rates(self.global_step + 1)
        elif self._scheduler is not None:
            self._scheduler.step()
        return total

    def _mean_of_processes(self, count: float) -> float:
        return float(self._all_sum(np.array([count]))[0] / self._processes()[1])

    def _array(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value
        whole = isinstance(value, ms.Tensor) and value.dtype in (ms.int8, ms.int16, ms.int32, ms.int64, ms.uint8)
        return bridge.as_numpy(value) if whole else None

    def _to_floats(self, losses: list[Any]) -> list[float]:
        stacked = np.array([float(loss) for loss in losses])
        return [float(v) for v in self._all_sum(stacked) / self._processes()[1]]

    def _all_sum(self, values: np.ndarray) -> np.ndarray:
        if self._processes()[1] == 1:
            return values
        return _AllSum()(ms.Tensor(values, ms.float32)).asnumpy().astype(np.float64)

    def _evaluate_batches(self, batches: Iterable[Any]) -> dict[str, float]:
        objective = Objective(self.model, self.loss_func, self.compute_loss)
        names = ["loss", *self.metrics]
        sums, tokens = np.zeros(len(names) + 1), np.zeros(2)
        with bridge.evaluating(self.model):
            for batch in batches:
                arguments = self._call(batch)
                if self.metrics and (self.loss_func is None or self.compute_loss is not None):
                    raise ConfigError("metrics need loss_func and batches of (inputs, targets)")
                if self.loss_func is not None:
                    outputs = lift(self.model(*arguments[:-1]))
                    values = [one_number(self.loss_func(outputs, arguments[-1]), "the loss")]
                    values += [
                        one_number(f(outputs, arguments[-1]), f"metrics[{k!r}]") for k, f in self.metrics.items()
                    ]
                else:
                    values = [one_number(objective(*arguments), "the loss")]
                n = samples_in(batch)
                told = self._counts(batch)
                if told != 0:
                    weight = n if told is None else told
                    tokens += np.array([weight * values[0], weight])
                    values[0] = 0.0
                sums += n * np.array([*values, 1.0])
        sums, tokens = self._all_sum(sums), self._all_sum(tokens)
        if not sums[-1]:
            check.wrong_value("dataset", "a data set with at least one batch", batches)
        means = {name: float(total / sums[-1]) for name, total in zip(names, sums)}
        return {**means, "loss": float(tokens[0] / tokens[1])}

    def _held(self) -> dict[str, ms.Parameter]:
        held = {f"model.{i}": p for i, p in enumerate(self.model.get_parameters())}
        mine = {id(p) for p in held.values()}
        extra = [p for p in self.optimizer.get_parameters() if id(p) not in mine]
        mine |= {id(p) for p in (*extra, *self._rates())}
        counters = [p for p in schedules.parameters_of(self._scheduler) if id(p) not in mine]
        held.update({f"optimizer.{i}": p for i, p in enumerate(extra)})
        return {**held, **{f"scheduler.{i}": p for i, p in enumerate(counters)}}

    def _save_state(self, folder: Path) -> dict[str, Any]:
        arrays, names = {}, {}
        for key, parameter in self._held().items():
            # NumPy knows no bfloat16; float32 holds each of its values.
            plain = parameter.astype(ms.float32) if parameter.dtype == ms.bfloat16 else parameter
            arrays[key] = bridge.as_numpy(plain)
            names[key] = f"{parameter.name} {tuple(parameter.shape)}"
        files.write_tensors(folder / "state.safetensors", arrays)
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "names": names}
        state["rates"] = [float(rate) if isinstance(rate, ms.Parameter) else None for rate in self._rates()]
        state["scheduler"] = schedules.state_of(self._scheduler)
        return pack(state, lambda value: None)

    def _load_state(self, folder: Path, state: dict[str, Any]) -> None:
        arrays, _ = files.read_tensors(folder / "state.safetensors", "resume_from")
        found = unpack(state, arrays.__getitem__)
        held = self._held()
        shown = {key: f"{p.name} {tuple(p.shape)}" for key, p in held.items()}
        if shown != found["names"]:
            kept = found["names"]
            key = next(k for k in {**shown, **kept} if shown.get(k) != kept.get(k))
            raise ConfigError(f"resume_from: the checkpoint holds {kept.get(key)} where the run has {shown.get(key)}")
        self._assign(held, arrays)
        if (found.get("scheduler") is None) != (schedules.state_of(self._scheduler) is None):
            raise ConfigError("resume_from: one of the checkpoint and this run has a scheduler, the other has none")
        if found.get("scheduler") is not None:
            schedules.put_back(self._scheduler, found["scheduler"])
        for held, rate in zip(self._rates(), found["rates"]):
            if rate is not None:
                ops.assign(held, ms.Tensor(rate, held.dtype).reshape(held.shape))
        random.setstate(found["python"])
        np.random.set_state(found["numpy"])

    def _load_model(self, folder: Path, state: dict[str, Any]) -> None:
        arrays, _ = files.read_tensors(folder / "state.safetensors", "checkpoint")
        kept = unpack(state, arrays.__getitem__)["names"]
        held = {f"model.{i}": p for i, p in enumerate(self.model.get_parameters())}
        shown = {key: f"{p.name} {tuple(p.shape)}" for key, p in held.items()}
        if shown != {k: v for k, v in kept.items() if k.startswith("model.")}:
            raise ConfigError("directory: the checkpoint holds the weights of another model")
        self._assign(held, arrays)

    def _assign(self, held: Mapping[str, ms.Parameter], arrays: Mapping[str, np.ndarray]) -> None:
        for key, parameter in held.items():
            # assign, for set_data is not seen by what has run before.
            ops.assign(parameter, ms.Tensor(arrays[key].reshape(parameter.shape), parameter.dtype))


class Objective(nn.Cell):
    """The model with its loss, parameter names unchanged."""

    def __init__(self, model: nn.Cell, loss_func: Any, compute_loss: Any) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.loss_func = loss_func
        self.compute_loss = compute_loss
        self.computes = compute_loss is not None
        self.compares = loss_func is not None

    def construct(self, *args):
        if self.computes:
            return self.compute_loss(self.model, args[0])
        if self.compares:
            return self.loss_func(lift(self.model(*args[:-1])), args[-1])
        output = lift(self.model(*args))
        if isinstance(output, tuple):
            return output[0]
        return output


class _AllSum(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM)

    def construct(self, x):
        return self.reduce(x)


def _nothing() -> None:
    """Nothing was lowered."""


def _adamw(parameters: list[ms.Parameter]) -> nn.Cell:
    return ms.experimental.optim.AdamW(parameters, lr=1e-3)
