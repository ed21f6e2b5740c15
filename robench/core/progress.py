"""How far a job is; the command line draws a bar from it."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (done, total, what is being done).
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """A `Progress` that shows nothing."""
