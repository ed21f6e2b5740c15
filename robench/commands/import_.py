"""`robench import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.commands._shared import shared


@click.command("import")
@click.argument("weights", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", default="resnet20", show_default=True, help="Name or package.module:factory.")
@click.option("--dataset", default="cifar10", show_default=True, help="Whose classes and normalisation they have.")
@click.option("--defense", default="unknown", show_default=True, help="How they were trained.")
@click.option("--name", help="Name of the run; by default the file's.")
@click.option("--seed", default=0, show_default=True)
@click.option("--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True)
@click.option("--derived-from", help="The run that these weights were trained from.")
@shared("data_dir", "runs")
def command(
    weights: tuple[Path, ...],
    model: str,
    dataset: str,
    defense: str,
    name: str | None,
    seed: int,
    role: Any,
    derived_from: str | None,
    data_dir: str,
    runs: str,
) -> None:
    """Make a run of WEIGHTS that others trained: .pth without code, or safetensors; one file or several members."""
    from robench.core.runs import Runs
    from robench.training.importing import import_weights

    store = Runs(runs)
    run = import_weights(
        weights,
        store,
        model=model,
        dataset=dataset,
        defense=defense,
        seed=seed,
        role=role,
        name=name,
        parent=store.get(derived_from) if derived_from else None,
        data_folder=Path(data_dir),
        trusted=":" in model,
    )
    click.echo(run.name)
