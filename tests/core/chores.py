"""What other processes do in `test_pool` and elsewhere."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from robench.core.errors import RobenchError


def do(chore: str, *arguments: Any) -> Any:
    """A function of this module, by name."""
    return globals()[chore](*arguments)


def meet(folder: str) -> str | None:
    """Which GPUs this process sees; returns when a second process is here."""
    (Path(folder) / str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(folder: str) -> None:
    """Says which process this is, and takes its time."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(300)


def threads() -> int:
    import torch

    return torch.get_num_threads()


def fail(*_: Any) -> None:
    raise RobenchError("no help\ntoday")


def running(process: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
