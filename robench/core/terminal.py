"""Tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def interval(row: Mapping[Any, Any], value: str, ends: str = "", *, scale: float = 100, digits: int = 1) -> str:
    """A number with the ends of its interval, as ``40.0 [35.8, 44.4]``; a rate in percent.

    Args:
        ends: what follows ``low`` and ``high`` in the names of the ends.
    """
    middle, low, high = (f"{scale * row[name]:.{digits}f}" for name in (value, f"low{ends}", f"high{ends}"))
    return f"{middle} [{low}, {high}]"


def drawn(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as wide as it needs to be, under its title; the title alone where there are no lines."""
    if not lines:
        return title
    # A tenth of a second that commands without a table do not wait for.
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("target", "threat", "") else "right")
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    # In a notebook rich would display it, and the text would be empty; a name such as net[a] is no markup.
    Console(file=text, width=400, highlight=False, markup=False, emoji=False, force_jupyter=False).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
