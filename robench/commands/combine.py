"""`robench combine`."""

from __future__ import annotations

from typing import Any

import click

from robench.commands._help import Grouped
from robench.commands._shared import shared
from robench.core.rules import RULES, USUAL

_EXAMPLES = ("robench combine my-dverge my-baseline --name pool",)


@click.command("combine", cls=Grouped, examples=_EXAMPLES)
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--name", required=True, help="Name of the new run.")
@click.option(
    "--role", type=click.Choice(["target", "surrogate"]), default="surrogate", show_default=True, help="What it is for."
)
@click.option("--rule", type=click.Choice(RULES), default=USUAL, show_default=True, help="How the members decide.")
@shared("runs")
def command(names: tuple[str, ...], name: str, role: Any, rule: Any, runs: str) -> None:
    """Make one ensemble of the members of several runs, of any architectures and trainings.

    As a pool of surrogates, for robench eval --threat blackbox --surrogates pool.
    """
    from robench.store.combining import combine
    from robench.store.runs import Runs

    store = Runs(runs)
    click.echo(combine(name, [store.get(each) for each in names], store, role=role, rule=rule).name)
