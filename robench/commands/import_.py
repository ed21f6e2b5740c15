"""`robench import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.commands._shared import shared
from robench.core.rules import RULES, USUAL


@click.command("import")
@click.argument("weights", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", default="resnet20", show_default=True, help="Name or package.module:factory.")
@click.option("--dataset", default="cifar10", show_default=True, help="Whose classes they have.")
@click.option(
    "--mean", help="Of their normalisation, R,G,B in [0, 1], with --std; none where they take images as such."
)
@click.option("--std", help="By default what the file says, or what fits the data.")
@click.option("--key", help="Which of several state dicts in each file.")
@click.option("--defense", default="unknown", show_default=True, help="How they were trained.")
@click.option("--name", help="Name of the run; by default the file's.")
@click.option("--seed", default=0, show_default=True)
@click.option("--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True)
@click.option("--rule", type=click.Choice(RULES), default=USUAL, show_default=True, help="How the ensemble decides.")
@click.option("--derived-from", help="The run that these weights were trained from.")
@shared("data_dir", "runs")
def command(
    weights: tuple[Path, ...],
    model: str,
    dataset: str,
    mean: str | None,
    std: str | None,
    key: str | None,
    defense: str,
    name: str | None,
    seed: int,
    role: Any,
    rule: str,
    derived_from: str | None,
    data_dir: str,
    runs: str,
) -> None:
    """Make a run of WEIGHTS that others trained: .pth without code, or safetensors; one file or several members."""
    from robench.core.models import import_model
    from robench.core.runs import Runs
    from robench.training.importing import import_weights

    if ":" in model:
        import_model(model)
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
        key=key,
        rule=rule,
        normalisation=_normalisation(mean, std, dataset, data_dir),
    )
    click.echo(run.name)


def _normalisation(
    mean: str | None, std: str | None, dataset: str, data_dir: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What --mean and --std say."""
    from robench.core.data import outline
    from robench.core.errors import RobenchError

    if mean is None and std is None:
        return None
    if mean == "none" and std is None:
        channels = len(outline(dataset, data_dir).mean)
        return (0.0,) * channels, (1.0,) * channels
    try:
        means, stds = (tuple(float(part) for part in (text or "").split(",")) for text in (mean, std))
    except ValueError:
        means = stds = ()
    if not means or not all(0 <= value <= 1 for value in means) or not all(0 < value <= 1 for value in stds):
        raise RobenchError(
            f"expected --mean and --std as numbers with commas, in units of a pixel in [0, 1], such as "
            f"--mean 0.4914,0.4822,0.4465 --std 0.2023,0.1994,0.2010, or --mean none alone; got {mean!r} and {std!r}"
        )
    return means, stds
