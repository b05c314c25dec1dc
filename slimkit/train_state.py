"""What a checkpoint of a torch run holds beside the history: weights, optimizer, scheduler, random numbers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint.weightfile import Array, Entry, stream_safetensors
from slimkit.core.errors import ConfigError, FileFormatError, UnsupportedError
from slimkit.core.log import logger
from slimkit.core.train import packing
from slimkit.core.train.loop import TrainerLoop
from slimkit.sharded import at_rest, is_distributed, like_parts_of, one_writes, whole
from slimkit.torchfile import storable, stored, tag_of

import torch
from torch import distributed

_FILE = "state.safetensors"


class Parcel:
    """A nested state as JSON and a stream of its tensors, which all processes that hold parts of them make together.

    Args:
        state: dicts, lists, numbers, tensors.
        writes: whether this process writes them; the others give their parts.

    Raises:
        UnsupportedError: no file holds a value; in every process, before anything is written.
    """

    def __init__(self, state: Any, *, writes: bool) -> None:
        self.entries: dict[str, Entry] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self.packed: dict[str, Any] = packing.pack(state, self._keep)
        self._stream = self._each(writes)

    def _keep(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        name = f"t{len(self.entries)}"
        storable(value, "a state of this run")
        self.entries[name], self._tensors[name] = Entry(tag_of(value), tuple(value.shape)), value
        return name

    def _each(self, writes: bool) -> Iterator[tuple[str, Array]]:
        for name, tensor in self._tensors.items():
            value = whole(tensor.detach())
            yield name, stored(value) if writes else np.empty(0)

    def write(self, file: Path) -> None:
        """Write the tensors, one at a time in memory."""
        stream_safetensors(file, self.entries, self._stream)

    def drain(self) -> None:
        """Take part in what is left of the stream: other processes wait for this one's parts."""
        for _ in self._stream:
            pass


class TrainState(TrainerLoop):
    """The half of a torch trainer that saves and loads a run."""

    # What the trainer itself says.

    optimizer: Any
    accelerator: Any
    _scheduler: Any
    _run_model: Any
    _run_optimizer: Any
    _parcel: Parcel

    @contextlib.contextmanager
    def _saving(self) -> Iterator[bool]:
        rank, world, _ = self._processes()
        at_rest(self.model)  # an evaluation may have left gathered copies, which look like whole parameters
        shared = any(map(is_distributed, self.model.parameters()))
        # Within a run each process is here, and draws numbers of its own.
        drawn = [_random(self.accelerator.device)] * world
        if world > 1 and (shared or self._run_optimizer is not None):
            distributed.all_gather_object(drawn, drawn[0])
        model = self.accelerator.unwrap_model(self._run_model)
        scaler = self.accelerator.scaler
        if shared:
            _check_states(model, self.optimizer)
        state = {
            "weights": model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else state_of_scheduler(self._scheduler),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": drawn[0],
            "random_of_others": drawn[1:],
        }
        self._parcel = parcel = Parcel(state, writes=rank == 0)
        if not shared:
            yield rank == 0
            return
        with one_writes("the checkpoint", parcel.drain) as writes:
            yield writes

    def _save_state(self, folder: Path) -> dict[str, Any]:
        self._parcel.write(folder / _FILE)
        return self._parcel.packed

    def _load_state(self, folder: Path, state: dict[str, Any]) -> None:
        with _opened(folder, state) as found:
            self._load_weights(found["weights"])
            self._load_optimizer(found["optimizer"])
            if (found["scheduler"] is None) != (self._scheduler is None):
                raise ConfigError("resume_from: one of the checkpoint and this run has a scheduler, the other has none")
            if self._scheduler is not None:
                self._scheduler.load_state_dict(found["scheduler"])
            if self.accelerator.scaler is not None and found["scaler"]:
                self.accelerator.scaler.load_state_dict(found["scaler"])
            self._draw_on([found["random"], *found.get("random_of_others", [])])

    def _draw_on(self, drawn: list[Any]) -> None:
        """Go on with the random numbers of this process, or with fresh ones where there were fewer or more of them."""
        rank, world, _ = self._processes()
        if rank > 0 and len(drawn) != world:
            logger.info("the checkpoint was written by %d processes: process %d draws fresh numbers", len(drawn), rank)
            torch.manual_seed(self.seed + rank)
            return
        own = drawn[rank]
        torch.set_rng_state(own["torch"])
        random.setstate(own["python"])
        np.random.set_state(own["numpy"])
        if "device" in own and self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).set_rng_state(own["device"])

    def _load_optimizer(self, kept: dict[str, Any]) -> None:
        """Take the optimizer's state back whole: torch casts it to the parameters' type, and so rounds it."""
        order = [i for group in kept["param_groups"] for i in group["params"]]
        parameters = dict(zip(order, self._optimized()))
        found = {
            number: {slot: _held_like(parameters.get(number), value) for slot, value in slots.items()}
            for number, slots in kept["state"].items()
        }
        self.optimizer.load_state_dict({**kept, "state": found})
        for number, parameter in parameters.items():
            for slot, value in found.get(number, {}).items():
                here = self.optimizer.state[parameter].get(slot)
                if isinstance(value, torch.Tensor) and isinstance(here, torch.Tensor) and here.dtype != value.dtype:
                    self.optimizer.state[parameter][slot] = value.to(here.device)

    def _load_model(self, folder: Path, state: dict[str, Any]) -> None:
        with _opened(folder, state) as found:
            self._load_weights(found["weights"])

    def _load_weights(self, found: dict[str, Any]) -> None:
        model = self.accelerator.unwrap_model(self._run_model)
        own = model.state_dict()
        model.load_state_dict({name: like_parts_of(own.get(name), value) for name, value in found.items()})


@contextlib.contextmanager
def _opened(folder: Path, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was packed, its tensors read from the file when they are used: copy what shall stay."""
    from safetensors import SafetensorError, safe_open

    file = files.readable_file(folder / _FILE, "checkpoint")
    try:
        with safe_open(str(file), framework="pt") as tensors:
            found: dict[str, Any] = packing.unpack(state, tensors.get_tensor)
            yield found
    except SafetensorError as error:
        raise FileFormatError(f"{file} is damaged: {error}") from None


def _held_like(parameter: Any, value: Any) -> Any:
    """A state of a parameter as its process holds it, in memory of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    if is_distributed(parameter) and value.shape == parameter.shape:
        like = torch.empty_like(parameter, dtype=value.dtype)
        return like_parts_of(like, value).clone()
    return value.clone()


def _random(device: torch.device) -> dict[str, Any]:
    """Where this process's random numbers are."""
    found = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if device.type != "cpu":
        found["device"] = torch.get_device_module(device).get_rng_state()
    return found


def _check_states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse states that processes hold parts of in a way that nothing puts together."""
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter, slots in optimizer.state.items():
        if not is_distributed(parameter):
            continue
        for slot, value in slots.items():
            if not isinstance(value, torch.Tensor) or (value.ndim == 0 and not is_distributed(value)):
                continue
            if not is_distributed(value) or value.shape != parameter.shape:
                kind, path = type(optimizer).__name__, names.get(id(parameter), "a parameter")
                raise UnsupportedError(
                    f"a checkpoint cannot hold what {kind} keeps as {slot!r} of {path}, which processes hold parts of: "
                    f"it is no distributed tensor of the parameter's shape"
                )


def state_of_scheduler(scheduler: Any) -> dict[str, Any]:
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
