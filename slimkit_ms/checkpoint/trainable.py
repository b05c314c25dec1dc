"""A ModelCheckpoint that saves the trainable parameters only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkit.core import check
from slimkit.core.checkpoint import saving
from slimkit.core.checkpoint.savepolicy import SavePolicy
from slimkit.core.checkpoint.saving import Items, Saving
from slimkit.core.files import PathLike
from slimkit.core.showing import Shown
from slimkit_ms import kinds
from slimkit_ms.checkpoint.byhand import described, parameter_items

import mindspore as ms
from mindspore import nn
from mindspore.train import CheckpointConfig, ModelCheckpoint


class TrainableParamsCheckPoint(Shown, ModelCheckpoint):
    """Save the parameters that train, and nothing else, in the course of a training.

    It is used as MindSpore's ModelCheckpoint is, in the callbacks of `Model.train`, and heeds all of CheckpointConfig:
    steps or seconds, what to keep, async_save, saved_network, append_info, format "ckpt" or "safetensors", crc_check.
    Encrypted files, and parameters that several devices hold slices of, are written by MindSpore itself.

    Args:
        directory: an absolute path that is no symbolic link; made if it does not exist.
        prefix: how the files' names begin; "_1", "_2" ... is added where another run has used it.
        config: when to save and what to keep; None is CheckpointConfig().
        batch_norm_statistics: also save moving means and variances, which are no trainable parameters.
        optimizer_state: also save the optimizer's moments, for going on exactly where it was.

    Raises:
        ArgumentTypeError: `config` is no CheckpointConfig.
        ArgumentError: `directory` is None or empty, or `prefix` holds a slash.
        LinkPathError: `directory` is a symbolic link.
        AbsolutePathError: `directory` is relative.

    Example:
        >>> import tempfile
        >>> from mindspore.train import CheckpointConfig
        >>> saver = TrainableParamsCheckPoint(tempfile.mkdtemp(), config=CheckpointConfig(save_checkpoint_steps=10))
        >>> saver.latest_ckpt_file_name
        ''
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
        self.batch_norm_statistics = check.boolean(batch_norm_statistics, "batch_norm_statistics")
        self.optimizer_state = check.boolean(optimizer_state, "optimizer_state")
        self.config = config or CheckpointConfig()
        policy = SavePolicy.of(directory, prefix, self.config)
        super().__init__(prefix=prefix, directory=str(policy.folder), config=self.config)
        self._policy = policy
        self._saving: Saving | None = None

    def step_end(self, run_context: Any) -> None:
        """Save if it is time, after one update of the parameters."""
        self._save(run_context.original_args(), last=False)

    def end(self, run_context: Any) -> None:
        """Save what the last step left, and wait for a save in the background."""
        self._save(run_context.original_args(), last=True)
        if self._saving is not None:
            self._saving.wait()

    def _save(self, told: Any, *, last: bool) -> None:
        if not told.cur_step_num or not self._policy.due(told.cur_step_num, last=last):
            return
        if self._saving is not None:
            self._saving.wait()
        network = self.config.saved_network
        if network is None:
            network = told.network if isinstance(getattr(told, "network", None), nn.Cell) else told.train_network
        items = trainable_items(network, statistics=self.batch_norm_statistics)
        if self.optimizer_state:
            for parameter in _own_state(check.instance(told.optimizer, nn.Optimizer, "optimizer")):
                items.add(parameter.name, *described(parameter.name, parameter))
        appended = dict(self.config.append_dict or {})
        now = {"epoch_num": told.cur_epoch_num, "step_num": told.cur_step_num}
        appended.update({k: v for k, v in now.items() if k in appended})
        for name, value in appended.items():
            if isinstance(value, ms.Tensor):
                items.add(name, *described(name, value))
            else:
                items.add_value(name, value)
        in_epoch = (told.cur_step_num - 1) % told.batch_num + 1
        path = self._policy.next_file(told.cur_epoch_num, in_epoch, told.cur_step_num)
        if self.config.enc_key is not None or _sliced():
            self._save_by_mindspore(network, path, items, appended)
            self._policy.tidy()
        else:
            crc = self.config.crc_check
            self._saving = saving.save(
                path,
                items,
                async_save=bool(self.config.async_save),
                with_manifest=True,
                crc=crc,
                after=self._policy.tidy,
            )
        self._latest_ckpt_file_name = str(path)

    def _save_by_mindspore(self, network: nn.Cell, path: Path, items: Items, appended: dict[str, Any]) -> None:
        # Only MindSpore encrypts, and only it knows how to put slices of several devices together.
        c = self.config
        ms.save_checkpoint(
            network,
            str(path),
            integrated_save=c.integrated_save,
            async_save=c.async_save,
            append_dict=appended or None,
            enc_key=c.enc_key,
            enc_mode=c.enc_mode,
            choice_func=lambda name: name in items.entries,
            crc_check=c.crc_check,
            format=c.format,
        )


def trainable_items(network: nn.Cell, *, statistics: bool) -> Items:
    """The trainable parameters of a cell, without an optimizer's own, and on request its batch norms' statistics."""
    inside = [cell for _, cell in network.cells_and_names() if isinstance(cell, nn.Optimizer)]
    own = {id(p) for optimizer in inside for p in _own_state(optimizer)}
    wanted = [
        p
        for p in network.get_parameters()
        if id(p) not in own and (p.requires_grad or (statistics and p.name.endswith(kinds.STATISTICS)))
    ]
    return parameter_items(wanted)


def _own_state(optimizer: nn.Optimizer) -> list[ms.Parameter]:
    """An optimizer's moments and settings, without the parameters that it trains."""
    trained = {id(p) for p in optimizer.parameters}
    return [p for p in optimizer.get_parameters() if id(p) not in trained]


def _sliced() -> bool:
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
