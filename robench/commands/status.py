"""`robench status`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._help import Grouped
from robench.commands._shared import shared
from robench.core.errors import RobenchError

_EXAMPLES = ("robench status demo",)


@click.command("status", cls=Grouped, examples=_EXAMPLES)
@click.argument("study")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the study; by default its name."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As given to robench run.")
@shared("data_dir")
def command(study: str, out: Path | None, settings: tuple[str, ...], data_dir: str) -> None:
    """What of STUDY is done, running, failed and left."""
    from robench.studies.plan import expand
    from robench.studies.state import StudyFolder, StudyStatus
    from robench.studies.study import find, parse

    name, text = find(study)
    plan, there = expand(name, parse(name, text, settings), data_dir), out or Path(name)
    if out is not None and not out.is_dir():
        raise RobenchError(f"{out} is no folder: nothing of {name} was done there; omit --out, or name another")
    folder = StudyFolder(there)
    status = StudyStatus(plan, folder)
    states = {key: status.state(step) for key, step in plan.steps.items()}
    for state in ("done", "running", "failed", "left"):
        click.echo(f"{state:<8} {list(states.values()).count(state):>5}")
    for key, step in plan.steps.items():
        record = folder.record(step)
        if states[key] == "running":
            click.echo(f"running: {step.title} (process {record['process']} on {record['host']})")
        elif states[key] == "failed":
            click.echo(f"failed: {step.title}: {record['error']}; log: {folder.log(step)}")
