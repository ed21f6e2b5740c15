"""More processes with the same command, which share its work through the store (`robench.core.claims`)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

log = logging.getLogger(__name__)

#: What a helper is called with, before the arguments of `robench`: nothing is imported from the current folder.
PROGRAM = (sys.executable, "-P", "-m", "robench")


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
        arguments: of the caller's `robench`.
    """
    import torch

    if len(places) == 1:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // len(places))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started: list[tuple[subprocess.Popen[bytes], str, IO[bytes]]] = []
    with ExitStack() as files:
        try:
            for place in places[1:]:
                own = ["--workers", str(len(places)), "--helper", "--device", place]
                end = arguments.index("--") if "--" in arguments else len(arguments)
                command = [*PROGRAM, *arguments[:end], *own, *arguments[end:]]
                output = files.enter_context(tempfile.TemporaryFile())
                pipe, null = subprocess.PIPE, subprocess.DEVNULL
                process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=null, stderr=output)
                started.append((process, place, output))
                # One that is killed would else stay as a zombie, alive to those that look at its claim.
                threading.Thread(target=process.wait, daemon=True).start()
            torch.set_num_threads(threads)
            yield
            for process, place, told in started:
                if code := process.poll():
                    told.seek(0)
                    last = told.read().decode(errors="replace").strip().rpartition("\n")[2]
                    said = last or f"exit code {code}"
                    log.warning(f"a helper on {place} ended early, its share was done here: {said}")
        finally:
            torch.set_num_threads(before)
            for process, _, _ in started:
                process.terminate()
                process.wait()
                assert process.stdin is not None
                process.stdin.close()


def end_with_caller() -> None:
    """Ends this process, a helper, when its caller is gone: its standard input is then at its end."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
