"""`robench compare`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import as_text, judged, refuse_given, shared
from robench.core.errors import RobenchError
from robench.core.terminal import drawn, interval

if TYPE_CHECKING:
    from robench.evaluation.findings import Finding
    from robench.store.runs import Run, Runs


_GROUPS = (Group("Defenses over seeds", ("defenses", "n")),)
_EXAMPLES = (
    "robench compare my-dverge my-baseline --threat whitebox",
    "robench compare dverge baseline --defenses --threat whitebox",
)


@click.command("compare", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--threat",
    type=click.Choice(["whitebox", "blackbox", "queries", "convergence", "clean"]),
    required=True,
    help="What both were judged under. Not transfer, whose images are others for each ensemble: see robench report.",
)
@click.option("--eps", help="0.01:0.07:0.01, 8/255, or several with commas. By default all that both have.")
@click.option("--defenses", is_flag=True, help="A and B are defenses: over at least 3 seeds of each.")
@click.option("--n", type=int, help="Members, for --defenses; needed where there are several sizes.")
@click.option("--dataset", help="Which rows; needed where both were judged on several data sets.")
@shared("style", "data_dir", "runs")
def command(
    first: str,
    second: str,
    threat: str,
    eps: str | None,
    defenses: bool,
    n: int | None,
    dataset: str | None,
    style: str,
    data_dir: str,
    runs: str,
) -> None:
    """Whether run A differs from run B, on the images and under the attacks that both were judged on."""
    from robench.evaluation import words
    from robench.evaluation.checks import doubts
    from robench.session import stored
    from robench.store.runs import Runs
    from robench.validity import comparison

    if threat == "clean":
        refuse_given({"eps"}, "has no effect under --threat clean")
    if not defenses:
        refuse_given({"n"}, "has no effect without --defenses")
    if dataset is None:
        refuse_given({"data_dir"}, "has an effect only with --dataset")
    store = Runs(runs)
    radii = words.radii(eps) if eps else ()

    doubted: list[Finding] = []

    def measured(run: Run) -> comparison.Measured:
        rows = stored([run]) if dataset is None else judged([run], dataset, data_dir, False)[0]
        doubted.extend(replace(each, name=f"{run.name}: {each.name}") for each in doubts(rows))
        return comparison.Measured.of(run.name, rows)

    if defenses:
        one, other = (comparison.of_defense(store.all(), each, n) for each in (first, second))
        rows = comparison.compare_defenses(
            (first, [*map(measured, one)]), (second, [*map(measured, other)]), threat, radii
        )
    else:
        one, other = [_run(store, first)], [_run(store, second)]
        rows = comparison.compare(measured(one[0]), measured(other[0]), threat, radii)
    click.echo(as_text(rows, style) or _compared(rows))
    for each in [comparison.trained_alike(one[0], other[0]), *doubted]:
        click.echo(each, err=style != "table")


def _run(store: Runs, name: str) -> Run:
    """The run of that name; who names a defense is told how defenses are compared."""
    if name not in store.names() and any(run.defense == name for run in store.all()):
        raise RobenchError(f"{name!r} is a defense, and no run; --defenses compares defenses, over their seeds")
    return store.get(name)


def _compared(rows: list[dict[str, Any]]) -> str:
    """Accuracies and their difference in percent, a line per ε."""
    from robench.evaluation.words import radius

    a, b, threat = (rows[0][name] for name in ("a", "b", "threat"))
    over = "; ± sd over seeds" if "sd_a" in rows[0] else ""
    lines = []
    for row in rows:
        spread = {which: f" ± {100 * row[f'sd_{which}']:.1f}" if over else "" for which in "ab"}
        lines.append(
            {
                "ε": radius(row["eps"]),
                **({"attack": row["attack"]} if "attack" in row else {}),
                "images": str(row["samples"]),
                "versions": str(row["versions"]),
                a: interval(row, "accuracy_a", "_a") + spread["a"],
                b: interval(row, "accuracy_b", "_b") + spread["b"],
                "difference": interval(row, "difference"),
                "p": f"{row['p']:.3g}",
                "p, Holm": f"{row['p_adjusted']:.3g}",
                "": row["verdict"],
            }
        )
    title = f"{threat}: accuracy in % [95 % interval], on the same images{over}"
    return drawn(title, list(lines[0]), [list(line.values()) for line in lines])
