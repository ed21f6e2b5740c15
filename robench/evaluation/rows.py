"""Where rows and the evaluations that they belong to are kept: in memory, or in a run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from robench.core.errors import RobenchError
from robench.core.files import read_frame, read_record, write_frame, write_record
from robench.core.parts import read_parts
from robench.evaluation.cells import Cell
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.evaluations import FOLDER, Evaluation
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import ASIDE, Outcomes, empty_rows, of_one_draw

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

    def begin(self, evaluation: Evaluation) -> None:
        """Says which rows an evaluation consists of, before they are made; in memory none outlives who makes them."""

    def missing(self, evaluation: Evaluation) -> int:
        """How many (cell, sample) pairs of an evaluation have no rows."""
        wanted = set(evaluation.samples)
        return sum(len(wanted - self.samples(cell)) for cell in evaluation.cells)

    def remember(self, target: str, threat: str, checks: Sequence[Finding]) -> None:
        """Keeps what was found while the rows of ``threat`` on ``target`` (an identity) were made, instead of what was
        found before under the same names."""
        own = self._checks.setdefault(f"{target}/{threat}", {})
        own.update({check.name: check for check in checks})

    def remembered(self, target: str) -> list[Finding]:
        """What was found of ``target``, under every threat; the same finding of several threats counts once."""
        found = [each for key, own in self._checks.items() if key.startswith(f"{target}/") for each in own.values()]
        return list(dict.fromkeys(found))

    def everything(self) -> Outcomes:
        """All rows, whatever they were made for."""
        return self._joined(self._all())

    def of(self, evaluations: Iterable[Evaluation]) -> Outcomes:
        """The rows of these evaluations."""
        evaluations = list(evaluations)
        samples: dict[str, set[int]] = {}
        for each in evaluations:
            for cell in each.cells:
                samples.setdefault(cell, set()).update(each.samples)
        rows = self._all()
        chosen = np.zeros(len(rows), dtype=bool)
        for key, places in rows.groupby("cell").indices.items():
            if str(key) in samples:
                chosen[places] = np.isin(rows["sample"].to_numpy()[places], list(samples[str(key)]))
        found = self._joined(rows[chosen])
        return Outcomes(found.frame, (), found.cells, evaluations)

    def _joined(self, rows: pd.DataFrame) -> Outcomes:
        """Rows with their cells."""
        return Outcomes.join(rows, {str(key): self.cell(str(key)) for key in rows["cell"].unique()})

    def cell(self, key: str) -> Cell:
        """What the rows of that key are of; RobenchError where that is not known."""
        return self._cells[key]

    def refresh(self) -> None:
        """Learns of rows that others added."""

    def compact(self) -> None:
        """Tidies up after a job."""

    def parts(self) -> pd.DataFrame:
        """All rows as they were appended; one that was written twice, with the same values, counts once."""
        parts = self._parts.values()
        return pd.concat(parts, ignore_index=True).drop_duplicates(ignore_index=True) if parts else empty_rows()

    def _all(self) -> pd.DataFrame:
        return self.parts().drop_duplicates(["cell", "member", "sample"], ignore_index=True)

    def _add(self, part: str, rows: pd.DataFrame) -> None:
        self._parts[part] = rows
        for cell, samples in rows.groupby("cell")["sample"]:
            self._index.setdefault(str(cell), set()).update(map(int, samples))


#: What was found while rows were made, beside them.
CHECKS = "checks.json"
#: Columns that rows of every version have; `FolderRows.refresh` fills in what joined later.
_read = partial(read_frame, columns=("cell", "sample", "member", "correct"))


class FolderRows(Rows):
    """Rows in ``folder``: ``part-<hash>.parquet``, each whole or absent, beside ``cells/<key>.json`` and
    ``evaluations/<key>.json``.

    Several processes may append; a row written twice counts once. A part whose bytes are not those that were written
    is set aside, under a name that ends in ``.damaged``, and its rows are judged again.

    Args:
        repair: False, for whoever only reads, leaves such a part where it is.

    Attributes:
        damaged: such parts.
    """

    def __init__(self, folder: Path, *, repair: bool = True) -> None:
        super().__init__()
        self.folder = folder
        self.damaged: list[Path] = []
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
            write_record(self.folder / CHECKS, values)

    def _read_checks(self) -> dict[str, dict[str, Finding]]:
        path = self.folder / CHECKS
        if not path.exists():
            return {}
        try:
            return {
                str(key): {str(name): Finding(**check) for name, check in own.items()}
                for key, own in read_record(path).items()
            }
        except (RobenchError, TypeError, AttributeError):
            return {}  # `outcomes` tells of which rows nothing is known

    def refresh(self) -> None:
        """Reads the parts that are new."""
        known = {self.folder / name for name in self._parts}
        if not self._repair:
            known.update(self.damaged)  # where they are, and told
        for path, rows in read_parts(
            self.folder, "part-*.parquet", _read, "its rows", "are judged again", known=known, repair=self._repair
        ):
            if rows is None:
                self.damaged.append(path)
            else:
                # Older rows do not say which part of an attack took an image, and are of one draw.
                rows = rows if "part" in rows else rows.assign(part="")
                self._add(path.name, of_one_draw(rows))

    def begin(self, evaluation: Evaluation) -> None:
        evaluation.write(self.folder)

    def cell(self, key: str) -> Cell:
        return Cell.read(self.folder, key)

    def evaluations(self, only: Collection[str] | None = None) -> list[Evaluation]:
        """What is recorded, by key; a record that is damaged is told, and its rows do not count.

        Args:
            only: keys.
        """
        found = []
        for path in sorted((self.folder / FOLDER).glob("*.json")):
            if only is not None and path.stem not in only:
                continue
            try:
                found.append(Evaluation.read(path))
            except RobenchError as error:
                log.warning(f"{error}: its rows do not count until robench eval is run again")
        return found

    def outcomes(self, identity: str | None = None, only: Collection[str] | None = None) -> Outcomes:
        """The rows of complete evaluations, and what was found while they were made; what does not count is told.

        Args:
            identity: of the target that the folder belongs to now; rows of another one, whose weights were replaced,
                are left out.
            only: keys of evaluations.
        """
        own = [each for each in self.evaluations(only) if identity in (None, each.identity) and not each.part]
        complete = []
        for each in own:
            if missing := self.missing(each):
                log.warning(
                    f"an evaluation under {each.threat} in {self.folder} is incomplete: {missing} of "
                    f"{len(each.cells) * len(each.samples)} verdicts are missing, as it was cut off or files are gone; "
                    f"it is left out until the same robench eval is run again, which makes the rest"
                )
            elif mixed := sum(self.cell(cell).identity != each.identity for cell in each.cells):
                log.warning(
                    f"{mixed} of {len(each.cells)} cells of an evaluation under {each.threat} in {self.folder} are of "
                    f"other weights than it says: it is left out"
                )
            else:
                complete.append(each)
        if only is None:
            self._tell_others(identity, own)
        found = self.of(complete)
        if identity is None:
            return found
        # Of a result that was cut off before its last word too.
        unknown = sorted({each.threat for each in complete if f"{identity}/{each.threat}" not in self._checks})
        lost = Finding(
            "checks kept",
            "warn",
            f"{self.folder / CHECKS} is gone or damaged: what was found while the rows under {', '.join(unknown)} were "
            f"made is not known",
            "the same robench eval finds it again",
        )
        return found.with_checks([*self.remembered(identity), *([lost] if unknown else [])])

    def _tell_others(self, identity: str | None, own: Sequence[Evaluation]) -> None:
        """Cells with rows that belong to no evaluation of this target."""
        known = {cell for each in own for cell in each.cells}
        others = [key for key in self._index if key not in known]
        foreign = [key for key in others if identity is not None and self.cell(key).identity != identity]
        if foreign:
            log.warning(f"{len(foreign)} of {len(self._index)} cells in {self.folder} are of other weights: left out")
        if lone := len(others) - len(foreign):
            log.warning(
                f"{lone} of {len(self._index)} cells in {self.folder} belong to no evaluation: left out; run the same "
                f"robench eval again, which makes no row twice"
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


class OpenRows:
    """The rows of all models of an evaluation, each opened when it is first asked for.

    Args:
        rows: where the rows of a model are; aside: where those are that serve checks and no number.
    """

    def __init__(self, rows: Callable[[EvaluatedModel], Rows], aside: Callable[[EvaluatedModel], Rows]) -> None:
        self._open = {False: rows, True: aside}
        self._rows: dict[tuple[str, bool], Rows] = {}

    def of(self, model: EvaluatedModel, threat: str = "") -> Rows:
        """The rows of a model, or, of a threat that serves checks alone, those aside."""
        aside = threat in ASIDE
        if (model.name, aside) not in self._rows:
            self._rows[model.name, aside] = self._open[aside](model)
        return self._rows[model.name, aside]

    def __iter__(self) -> Iterator[Rows]:
        return iter(self._rows.values())
