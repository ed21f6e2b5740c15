"""Outcomes for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robench.commands._shared import as_text

if TYPE_CHECKING:
    from robench.evaluation.outcomes import Outcomes


def formatted(outcomes: Outcomes, threat: str, style: str) -> str:
    from robench.studies.summary import objects

    rows = [row for row in objects(outcomes) if (threat == "transfer") == ("success" in row)]
    return as_text(rows, style) or _table(rows, threat)


def _table(rows: list[dict[str, Any]], threat: str) -> str:
    """Percentages with their intervals, ε across; for transfer one matrix per ensemble and ε."""
    import io

    from rich.console import Console
    from rich.table import Table

    tables = []
    if threat == "transfer":
        groups = sorted({(row["run"], row["eps"]) for row in rows})
        for run, eps in groups:
            own = {(row["source"], row["target"]): row for row in rows if (row["run"], row["eps"]) == (run, eps)}
            sources, targets = list(dict.fromkeys(s for s, _ in own)), list(dict.fromkeys(t for _, t in own))
            count = next(iter(own.values()))["samples"]
            table = Table(title=f"{run}: success in %, ε {eps:g}, {count} images; row = source", title_justify="left")
            for heading in ("source", *map(str, targets)):
                table.add_column(heading, justify="right")
            for source in sources:
                table.add_row(str(source), *(f"{100 * own[source, target]['success']:.1f}" for target in targets))
            tables.append(table)
    else:
        radii = sorted({row["eps"] for row in rows})
        counts = sorted({row["samples"] for row in rows})
        images = " or ".join(map(str, counts))
        table = Table(title=f"{threat}: accuracy in % [95 % interval], {images} images", title_justify="left")
        for heading in ("target", *("clean" if eps == 0 else f"ε {eps:g}" for eps in radii)):
            table.add_column(heading, justify="left" if heading == "target" else "right")
        for target in dict.fromkeys(row["target"] for row in rows):
            own_rows = {row["eps"]: row for row in rows if row["target"] == target}
            cells = [
                f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if row else ""
                for row in map(own_rows.get, radii)
            ]
            table.add_row(target, *cells)
        tables.append(table)
    console = Console(file=io.StringIO(), width=400, highlight=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]
