"""How far a job is, from which the command line draws a bar; how long one takes."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (done, total, what is being done).
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """A `Progress` that shows nothing."""


def duration(seconds: float) -> str:
    """In words, rounded, in a unit of which there are at least two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
