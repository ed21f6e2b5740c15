"""`robench compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from robench.commands._shared import as_text, notice, refuse_given, shared

if TYPE_CHECKING:
    from robench.core.runs import Run


@click.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--threat", type=click.Choice(["whitebox", "blackbox", "clean"]), required=True)
@click.option("--eps", help="0.01:0.07:0.01, 8/255, or several with commas. By default all that both have.")
@click.option("--defenses", is_flag=True, help="A and B are defenses: over at least 3 seeds of each.")
@click.option("--n", type=int, help="Members, for --defenses; needed where there are several sizes.")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@shared("runs")
def command(
    first: str, second: str, threat: str, eps: str | None, defenses: bool, n: int | None, style: str, runs: str
) -> None:
    """Whether run A differs from run B, on the images and under the attacks that both were judged on."""
    from robench.core.runs import Runs
    from robench.evaluation import comparison, words
    from robench.studies.workbench import OUTCOMES

    if threat == "clean":
        refuse_given({"eps"}, "has no effect under --threat clean")
    if not defenses:
        refuse_given({"n"}, "has no effect without --defenses")
    store = Runs(runs)
    radii = words.radii(eps) if eps else ()

    def measured(run: Run) -> comparison.Measured:
        return comparison.Measured.of_folder(run.name, run.folder / OUTCOMES, notice)

    if defenses:
        sides = [(each, [*map(measured, comparison.of_defense(store.all(), each, n))]) for each in (first, second)]
        rows = comparison.compare_defenses(sides[0], sides[1], threat, radii, notice)
    else:
        one, other = measured(store.get(first)), measured(store.get(second))
        rows = comparison.compare(one, other, threat, radii, notice)
    click.echo(as_text(rows, style) or _compared(rows))


def _compared(rows: list[dict[str, Any]]) -> str:
    """Accuracies and their difference in percent, a line per ε."""
    import io

    from rich.console import Console
    from rich.table import Table

    def cell(row: dict[str, Any], value: str, ends: str = "") -> str:
        return f"{100 * row[value]:.1f} [{100 * row[f'low{ends}']:.1f}, {100 * row[f'high{ends}']:.1f}]"

    a, b, threat = (rows[0][name] for name in ("a", "b", "threat"))
    over = "; ± sd over seeds" if "sd_a" in rows[0] else ""
    table = Table(title=f"{threat}: accuracy in % [95 % interval], on the same images{over}", title_justify="left")
    for heading in ("ε", "images", "versions", a, b, "difference", "p", "p, Holm", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        spread = [f" ± {100 * row[f'sd_{which}']:.1f}" if over else "" for which in "ab"]
        table.add_row(
            f"{row['eps']:g}",
            str(row["samples"]),
            str(row["versions"]),
            *(cell(row, f"accuracy_{which}", f"_{which}") + sd for which, sd in zip("ab", spread, strict=True)),
            cell(row, "difference"),
            f"{row['p']:.3g}",
            f"{row['p_adjusted']:.3g}",
            row["verdict"],
        )
    text = io.StringIO()
    Console(file=text, width=400, highlight=False).print(table)
    return text.getvalue().rstrip()
