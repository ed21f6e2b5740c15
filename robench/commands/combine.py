"""`robench combine`."""

from __future__ import annotations

from typing import Any

import click

from robench.commands._shared import shared
from robench.core.rules import RULES, USUAL


@click.command("combine")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--name", required=True, help="Name of the new run.")
@click.option("--role", type=click.Choice(["target", "surrogate"]), default="surrogate", show_default=True)
@click.option("--rule", type=click.Choice(RULES), default=USUAL, show_default=True, help="How the members decide.")
@shared("runs")
def command(names: tuple[str, ...], name: str, role: Any, rule: Any, runs: str) -> None:
    """Make one ensemble of the members of several runs, of any architectures and trainings.

    As a pool of surrogates: robench combine r20 vgg wrn --name pool; robench eval --threat blackbox --surrogates pool.
    """
    from robench.store.combining import combine
    from robench.store.runs import Runs

    store = Runs(runs)
    click.echo(combine(name, [store.get(each) for each in names], store, role=role, rule=rule).name)
