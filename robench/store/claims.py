"""Who works on what: several processes on one store share units of work, and none waits for a dead one.

A claim is a lease of `filelock`: a file that names its owner, and that a thread of the owner renews while it is held.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from robench.core.errors import RobenchError

#: Seconds without renewal after which a claim ends: of a process on another machine, of one that is stopped, and of one
#: that was killed and not waited for. Of any other that is dead on this machine it ends at once.
LEASE = 120.0

#: Seconds after which a claim that does not say whose it is counts as abandoned: a machine crashed that was writing it.
UNWRITTEN = 10.0

#: Seconds between two looks at what another process has.
PAUSE = 0.5


class Claims:
    """Claims as files in ``folder``; None grants everything, for work that nobody else can see."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        #: Of units that others have: a lease knows since when it has seen its file unchanged.
        self._refused: dict[str, SoftFileLease] = {}

    @property
    def terms(self) -> str:
        """Where claims are and how they end, in words."""
        return f"{self._folder} says who; of a machine that is gone, a claim ends after {LEASE / 60:.0f} minutes"

    @contextmanager
    def take(self, unit: str) -> Iterator[bool]:
        """Whether ``unit`` is ours until the block ends; not while a living process has it.

        Raises:
            RobenchError: the folder cannot be written.
        """
        if self._folder is None:
            yield True
            return
        path = self._folder / f"{unit}.lock"
        lease = self._refused.pop(unit, None) or SoftFileLease(path, lease_duration=LEASE)
        try:
            lease.acquire(blocking=False)
        except Timeout:
            self._refused[unit] = lease
            _give_up_unwritten(path)
            yield False
            return
        except OSError as error:
            raise RobenchError(f"cannot write {path} ({error.strerror}); free or choose another place") from error
        try:
            yield True
        finally:
            lease.release()

    @contextmanager
    def hold(self, unit: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """``unit`` is ours until the block ends, which begins when nobody else has it.

        Args:
            waiting: called at every look where somebody has, with words that say who is waited for and for how long.
        """
        while True:
            with self.take(unit) as granted:
                if granted:
                    yield
                    return
            waiting(self.terms)
            time.sleep(PAUSE)


def _give_up_unwritten(path: Path) -> None:
    """Lets filelock recover an old file that is empty. It leaves these alone, as its early versions wrote no owner, but
    takes over what it cannot read."""
    with suppress(OSError), path.open("r+b") as file:
        found = os.fstat(file.fileno())
        if not found.st_size and time.time() - found.st_mtime > UNWRITTEN:
            file.write(b"?")


def owner() -> dict[str, Any]:
    """This process, told from every other: host, process, and where the system says it, when it began."""
    return {"host": socket.gethostname(), "process": os.getpid(), "began": _state(os.getpid())[1]}


def alive(owner: Mapping[str, Any]) -> bool:
    """Whether an `owner` of this machine still runs."""
    process, began = int(owner["process"]), owner.get("began")
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, since = _state(process)
    # Killed and not yet waited for, it has its number still; or another has it: a container numbers from 1 again.
    return state not in ("Z", "X") and (began is None or since in (began, None))


def _state(process: int) -> tuple[str | None, str | None]:
    """A process's state and when it began, in the kernel's words; None where the system does not say."""
    try:
        told = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, None
    return told[0], told[19]
