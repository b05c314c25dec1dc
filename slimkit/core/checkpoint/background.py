"""Work done beside the flow of bytes from file to file: digests, and forcing to the disk what is written already."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

# Below this a digest is quicker than handing it to a thread.
WORTH_A_THREAD_BYTES = 256 << 10
SYNC_BYTES = 64 << 20  # a disk is kept busy by as much, and a file of less is forced out once, at its end

# Not every system can leave a file's times behind.
_sync = getattr(os, "fdatasync", os.fsync)


class BackgroundThread:
    """A thread that does one job after the other while its owner goes on; one job at a time may be under way.

    An executor will not do: it refuses jobs while the interpreter waits at exit for a save in the background.
    """

    def __init__(self) -> None:
        self._free = threading.Semaphore()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object], *, wait: bool = True) -> bool:
        """Start a job when the last one is done; with wait=False only if it is done by now. Says whether it started.

        What the last job raised is raised here.
        """
        if not self._free.acquire(blocking=wait):
            return False
        if self._error is not None:
            self._free.release()
            self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beside a checkpoint", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised again where the owner waits
                self._error = error
            self._free.release()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait for the last job, and raise what it raised."""
        with self._free:
            self._raise()

    def __enter__(self) -> BackgroundThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()


class Outflow:
    """Writes to a file and has the disk take up what is there while more is coming.

    Left alone, a system keeps a gigabyte in memory and writes it when the file is synced at its end; reading,
    hashing and converting would then wait for the disk, or the disk for them.
    """

    def __init__(self, handle: IO[Any]) -> None:
        self._handle = handle
        self._beside = BackgroundThread()
        self._since = 0

    def write(self, part: bytes | memoryview) -> None:
        """Write the next bytes."""
        self._handle.write(part)
        self._since += len(part)
        if self._since >= SYNC_BYTES:
            self._handle.flush()
            if self._beside.submit(lambda: _sync(self._handle.fileno()), wait=False):
                self._since = 0

    def __enter__(self) -> Outflow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._beside:
            if kind is None:
                self._beside.settle()
