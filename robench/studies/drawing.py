"""Outcomes to files: figures, their values, tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robench.core.errors import RobenchError
from robench.core.provenance import versions
from robench.evaluation.outcomes import Outcomes
from robench.reports import build


def draw(outcomes: Outcomes, out: Path, *, notice: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Every figure and table that the rows have data for, in ``out``; the files."""
    if outcomes.frame.empty:
        raise RobenchError("nothing was measured on these runs; robench eval does it")
    files, notices = build.write(outcomes.frame, out, {"versions": versions()})
    for text in notices:
        notice(text)
    return files
