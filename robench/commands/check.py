"""`robench check`."""

from __future__ import annotations

import click

from robench.commands._shared import shared


@click.command("check")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@shared("data_dir")
def command(names: tuple[str, ...], data_dir: str) -> int:
    """Check that attacks, defenses, models or data sets keep their contract; exit code 1 where one does not."""
    from robench.evaluation.conformance import examine, kinds

    violations = 0
    for kind, name in [(kind, each) for each in names for kind in kinds(each)]:
        click.echo(f"{kind} {name}:")
        for finding in examine(kind, name, data_dir):
            click.echo(f"  {finding.verdict} {finding.check}: {finding.evidence}")
            violations += finding.verdict == "FAIL"
    return int(violations > 0)
