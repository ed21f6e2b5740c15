"""Outcomes for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robench.commands._shared import as_text
from robench.core.terminal import drawn, interval

if TYPE_CHECKING:
    import pandas as pd

    from robench.evaluation.outcomes import Outcomes


def formatted(outcomes: Outcomes, threat: str, style: str, verdicts: Sequence[dict[str, Any]] = ()) -> str:
    """The table, CSV or JSON; with ``verdicts`` (of `--require`) JSON is an object that has them too."""
    import json

    from robench.evaluation.checks import SURVIVORS
    from robench.studies.summary import expectations, objects

    unprobed = threat == "whitebox" and all(check.name != SURVIVORS for check in outcomes.checks)
    rows = [row for row in objects(outcomes) if (threat == "transfer") == ("success" in row)]
    rows += expectations(outcomes) if threat != "transfer" else []
    if verdicts and style == "json":
        return json.dumps({"results": rows, "requirements": verdicts}, indent=2)
    return as_text(rows, style) or (
        _matrices(rows) if threat == "transfer" else _accuracies(outcomes, rows, threat, unprobed)
    )


def diversity(rows: pd.DataFrame, style: str) -> str:
    from robench.studies.summary import diversities

    found = diversities(rows)
    lines = [
        [row["target"], f"{row['eps']:g}", str(row["samples"]), interval(row, "diversity", scale=1, digits=3)]
        for row in found
    ]
    title = "diversity: mean cross-entropy [95 % interval]"
    return as_text(found, style) or drawn(title, ["target", "ε", "images", "diversity"], lines)


def _matrices(rows: list[dict[str, Any]]) -> str:
    """Percentages, one matrix per ensemble and ε."""
    found = []
    for run, eps in sorted({(row["run"], row["eps"]) for row in rows}):
        own = {(row["source"], row["target"]): row for row in rows if (row["run"], row["eps"]) == (run, eps)}
        sources, targets = list(dict.fromkeys(s for s, _ in own)), list(dict.fromkeys(t for _, t in own))
        count = next(iter(own.values()))["samples"]
        lines = [
            [str(source), *(f"{100 * own[source, target]['success']:.1f}" for target in targets)] for source in sources
        ]
        title = f"{run}: success in %, ε {eps:g}, {count} images; row = source"
        found.append(drawn(title, ["source", *map(str, targets)], lines))
    return "\n".join(found)


def _accuracies(outcomes: Outcomes, rows: list[dict[str, Any]], threat: str, unprobed: bool) -> str:
    from robench.evaluation import display

    shown = display.by_radius(outcomes).drop(columns="images")
    images = " or ".join(map(str, sorted({row["samples"] for row in rows})))
    if set(shown["threat"]) == {display.NAMES.get(threat, threat)}:
        del shown["threat"]
    drawn_often = bool(outcomes.frame["draws"].gt(1).any())
    title = f"{threat}: accuracy in % [95 % interval], {images} images{', not probed' * unprobed}"
    title += "; a model that draws counts as right where it is in every draw" * drawn_often
    return drawn(title, list(shown.columns), shown.to_numpy().tolist())
