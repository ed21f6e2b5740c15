"""How far a job is, and the bar that shows it where somebody looks; how long one takes."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Called with (done, total, what is being done).
Progress = Callable[[int, int, str], None]

#: Seconds between two states of a bar in a notebook: each is a message to the browser.
_PAUSE = 0.3


def silent(done: int, total: int, what: str) -> None:
    """A `Progress` that shows nothing."""


def duration(seconds: float) -> str:
    """In words, rounded, in a unit of which there are at least two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


@contextmanager
def bar(*, terminal: bool = True) -> Iterator[Progress]:
    """One bar with the time left, which vanishes at its end: in the notebook that runs this, or on stderr.

    Silent where neither is looked at, and on a terminal where it is not asked for: a script may have bars of its own.
    """
    if _in_notebook():
        shown = _Shown()
        try:
            yield shown
        finally:
            shown.close()
    elif terminal:
        with _on_terminal() as progress:
            yield progress
    else:
        yield silent


@contextmanager
def _on_terminal() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _in_notebook() -> bool:
    """Whether a kernel runs this, for a page that shows what is displayed; a terminal's IPython does not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class _Shown:
    """A `Progress` as one output of a notebook's cell, which is replaced, so that one is all that is kept.

    rich draws there with ipywidgets, which few have: without them it warns and draws nothing.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last = -_PAUSE
        self._handle: Any = None

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._last < _PAUSE:
            return
        self._last = now
        self._first = began, before = self._first or (now, done)  # what is resumed, and what warms up, tells no speed
        left = f", {duration((now - began) * (total - done) / (done - before))} left" if before < done < total else ""
        said = f"{what}: {100 * done / max(1, total):.0f} %{left}"
        drawn = f'<progress value="{done}" max="{max(1, total)}"></progress> {html.escape(said)}'
        self._display({"text/plain": said, "text/html": drawn})

    def close(self) -> None:
        if self._handle is not None:
            self._display({"text/plain": "", "text/html": ""})

    def _display(self, content: dict[str, str]) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content, raw=True)
