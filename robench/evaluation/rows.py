"""Where rows are kept: in memory, or in a run's folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from robench.core.errors import RobenchError
from robench.core.store import read_frame, read_record, write_frame, write_record
from robench.evaluation.cells import Cell
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import Outcomes, empty_rows

log = logging.getLogger(__name__)


class Rows:
    """The rows of one target, by cell; these are kept in memory, for a call from Python."""

    def __init__(self) -> None:
        self._parts: dict[str, pd.DataFrame] = {}
        self._index: dict[str, set[int]] = {}
        self._cells: dict[str, Cell] = {}
        self._checks: dict[str, dict[str, Finding]] = {}

    def samples(self, cell: str) -> frozenset[int]:
        """Samples that are judged already."""
        return frozenset(self._index.get(cell, ()))

    def declare(self, cell: Cell) -> None:
        """Says what a cell is, before its first row."""
        self._cells[cell.key] = cell

    def append(self, rows: pd.DataFrame) -> None:
        """Keeps rows for good: all of them, or on a failure none."""
        self._add(str(len(self._parts)), rows)

    def remember(self, target: str, threat: str, checks: Sequence[Finding]) -> None:
        """Keeps what was found while the rows of ``threat`` on ``target`` (an identity) were made, instead of what was
        found before under the same names."""
        own = self._checks.setdefault(f"{target}/{threat}", {})
        own.update({check.name: check for check in checks})

    def remembered(self, target: str) -> list[Finding]:
        """What was found of ``target``, under every threat; the same finding of several threats counts once."""
        found = [each for key, own in self._checks.items() if key.startswith(f"{target}/") for each in own.values()]
        return list(dict.fromkeys(found))

    def outcomes(self) -> Outcomes:
        """All rows."""
        return Outcomes.join(self._all(), self._cells)

    def refresh(self) -> None:
        """Learns of rows that others added."""

    def compact(self) -> None:
        """Tidies up after a job."""

    def _all(self) -> pd.DataFrame:
        if not self._parts:
            return empty_rows()
        rows = pd.concat(self._parts.values(), ignore_index=True)
        return rows.drop_duplicates(["cell", "member", "sample"], ignore_index=True)

    def _add(self, part: str, rows: pd.DataFrame) -> None:
        self._parts[part] = rows
        for cell, samples in rows.groupby("cell")["sample"]:
            self._index.setdefault(str(cell), set()).update(map(int, samples))


class FolderRows(Rows):
    """Rows in ``folder``: ``part-<hash>.parquet``, each whole or absent, and ``cells/<key>.json``.

    Several processes may append; a row written twice counts once. A part whose bytes are not those that were written
    is set aside, under a name that ends in ``.damaged``, and its rows are judged again.

    Args:
        repair: False, for whoever only reads, leaves such a part where it is.
    """

    def __init__(self, folder: Path, *, repair: bool = True) -> None:
        super().__init__()
        self.folder = folder
        self._repair = repair
        self._checks = self._read_checks()
        self.refresh()

    def declare(self, cell: Cell) -> None:
        if not self.declared(cell.key):
            cell.write(self.folder)

    def declared(self, key: str) -> bool:
        """Whether it is said what the cell of that key is."""
        try:
            return bool(Cell.read(self.folder, key))
        except RobenchError:
            return False

    def append(self, rows: pd.DataFrame) -> None:
        self._add(write_frame(self.folder, rows).name, rows)

    def remember(self, target: str, threat: str, checks: Sequence[Finding]) -> None:
        self._checks = self._read_checks()
        before = {key: dict(own) for key, own in self._checks.items()}
        super().remember(target, threat, checks)
        if self._checks != before:
            values = {key: {name: asdict(check) for name, check in own.items()} for key, own in self._checks.items()}
            write_record(self.folder / "checks.json", values)

    def _read_checks(self) -> dict[str, dict[str, Finding]]:
        path = self.folder / "checks.json"
        if not path.exists():
            return {}
        try:
            return {
                str(key): {str(name): Finding(**check) for name, check in own.items()}
                for key, own in read_record(path).items()
            }
        except (RobenchError, TypeError, AttributeError):
            log.warning(f"{path} is damaged: what it says of these rows is lost; robench eval finds it again")
            return {}

    def refresh(self) -> None:
        """Reads the parts that are new; what others compacted away holds nothing new."""
        for path in sorted(self.folder.glob("part-*.parquet")):
            if path.name in self._parts:
                continue
            try:
                part = read_frame(path)
            except FileNotFoundError:
                if path.is_symlink():
                    raise RobenchError(f"{path} is a link to nothing; restore what it names, or remove it") from None
                # Another process compacted in between: what it wrote instead holds these rows.
                return self.refresh()
            if part is None:
                if self._repair:
                    with suppress(FileNotFoundError):  # another process did
                        path.rename(path.with_name(f"{path.name}.damaged"))
                then = "is set aside and its rows are judged again" if self._repair else "its rows do not count here"
                log.warning(f"{path} is damaged: {then}")
            else:
                self._add(path.name, part)
        return None

    def outcomes(self, identity: str | None = None) -> Outcomes:
        """All rows.

        Args:
            identity: of the target that the folder belongs to now; rows of another one, whose weights were replaced,
                are left out and told.
        """
        rows = self._all()
        cells = {str(key): Cell.read(self.folder, str(key)) for key in rows["cell"].unique()}
        if identity is not None:
            others = [key for key, cell in cells.items() if cell.identity != identity]
            if others:
                log.warning(f"{len(others)} of {len(cells)} cells in {self.folder} are of other weights: left out")
                cells = {key: cell for key, cell in cells.items() if key not in others}
        self._tell_lost(identity, cells)
        found = Outcomes.join(rows, cells)
        return Outcomes(found.frame, self.remembered(identity) if identity is not None else ())

    def _tell_lost(self, identity: str | None, cells: Mapping[str, Cell]) -> None:
        """Cells that were begun and have no row: an evaluation was cut off, or files were removed."""
        lost = []
        for path in sorted((self.folder / "cells").glob("*.json")):
            if path.stem not in cells:
                cell = Cell.read(self.folder, path.stem)
                if identity in (None, cell.identity):
                    lost.append(cell)
        if lost:
            which = sorted({f"{each.threat} {each.attack} {each.loss}".rstrip() for each in lost})
            log.warning(
                f"{len(lost)} cells in {self.folder} have no rows: {', '.join(which)}; an evaluation was cut off, or "
                f"files are gone: run the same robench eval again"
            )

    def compact(self) -> None:
        """One file instead of many: the new one is there before the old ones go."""
        old = sorted(self.folder.glob("part-*.parquet"))
        if len(old) < 2:
            return
        self.refresh()
        keys = ["cell", "member", "sample"]
        kept = write_frame(self.folder, self._all().sort_values(keys, kind="stable", ignore_index=True))
        for path in old:
            if path != kept and path.name in self._parts:
                path.unlink(missing_ok=True)
        self._parts = {kept.name: self._all()}
