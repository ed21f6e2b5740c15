"""Whether the files of a result agree with each other: what can be told of it without its data and without its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from robench.core.errors import RobenchError
from robench.core.files import Damaged, read_json, read_record, read_tensors, tensors_hash
from robench.evaluation.checks import impossible
from robench.evaluation.evaluations import FOLDER, Evaluation
from robench.evaluation.findings import Finding
from robench.evaluation.fingerprint import judged_identity
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.rows import CHECKS, FolderRows
from robench.session import OUTCOMES
from robench.store.runs import Runs
from robench.studies.state import DRAWN
from robench.studies.summary import objects

#: What to do about a result of others that is not what was written.
OWNER = "ask whoever made it for the files as they were written"
#: The numbers of a study's report.
SUMMARY = "report/summary.json"
#: What reading a damaged file of others may raise; `RobenchError` is a ValueError.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)
F = TypeVar("F", bound=Finding | None)
_ROW = ["cell", "member", "sample"]


@dataclass(frozen=True)
class ResultFolder:
    """A folder of results.

    Attributes:
        store: of its runs; names: of these, the ones that belong to it, sorted.
    """

    folder: Path
    store: Runs
    names: tuple[str, ...]

    @classmethod
    def at(cls, folder: Path) -> ResultFolder:
        """The folder of a study, of runs, of one run, or of `robench publish`; RobenchError where it is none."""
        if not folder.is_dir():
            raise RobenchError(f"{folder} is no folder; name the folder of a study, of a run or of runs")
        if (folder / "manifest.json").is_file():
            folder = folder.resolve()
            return cls(folder, Runs(folder.parent), (folder.name,))
        store = Runs(folder / "runs" if (folder / "runs").is_dir() else folder)
        return cls(folder, store, tuple(store.names()))

    def rows(self) -> dict[str, FolderRows]:
        """What was measured on each run, to read.

        Raises:
            RobenchError: there is nothing at all.
        """
        kept = {name: FolderRows(self.store.folder(name) / OUTCOMES, repair=False) for name in self.names}
        if not any(len(each.parts()) or each.damaged for each in kept.values()):
            lost = [name for name, each in kept.items() if any((each.folder / FOLDER).glob("*.json"))]
            if lost:
                raise RobenchError(
                    f"{self.folder} holds no rows, and says that {', '.join(lost)} was evaluated: the files "
                    f"outcomes/part-*.parquet are gone; {OWNER}"
                )
            raise RobenchError(
                f"{self.folder} holds no rows; name the folder of a study, of a run or of runs (--runs of robench eval)"
            )
        return kept

    def nameless(self) -> list[str]:
        """Folders with rows beside those of the runs, sorted: their manifests are gone."""
        if (self.folder / "manifest.json").is_file():
            return []
        return sorted({path.parent.name for path in self.store.root.glob(f"*/{OUTCOMES}")} - set(self.names))

    def intact(self, kept: Mapping[str, FolderRows]) -> Iterator[tuple[str, Finding]]:
        """What a change to a file breaks, run by run.

        Args:
            kept: what `rows` gave.

        Returns:
            Pairs of the run's name, empty for the study's report, and what was found.
        """
        for name in self.nameless():
            yield name, Finding(f"{name}: manifest", "warn", "is not here, so its rows count in no number", OWNER)
        for name, rows in kept.items():
            told: list[Finding] = []
            for check in (_weights, _damaged, _cells, _rows, _evaluations, _checks):
                found = guarded(f"{name}: files", partial(check, self, name, rows))
                if found and found not in told:  # several of them read the manifest
                    told.append(found)
                    yield name, found
        if (self.folder / SUMMARY).exists():
            yield "", guarded(SUMMARY, partial(summary, self.folder, kept))


def guarded(what: str, attempt: Callable[[], F]) -> F | Finding:
    """Files of others may hold anything."""
    try:
        return attempt()
    except Damaged as error:
        return Finding(what, "fail", error.seen, OWNER)
    except RobenchError as error:
        return Finding(what, "fail", str(error))
    except UNREADABLE as error:
        return Finding(what, "fail", f"a file of it is damaged ({error!r})")


def _weights(result: ResultFolder, name: str, rows: FolderRows) -> Finding:
    run = result.store.get(name)
    path = run.folder / "weights.safetensors"
    if not path.exists():
        return Finding(f"{name}: weights", "warn", "are not here: nobody can make its images again")
    if tensors_hash(read_tensors(path)[0]) != run.weights:
        return Finding(f"{name}: weights", "fail", "are not those that its manifest names", OWNER)
    return Finding(f"{name}: weights", "pass", f"SHA-256 {run.weights[:16]}…, as its manifest says")


def _damaged(result: ResultFolder, name: str, rows: FolderRows) -> Finding | None:
    if not rows.damaged:
        return None
    parts = ", ".join(str(path.relative_to(result.folder)) for path in rows.damaged)
    return Finding(parts, "fail", "is not what was written: its name is not its hash", OWNER)


def _cells(result: ResultFolder, name: str, rows: FolderRows) -> Finding | None:
    keys = [str(key) for key in rows.parts()["cell"].unique()]
    if not keys:
        return None
    identity = judged_identity(result.store.get(name))
    others = [key for key in keys if rows.cell(key).identity != identity]
    if others:
        evidence = f"{len(others)} of {len(keys)} are of other weights than the run has, such as {others[0]}"
        return Finding(f"{name}: cells", "fail", evidence)
    return Finding(f"{name}: cells", "pass", f"{len(keys)} are what their keys say, and of these weights")


def _rows(result: ResultFolder, name: str, rows: FolderRows) -> Finding | None:
    parts = rows.parts()
    if parts.empty:
        return None
    if twice := int(parts.duplicated(_ROW).sum()):
        return Finding(f"{name}: rows", "fail", f"{twice} of {len(parts)} rows are there twice, with different values")
    # A sample has one label in each data set.
    found = [impossible(each) for each in rows.everything().by_data().values()]
    told = max(found, key=lambda each: each.status == "fail")
    return Finding(f"{name}: rows", told.status, told.evidence)


def _evaluations(result: ResultFolder, name: str, rows: FolderRows) -> Finding | None:
    found = [Evaluation.read(path) for path in sorted((rows.folder / FOLDER).glob("*.json"))]
    keys = set(rows.parts()["cell"].unique())
    if lone := keys - {cell for each in found for cell in each.cells}:
        evidence = f"{len(lone)} of {len(keys)} cells with rows belong to none of {len(found)}, and count in no number"
        return Finding(f"{name}: evaluations", "warn", evidence, OWNER)
    if not found:
        return None
    lacking = [each for each in found if not each.part and rows.missing(each)]
    if lacking:
        missing = sum(map(rows.missing, lacking))
        evidence = f"{len(lacking)} of {len(found)} lack {missing} verdicts: they were cut off, or rows are gone"
        return Finding(f"{name}: evaluations", "warn", evidence)
    return Finding(f"{name}: evaluations", "pass", f"{len(found)} are whole")


def _checks(result: ResultFolder, name: str, rows: FolderRows) -> None:
    """What was found while the rows were made can be read, where it is there."""
    if (rows.folder / CHECKS).exists():
        read_record(rows.folder / CHECKS)


def summary(folder: Path, kept: Mapping[str, FolderRows]) -> Finding:
    """Whether the numbers of a study's report are those of the evaluations that it names."""
    shown = set(read_record(folder / "report" / DRAWN)["evaluations"])
    parts = [each.outcomes(only=shown) for each in kept.values()]
    if gone := shown - {each.key for part in parts for each in part.evaluations}:
        return Finding(SUMMARY, "fail", f"{len(gone)} of {len(shown)} evaluations that it rests on are not whole")
    told = [row for row in read_json(folder / SUMMARY) if "diversity" not in row]
    true = objects(Outcomes.concat(parts))
    lost = [row for row in told if row not in true]
    if lost:
        return Finding(SUMMARY, "fail", f"{len(lost)} numbers are not those of the rows, such as {lost[0]}")
    return Finding(SUMMARY, "pass", f"{len(told)} numbers are those of the rows")
