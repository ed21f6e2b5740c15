"""Files that say something else than they did, as if they had been written so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from robench.core.files import content_key, read_frame, read_record, write_frame, write_record
from robench.evaluation.evaluations import FOLDER, Evaluation


def record(path: Path, **changes: Any) -> None:
    write_record(path, {**read_record(path), **changes})


def cells(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifests of all cells of a folder of rows; keys and rows follow."""
    keys = {}
    for path in (folder / "cells").glob("*.json"):
        cell = read_record(path)
        change(cell)
        if "craft" in cell["recipe"]:
            cell["craft"] = content_key(cell["recipe"]["craft"])
        path.unlink()
        keys[path.stem] = content_key(cell["recipe"])
        write_record(folder / "cells" / f"{keys[path.stem]}.json", cell)
    for path in (folder / FOLDER).glob("*.json"):
        asked = Evaluation.read(path)
        path.unlink()
        replace(asked, cells=tuple(sorted(keys[cell] for cell in asked.cells))).write(folder)
    for path in folder.glob("part-*.parquet"):
        rows = read_frame(path)
        path.unlink()
        write_frame(folder, rows.assign(cell=rows["cell"].map(keys)))
