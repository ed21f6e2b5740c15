"""Results of several people on one page, those that do not verify among them, and marked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd

from robench.core.errors import RobenchError
from robench.core.models import build, is_imported, parameter_count
from robench.evaluation import cost
from robench.evaluation.checks import doubts
from robench.evaluation.findings import Finding, failed
from robench.evaluation.fingerprint import judged_identity
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.rows import FolderRows
from robench.reports import board
from robench.store.provenance import versions
from robench.store.runs import Run, Runs
from robench.studies.intact import UNREADABLE, ResultFolder

log = logging.getLogger(__name__)

#: Tries cells of a result again: of these runs, with what `robench.studies.verify.verify` finds.
Again = Callable[[ResultFolder, Sequence[str]], Iterator[Finding]]
#: Identities of weights and data, and what is said of them.
_Keyed = tuple[tuple[str, str], board.Entry]


def draw(folders: Sequence[Path], out: Path, *, again: Again | None = None, data: str | None = None) -> Path:
    """The board of these results, as the file ``out``.

    Args:
        again: makes cells of runs anew that were judged on data of identity ``data``.

    Raises:
        RobenchError: the same folder twice, one without rows, or nothing that was attacked.
    """
    found: list[_Keyed] = []
    results: list[board.Judged] = []
    notices: list[str] = []
    opened = {name: ResultFolder.at(folder) for name, folder in _named(folders).items()}
    # All at first: one without rows is no reason to have read the others for minutes.
    kept = {name: result.rows() for name, result in opened.items()}
    for name, result in opened.items():
        judged, entries = _read(name, result, kept[name], again, data)
        results.append(judged)
        found += entries
    joined = _joined(found, notices)
    for each in results:
        if not any(each.name in entry.results for entry in joined):
            notices.append(
                f"{each.name} has no line: none of its evaluations is whole, of the weights that it has and of more "
                f"than transfer between members"
            )
    for text in notices:
        log.warning(text)
    return board.write(out, joined, results, {"versions": versions()}, notices=notices)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder under its own name, or where several have it, under its whole path as it was typed."""
    real = [folder.resolve() for folder in folders]
    names = [folder.name for folder in real]
    found: dict[str, Path] = {}
    for folder, whole in zip(folders, real, strict=True):
        if real.count(whole) > 1:
            raise RobenchError(f"{folder} is named twice; name each result once")
        found[whole.name if names.count(whole.name) == 1 else folder.as_posix()] = folder
    return found


def _read(
    name: str, result: ResultFolder, kept: Mapping[str, FolderRows], again: Again | None, data: str | None
) -> tuple[board.Judged, list[_Keyed]]:
    found = list(result.intact(kept))
    if again is not None:
        right = [run for run, rows in kept.items() if _judged_on(rows) == {data}]
        for finding in again(result, right) if right else ():
            found.append((next((run for run in right if finding.name.startswith(f"{run} ")), ""), finding))
    entries: list[_Keyed] = []
    doubted: list[Finding] = []
    for run, rows in kept.items():
        # What is damaged was found above.
        with suppress(*UNREADABLE):
            read = result.store.get(run)
            outcomes = rows.outcomes(judged_identity(read)).called(run)
            entries += _entries(name, read, result.store, outcomes, _standing(found, run))
            # Of the numbers, and not of whether the files are those that were written.
            doubted += [replace(each, name=f"{run}: {each.name}") for each in doubts(outcomes)]
    return board.Judged(name, _standing(found), (*(finding for _, finding in found), *doubted)), entries


def _standing(found: Sequence[tuple[str, Finding]], run: str | None = None) -> board.Standing:
    """Of a run, by what was found of it and of its result's report; by default of the whole result."""
    own = [finding for name, finding in found if run is None or name in (run, "")]
    if failed(own):
        return "refused"
    again = run is not None and any(finding.name.startswith(f"{run} ") for finding in own)
    whole = run is None and any(finding.name.startswith(f"{name} ") for name, finding in found if name)
    return "repeated" if again or whole else "intact"


def _judged_on(rows: FolderRows) -> set[str]:
    """Identities of the data sets."""
    with suppress(RobenchError):
        return {rows.cell(str(key)).data for key in rows.parts()["cell"].unique()}
    return set()


def _entries(name: str, run: Run, store: Runs, measured: Outcomes, standing: board.Standing) -> Iterator[_Keyed]:
    """One for each data set that the run was judged on."""
    known = all(":" not in spec.name or is_imported(spec.name) for spec in run.specs)
    parameters = sum(parameter_count(build(spec, 0)) for spec in run.specs) if known else None
    identity = judged_identity(run)
    for data, outcomes in measured.by_data().items():
        told = run.manifest["data"] or {}
        called = told["name"] if str(told.get("fingerprint", "")).startswith(data) else data
        entry = board.Entry((name,), called, outcomes.frame, standing, parameters, _training(run, store))
        yield (identity, data), entry


def _training(run: Run, store: Runs) -> tuple[float, str] | None:
    """Forward and backward passes of each training image, of this run and of those that its weights come from."""
    passes = [each for _, each in cost.trainings(run, store)]
    if math.isnan(passes[0]):
        return None
    known = [each for each in passes if not math.isnan(each)]
    return sum(known), f"{'≥ ' if len(known) < len(passes) else ''}{sum(known):,.0f}"


def _joined(entries: Sequence[_Keyed], notices: list[str]) -> list[board.Entry]:
    """The same weights on the same data as one, where none of the results is refused: what any of them tried counts."""
    found: dict[tuple[str, ...], board.Entry] = {}
    for number, (same_as, entry) in enumerate(entries):
        key = (str(number),) if entry.standing == "refused" else same_as
        if key not in found:
            found[key] = entry
            continue
        first = found[key]
        same = {name: first.frame[name].iloc[0] for name in ("target", "defense", "n", "seed")}
        both = first.frame.merge(entry.frame, on=["cell", "member", "sample"], suffixes=("", "_other"))
        if differ := int((both["correct"] != both["correct_other"]).sum()):
            names = " and ".join((*first.results, *entry.results))
            notices.append(
                f"{names} tried the same on {same['target']} and differ in {differ} of {len(both)} verdicts, as other "
                f"machines round otherwise; an image counts as right where both say so"
            )
        found[key] = replace(
            first,
            results=(*first.results, *entry.results),
            frame=pd.concat([first.frame, entry.frame.assign(**same)], ignore_index=True),
            standing=min(first.standing, entry.standing, key=board.STANDINGS.index),
        )
    return list(found.values())
