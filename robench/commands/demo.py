"""`robench demo`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._shared import bar, notice
from robench.commands._tables import formatted


@click.command("demo")
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path))
def command(out: Path) -> None:
    """Baseline/3 and DVERGE/3 on handwritten digits, under three threats, with figures: minutes on two cores."""
    from robench.studies.demo import demonstrate

    found, files = demonstrate(out, bar=bar, notice=notice)
    for threat, outcomes in found.items():
        click.echo(formatted(outcomes, threat, "table"))
    for path in files:
        click.echo(path)
