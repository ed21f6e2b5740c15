"""More processes with the same command, which share its work through the store (`robench.evaluation.claims`)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from robench.commands._shared import notice

#: What a helper is called with, before the arguments of `robench`.
PROGRAM = (sys.executable, "-m", "robench")


def places_of(device: str, workers: int | None) -> list[str]:
    """A device for each process, the caller's first: every GPU one, unless ``device`` is one of them or the CPU.

    Args:
        device: as the user gave it; workers: how many, by default one per GPU, and one on a CPU.
    """
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    places = [f"cuda:{i}" for i in range(gpus)] if gpus > 1 else [device]
    count = len(places) if workers is None else workers
    return [places[i % len(places)] for i in range(count)]


@contextmanager
def helpers(arguments: Sequence[str], places: Sequence[str]) -> Iterator[None]:
    """One process for every place but the first, which is the caller's; ended when the caller has all rows.

    A helper that fails takes nothing along: what it leaves, the others do. On a CPU the processes share the cores.

    Args:
        arguments: of `robench`, which make a process a helper.
    """
    import torch

    if len(places) == 1:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // len(places))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in places[1:]]
        started = [
            subprocess.Popen(
                [*PROGRAM, *arguments, "--device", place],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            for place, log in zip(places[1:], logs, strict=True)
        ]
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            for process, place, log in zip(started, places[1:], logs, strict=True):
                if process.poll():
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                    notice(f"a helper on {place} ended early, its share was done here: {last}")
                process.terminate()
                process.wait()
