"""A board: what several people's results say of ensembles, on one page, and which of them verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from robench.core.errors import RobenchError
from robench.core.files import write_text
from robench.evaluation.findings import Finding, gravest_first
from robench.evaluation.outcomes import ENSEMBLE, survived, wilson
from robench.evaluation.worst import worst
from robench.reports import html, style
from robench.reports.document import MISSING, Table, TableCell, of_findings

#: From the least that is known of a result to the most.
Standing = Literal["refused", "intact", "repeated"]
STANDINGS: tuple[Standing, ...] = ("refused", "intact", "repeated")

#: In the table, over a result, what it means, and its CSS class.
_WORDS: dict[Standing, tuple[str, str, str, str]] = {
    "refused": (
        "NO: does not verify", "does not verify",
        "Files contradict each other, or images that were made again give other rows: its numbers are not to be "
        "believed.", "fail",
    ),
    "intact": (
        "files agree", "its files agree with each other",
        "No file was changed without the others that name it; nobody has made its images again here.", "warn",
    ),
    "repeated": (
        "made again", "images were made again",
        "Its files agree with each other, and cells that were drawn at random were made again with the same rows.",
        "pass",
    ),
}  # fmt: skip
#: All threats together.
EVERYTHING = "all threats"
HEADERS = [
    "Ensemble", "N", "Data", "Threat", "ε", "Accuracy", "Clean", "Verified", "Images", "Result", "Parameters",
    "Training", "What took how much",
]  # fmt: skip
FILTERS = [HEADERS.index(name) for name in ("Data", "Threat", "ε", "Ensemble", "N", "Verified")]


@dataclass(frozen=True)
class Entry:
    """An ensemble, as one result judged it, or several of the same standing did.

    Attributes:
        results: their names.
        data: what its images are called.
        frame: rows, as `robench.evaluation.outcomes.Outcomes.frame`, of one target.
        parameters: of all members; None where a network is code that was not imported.
        training: forward and backward passes for each training image, as text where they are a lower bound; None where
            a run does not say.
    """

    results: tuple[str, ...]
    data: str
    frame: pd.DataFrame
    standing: Standing
    parameters: int | None
    training: tuple[float, str] | None = None


@dataclass(frozen=True)
class Judged:
    """A result as a whole: by name, with what was looked at."""

    name: str
    standing: Standing
    findings: Sequence[Finding]


def write(
    path: Path,
    entries: Sequence[Entry],
    results: Sequence[Judged],
    provenance: Mapping[str, object],
    *,
    notices: Sequence[str] = (),
    title: str = "Robustness of ensembles: a board",
) -> Path:
    """Writes the page: same rows, same bytes.

    Raises:
        RobenchError: no result holds a row of an attack.
    """
    places = {result.name: f"result-{number}" for number, result in enumerate(results, 1)}
    lines = sorted(
        (line for entry in entries for line in _lines(entry, places)), key=lambda line: (line[0], line[1][0].sort)
    )
    if not lines:
        raise RobenchError("no result has rows under an attack; robench eval makes some")
    summary = [
        ("Results", ", ".join(result.name for result in results)),
        ("Ensembles", str(len(entries))),
        ("Do not verify", ", ".join(each.name for each in results if each.standing == "refused") or "none"),
    ]
    text = html.environment().get_template("board.html.j2").render(
        title=title,
        summary=summary,
        notices=list(notices),
        table=Table(HEADERS, [cells for _, cells in lines], "Ensembles by data, ε and threat"),
        filters=FILTERS,
        results=[_result(result, places) for result in results],
        provenance_lines=[(name, style.words(provenance[name])) for name in sorted(provenance)],
    )  # fmt: skip
    write_text(path, text)
    return path


def _lines(entry: Entry, places: Mapping[str, str]) -> Iterator[tuple[tuple[Any, ...], list[TableCell]]]:
    """What to sort by, and the cells, for each threat and ε."""
    untouched = clean(entry.frame)
    for name, row in by_threat(entry.frame):
        order = (entry.data, row["eps"], name != EVERYTHING, name, entry.standing == "refused", -row["accuracy"])
        yield order, _cells(entry, name, row, untouched, places)


def by_threat(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Each threat, and where there are several `EVERYTHING`, with rows of `robench.evaluation.worst.worst`."""
    threats = [name for name in dict.fromkeys(frame["threat"]) if name != "clean"]
    parts = [(name, frame[frame["threat"].isin(("clean", name))]) for name in threats]
    if len(threats) > 1:
        parts.append((EVERYTHING, frame))
    for name, part in parts:
        for _, row in worst(part).iterrows():
            yield name, row


def clean(frame: pd.DataFrame) -> TableCell:
    """Accuracy on the images as they are."""
    clean = frame[(frame["threat"] == "clean") & (frame["member"] == ENSEMBLE)]
    if clean.empty:
        return MISSING
    right = survived(clean)["correct"]
    return TableCell.measured(right.mean(), *wilson(int(right.sum()), len(right)))


def threat_label(threat: str) -> str:
    known = style.THREATS.get(threat)
    return known.label if known else threat


def _cells(entry: Entry, threat: str, row: pd.Series, clean: TableCell, places: Mapping[str, str]) -> list[TableCell]:
    word, _, _, look = _WORDS[entry.standing]
    name, *others = entry.results
    count = entry.parameters
    millions = MISSING if count is None else TableCell(f"{count / 1e6:.2f} M", float(count))
    rate = TableCell.measured(row["accuracy"], row["low"], row["high"])
    if entry.standing == "refused":
        rate, clean = (replace(each, text=f"claimed {each.text}") for each in (rate, clean))
    return [
        TableCell.of(style.label(row["defense"])),
        TableCell.of(row["n"]),
        TableCell.of(entry.data),
        TableCell.of(threat_label(threat)),
        TableCell.radius(row["eps"]),
        rate,
        clean,
        TableCell(
            word, f"{STANDINGS.index(entry.standing)} {word}", href=f"#{places[name]}", look=f"text status {look}"
        ),
        TableCell.of(row["samples"]),
        TableCell(" and ".join((name, *others)), name.lower(), href=f"#{places[name]}"),
        millions,
        TableCell(entry.training[1], entry.training[0]) if entry.training else MISSING,
        TableCell.of(row["by"] or "nothing", look="long"),
    ]


def _result(result: Judged, places: Mapping[str, str]) -> dict[str, Any]:
    _, word, meaning, look = _WORDS[result.standing]
    found, caption = gravest_first(result.findings), f"What was looked at in {result.name}"
    return {
        "id": places[result.name], "name": result.name, "word": word, "meaning": meaning, "look": look,
        "findings": of_findings(found, ["Looked at", "Status", "Seen"], caption),
    }  # fmt: skip
