"""Outcomes for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robench.commands._shared import as_text

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
    return as_text(rows, style) or (_matrices(rows) if threat == "transfer" else _accuracies(rows, threat, unprobed))


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


def _accuracies(rows: list[dict[str, Any]], threat: str, unprobed: bool) -> str:
    """Percentages with their intervals, ε across, or attacks for convergence."""
    from robench.evaluation.words import steps

    columns = sorted({(row["eps"], row.get("attack", "")) for row in rows}, key=lambda key: (key[0], steps(key[1])))
    clean = {row["target"]: row for row in rows if row["threat"] == "clean"}
    found: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for row in (row for row in rows if row["threat"] != "clean"):
        name = row["target"] if row["threat"] == threat else f"{row['target']} ({row['threat']})"
        line = found.setdefault(name, {(0.0, ""): clean[row["target"]]} if row["target"] in clean else {})
        line[row["eps"], row.get("attack", "")] = row
    lines = [
        [name, *(interval(line[key], "accuracy") if key in line else "" for key in columns)]
        for name, line in found.items()
    ]
    images = " or ".join(map(str, sorted({row["samples"] for row in rows})))
    headings = ["clean" if eps == 0 else f"ε {eps:g} {attack}".rstrip() for eps, attack in columns]
    drawn_often = any("expectation" in row["threat"] for row in rows)
    title = f"{threat}: accuracy in % [95 % interval], {images} images{', not probed' * unprobed}"
    title += "; a model that draws counts as right where it is in every draw" * drawn_often
    return drawn(title, ["target", *headings], lines)


def interval(row: dict[str, Any], value: str, ends: str = "", *, scale: float = 100, digits: int = 1) -> str:
    middle, low, high = (f"{scale * row[name]:.{digits}f}" for name in (value, f"low{ends}", f"high{ends}"))
    return f"{middle} [{low}, {high}]"


def drawn(title: str, headings: list[str], lines: list[list[str]]) -> str:
    """A table as wide as it needs to be."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("target", "") else "right")
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    # In a notebook rich would display it, and the text would be empty.
    Console(file=text, width=400, highlight=False, force_jupyter=False).print(table)
    return text.getvalue().rstrip()
