"""Who works on what: several processes on one store share units of work, and none waits for a dead one."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robench.core.errors import RobenchError

#: Seconds without a sign of life after which a claim of another machine counts as abandoned.
STALE = 900.0

#: Seconds after which a claim that does not say whose it is counts as abandoned: who is killed has no time to write it.
UNWRITTEN = 10.0

#: Seconds between two looks at what another process has.
PAUSE = 0.5


class Claims:
    """Claims as files in ``folder``; None grants everything, for work that nobody else can see."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: Path | None = None

    @property
    def terms(self) -> str:
        """Where claims are and how they end, in words."""
        return f"{self._folder} says who; of a machine that is gone, a claim ends after {STALE / 60:.0f} minutes"

    @contextmanager
    def take(self, unit: str) -> Iterator[bool]:
        """Whether ``unit`` is ours until the block ends; not while a living process has it."""
        if self._folder is None:
            yield True
            return
        path = self._folder / f"{unit}.json"
        if not self._create(path) and not (self._abandoned(path) and self._create(path)):
            yield False
            return
        self._held = path
        try:
            yield True
        finally:
            self._held = None
            path.unlink(missing_ok=True)

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

    def beat(self) -> None:
        """A sign of life of the claim that is held."""
        if self._held is not None and self._held.exists():
            os.utime(self._held)

    @staticmethod
    def _create(path: Path) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        except OSError as error:
            raise RobenchError(f"cannot write {path} ({error.strerror}); free or choose another place") from error
        with os.fdopen(handle, "w") as file:
            json.dump(owner(), file)
        return True

    @staticmethod
    def _abandoned(path: Path) -> bool:
        """Removes a claim whose owner is gone; whether it did."""
        try:
            age = time.time() - path.stat().st_mtime
            told = json.loads(path.read_text() or "{}")
        except FileNotFoundError:
            return True
        except ValueError:
            told = {}
        if not isinstance(told, dict) or not told:
            gone = age > UNWRITTEN
        elif told.get("host") == socket.gethostname():
            gone = not alive(told)
        else:
            gone = age > STALE
        if gone:
            # Only one of several processes gets to move it away.
            grave = path.with_suffix(f".{os.getpid()}.gone")
            try:
                path.rename(grave)
            except FileNotFoundError:
                return True
            grave.unlink(missing_ok=True)
        return gone


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
