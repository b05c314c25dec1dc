"""A callback that saves the trainable parameters only: for slimkit's trainer, Hugging Face, Lightning, plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slimkit import kinds
from slimkit.checkpoint.byhand import write
from slimkit.checkpoint.optimizer import add_optimizer, unwrapped
from slimkit.core import check
from slimkit.core.checkpoint.savepolicy import CheckpointConfig, SavePolicy, appended
from slimkit.core.checkpoint.saving import Items, Saving
from slimkit.core.files import PathLike
from slimkit.core.showing import Shown
from slimkit.sharded import at_rest, whole
from slimkit.torchfile import described

import torch


class TrainableParamsCheckPoint(Shown):
    """Save the parameters that train, and nothing else, in the course of a training.

    One object serves four ways: in the callbacks of slimkit's `Trainer`, of Hugging Face's, of Lightning's, or in your
    own loop by `step_end(model)` after each update and `end(model)` after the last. Files are called
    PREFIX-EPOCH_STEP.safetensors. Where several processes train together, the first one writes.

    Args:
        directory: an absolute path that is no symbolic link; made if it does not exist.
        prefix: how the files' names begin; "_1", "_2" ... is added where another run has used it.
        config: when to save and what to keep; None is CheckpointConfig().
        batch_norm_statistics: also save running means and variances, which are no parameters.
        optimizer_state: also save the optimizer's moments and settings, for going on exactly where it was.

    Raises:
        ArgumentTypeError: `config` is no CheckpointConfig.
        ArgumentError: `directory` is None or empty, or `prefix` holds a slash.
        LinkPathError: `directory` is a symbolic link.
        AbsolutePathError: `directory` is relative.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> _ = model[0].requires_grad_(False)
        >>> saver = TrainableParamsCheckPoint(tempfile.mkdtemp())
        >>> saver.step_end(model)
        >>> from slimkit import load_checkpoint
        >>> sorted(load_checkpoint(saver.latest_ckpt_file_name))
        ['1.bias', '1.weight']
    """

    def __init__(
        self,
        directory: PathLike,
        prefix: str = "DELTA_CKP",
        config: CheckpointConfig | None = None,
        *,
        batch_norm_statistics: bool = False,
        optimizer_state: bool = False,
    ) -> None:
        if config is not None:
            check.instance(config, CheckpointConfig, "config")
        self.config = config or CheckpointConfig()
        self.batch_norm_statistics = check.boolean(batch_norm_statistics, "batch_norm_statistics")
        self.optimizer_state = check.boolean(optimizer_state, "optimizer_state")
        self._policy = SavePolicy.of(directory, prefix, self.config)
        self.directory = self._policy.folder
        self._saving: Saving | None = None
        self._latest = ""
        self._step = self._epoch = self._before_epoch = 0

    @property
    def latest_ckpt_file_name(self) -> str:
        """The file written last, or ""."""
        return self._latest

    def step_end(
        self,
        model: torch.nn.Module,
        *,
        step: int | None = None,
        epoch: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Save if it is time, after one update of the parameters.

        Args:
            model: the trained model.
            step: updates done so far, over all epochs; None counts the calls.
            epoch: the epoch, from 1; None goes on with the last one named.
            optimizer: needed where optimizer_state was asked for.
        """
        self._step = self._step + 1 if step is None else step
        if epoch is not None and epoch != self._epoch:
            self._before_epoch = self._step - 1
        self._epoch = epoch or self._epoch or 1
        self._save(model, optimizer, last=False)

    def end(self, model: torch.nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Save what the last step left, and wait for a save in the background."""
        if self._step:
            self._save(model, optimizer, last=True)
        if self._saving is not None:
            self._saving.wait()

    def _save(self, model: torch.nn.Module, optimizer: Any, *, last: bool) -> None:
        if not self._policy.due(self._step, last=last):
            return
        if self._saving is not None:
            self._saving.wait()
        saved = self.config.saved_network if self.config.saved_network is not None else model
        items = trainable_items(saved, statistics=self.batch_norm_statistics)
        if self.optimizer_state:
            add_optimizer(items, unwrapped(saved), optimizer)
        now = {"epoch_num": self._epoch, "step_num": self._step}
        for name, value in appended(self.config.append_info).items():
            items.add_value(name, now.get(name, value))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank() != 0:
            self._policy.last_step = self._step
            return
        path = self._policy.next_file(self._epoch, self._step - self._before_epoch, self._step)
        self._saving = write(path, items, async_save=self.config.async_save, manifest=True, after=self._policy.tidy)
        self._latest = str(path)

    # The four callers differ in what they pass; what they pass tells them apart.

    def on_step_end(self, caller: Any, *more: Any, **named: Any) -> None:
        """Called by slimkit's trainer with itself, by Hugging Face's with arguments, state and control."""
        if more:
            state = more[0]
            self.step_end(
                named["model"],
                step=state.global_step,
                epoch=max(1, math.ceil(state.epoch or 0)),
                optimizer=_plain_optimizer(named.get("optimizer")),
            )
        else:
            self.step_end(
                caller.model, step=caller.global_step, epoch=caller.epoch, optimizer=_plain_optimizer(caller.optimizer)
            )

    def on_train_batch_end(self, trainer: Any, module: torch.nn.Module, *_: Any) -> None:
        """Called by Lightning after each batch."""
        if trainer.global_step != self._step:
            optimizer = _plain_optimizer(trainer.optimizers[0])
            self.step_end(module, step=trainer.global_step, epoch=trainer.current_epoch + 1, optimizer=optimizer)

    def on_train_end(self, caller: Any, *more: Any, **named: Any) -> None:
        """Called by all three trainers after the last step."""
        if "model" in named:
            self.end(named["model"], optimizer=_plain_optimizer(named.get("optimizer")))
        elif more:
            self.end(more[0], optimizer=_plain_optimizer(caller.optimizers[0]))
        else:
            self.end(caller.model, optimizer=_plain_optimizer(caller.optimizer))

    @property
    def state_key(self) -> str:
        """What Lightning calls this callback by."""
        return f"{type(self).__qualname__}{self.directory}{self._policy.prefix}"

    _legacy_state_key = state_key

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning's own checkpoints need not hold this callback."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        # Trainers call every hook there is; the others mean nothing here.
        if name.startswith("on_") or name in ("setup", "teardown"):
            return lambda *_args, **_named: None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _plain_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's or Lightning's wrapper."""
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def trainable_items(model: torch.nn.Module, *, statistics: bool) -> Items:
    """The parameters of a model that want a gradient, and on request the running statistics of its batch norms."""
    items = Items()
    model = unwrapped(model)
    at_rest(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            items.add(name, *described(name, whole(parameter)))
    for path, module in model.named_modules() if statistics else ():
        if kinds.is_batch_norm(module):
            for key, buffer in module.named_buffers(recurse=False):
                name = f"{path}.{key}" if path else key
                items.add(name, *described(name, buffer))
    return items
