"""`robench demo`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands import run
from robench.commands._help import Grouped
from robench.commands._shared import folder_of
from robench.commands._tables import formatted

_EXAMPLES = (
    "robench demo",
    "robench demo --out somewhere",
)


@click.command("demo", cls=Grouped, examples=_EXAMPLES)
@click.option(
    "--out",
    default="demo",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the study.",
)
@click.pass_context
def command(context: click.Context, out: Path) -> int:
    """Baseline/3 and DVERGE/3 on handwritten digits, under three threats, with figures: the study `demo`."""
    folder_of(out)
    failed = int(context.invoke(run.command, study="demo", out=out))
    if failed:
        return failed
    from robench.session import stored
    from robench.studies.state import StudyFolder

    folder = StudyFolder(out)
    outcomes = stored([each for each in folder.runs.all() if each.role == "target"])
    for threat in ("transfer", "whitebox", "blackbox"):
        click.echo(formatted(outcomes.where(threat=["clean", threat]), threat, "table"))
    for path in sorted(folder.report.glob("*.pdf")):
        click.echo(path)
    return 0
