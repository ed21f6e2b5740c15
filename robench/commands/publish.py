"""`robench publish`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._help import Grouped
from robench.commands._shared import import_models, require_models, shared
from robench.store.names import RunNames

_EXAMPLES = ("robench publish my-dverge --out card",)


@click.command("publish", cls=Grouped, examples=_EXAMPLES)
@click.argument("name", metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; by default the run's name.")
@shared("model", "runs")
def command(name: str, out: Path | None, model: tuple[str, ...], runs: str) -> None:
    """Make a folder of RUN to give away: a model card, figures, weights, rows, and the surrogates behind them.

    `robench check result`, `robench board` and `robench import` read it; the card says the numbers, hashes,
    normalisation, and the commands that train and judge it again.
    """
    RunNames(runs).manifest(name)
    from robench.store.runs import Runs
    from robench.studies.card import publish

    store = Runs(runs)
    run = store.get(name)
    import_models(model, store.all())
    require_models([run])
    for path in publish(run, store, out or Path(name)):
        click.echo(path)
