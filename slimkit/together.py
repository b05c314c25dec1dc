"""Several processes of torch.distributed on one job: who they are, what they tell each other, and one that is lost."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.core.errors import ProcessLostError

import torch
import torch.distributed as dist

# A process may be at work alone for long: it reads files, or solves what no other waits for.
PATIENCE = timedelta(hours=6)
# How long one that has failed waits for the others to hear of it: they may be in an exchange that it did not come to,
# and end when it ends.
GRACE = timedelta(seconds=20)
# Of what a process tells in a step, in bytes.
_TOLD = 1024
# The group in which processes keep step.
_BESIDE: contextvars.ContextVar[Any] = contextvars.ContextVar("beside", default=None)
# Whether this process does something that the others wait for.
_ALONE: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun began, for the life of this one; nothing where there is one, or a group.

    Args:
        device: where arrays lie: "cuda" and "npu" exchange them by their own library.

    Returns:
        The device; without a number the one that torchrun means for this process.
    """
    began = int(os.environ.get("WORLD_SIZE", "1") or "1")
    if device.type != "cpu" and device.index is None and began > 1:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    if began < 2 or not dist.is_available() or dist.is_initialized():
        return device
    own = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}.get(device.type, "gloo")
    with exchanging():
        dist.init_process_group(own, timeout=PATIENCE)
    atexit.register(_leave)
    return device


def _leave() -> None:
    """Give the group up: its threads abort a process that ends with them, and its work then looks failed."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work as one process does while the others wait: nothing in here may exchange anything with them."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_alone() -> bool:
    """Whether this process works while the others wait."""
    return _ALONE.get()


def processes() -> int:
    """How many processes of torch.distributed do the job."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def gather(value: Any) -> list[Any]:
    """A plain value of every process, by its number."""
    found = [value] * processes()
    if len(found) > 1:
        with exchanging():
            dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Name what a failed exchange means: another process is gone.

    Raises:
        ProcessLostError: the exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (ProcessLostError, torch.OutOfMemoryError)):
            raise
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise ProcessLostError(
            "another process of this job has ended or cannot be reached; the same command goes on from what is "
            f"finished ({first_line})"
        ) from None


@contextlib.contextmanager
def keeping_step() -> Iterator[None]:
    """Exchange tensors in such a way that no process waits for one that has failed; all of them enter.

    Before each exchange, and at the end, each tells the others by `step` that it goes on, or what went wrong: on a way
    of its own, so that it reaches those who are about to exchange something else.
    """
    if processes() < 2:
        yield
        return
    with exchanging():
        beside = dist.new_group(backend="gloo", timeout=PATIENCE)
    token = _BESIDE.set(beside)
    try:
        yield
    finally:
        _BESIDE.reset(token)
        dist.destroy_process_group(beside)


def step(wrong: str | None = None) -> list[str | None]:
    """What went wrong in each of the processes that keep step, by its number: None where it goes on.

    Args:
        wrong: what went wrong in this one.

    Raises:
        ProcessLostError: another process has ended.
    """
    beside = _BESIDE.get()
    if beside is None:
        return [wrong]
    words = b"" if wrong is None else wrong.encode()[: _TOLD - 1] + b"."
    own = torch.tensor(list(words.ljust(_TOLD, b"\0")), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(processes())]
    # `dist.all_gather` knows the group's patience alone, and no process can end with an exchange under way.
    limit = dist.distributed_c10d.AllgatherOptions()
    limit.timeout = PATIENCE if wrong is None else GRACE
    with exchanging():
        beside.allgather([every], [own], limit).wait()
    found = [bytes(one.tolist()).rstrip(b"\0")[:-1].decode(errors="ignore") for one in every]
    return [text or None for text in found]


def speaks() -> bool:
    """Whether this process is the first of a failing job to say why; the others need not say it again."""
    if int(os.environ.get("WORLD_SIZE", "1") or "1") < 2:
        return True
    try:
        # torchrun keeps this store, so that it outlives every process.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=3))
        key = f"slimkit/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return bool(store.add(key, 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return os.environ.get("RANK", "0") == "0"
