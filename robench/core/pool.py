"""Processes on this machine that do as they are told, spread over its GPUs; none outlives who began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any


class Processes:
    """One task at a time each. Where a process dies, its task alone is lost; the next task begins a new one.

    Args:
        function: what they do. They find it by its name, and get copies of its arguments.
        gpus: as CUDA_VISIBLE_DEVICES names them, each process sees one; with none, whatever this process sees.
        threads: of torch in each; by default as torch has it.
    """

    def __init__(
        self, function: Callable[..., Any], workers: int, gpus: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self.slots = workers
        self._function = function
        self._gpus, self._threads = gpus, threads
        self._context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: when this process closes its end, or ends, the others end.
        self._theirs, self._ours = self._context.Pipe(duplex=False)
        # A pool of one each: a ProcessPoolExecutor of several ends them all where one dies.
        self._pools = [self._begun(slot) for slot in range(workers)]
        self._tasks: list[Future[Any] | None] = [None] * workers

    def _begun(self, slot: int) -> ProcessPoolExecutor:
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        return ProcessPoolExecutor(1, self._context, initializer=_begin, initargs=(self._theirs, gpu, self._threads))

    def submit(self, call: tuple[Any, ...]) -> Future[Any]:
        """The function of these arguments, in a process that has nothing to do; BrokenExecutor where that dies.

        At most ``slots`` tasks may be under way.
        """
        slot = next(slot for slot, task in enumerate(self._tasks) if task is None or task.done())
        try:
            future = self._pools[slot].submit(self._function, *call)
        except BrokenExecutor:
            self._pools[slot] = self._begun(slot)
            future = self._pools[slot].submit(self._function, *call)
        self._tasks[slot] = future
        return future

    def close(self) -> None:
        """Ends all processes, whatever they are doing."""
        self._ours.close()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._theirs.close()


def visible_gpus(device: str) -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; none where one was asked for, or the CPU."""
    import torch

    if device not in ("auto", "cuda"):
        return []
    there = range(torch.cuda.device_count())
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [named[slot].strip() if slot < len(named) and named[slot] else str(slot) for slot in there]


def _begin(life: Connection, gpu: str | None, threads: int | None) -> None:
    """The first that a process does, before CUDA is.

    Args:
        life: at its end when whoever began this process wants no more, or is gone.
    """
    _end_with(life)
    # Ctrl-C reaches all processes of a terminal: who began them answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _end_with(life: Connection) -> None:
    """Ends this process as soon as ``life`` is at its end."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # Whoever inherited the other end of the pipe would keep it open.
        while os.getppid() == parent.pid and not life.poll(1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
