"""`robench train`."""

from __future__ import annotations

import logging
from typing import Any

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import device_of, import_models, pairs, shared
from robench.core.errors import RobenchError
from robench.core.progress import bar
from robench.core.rules import RULES

log = logging.getLogger(__name__)


_GROUPS = (
    Group("Ensemble", ("n", "model", "rule", "init", "seed")),
    Group("Recipe", ("recipe", "epochs", "batch_size", "lr", "settings", "compiling")),
    Group("Run", ("name", "role", "track", "log_to")),
)
_EXAMPLES = (
    "robench train dverge --dataset digits --n 2 --epochs 2 --name my-dverge",
    "robench train adp --dataset digits --n 3 --seed 1 --set alpha=4 --track quick",
)


@click.command("train", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("defense")
@click.option("--n", default=3, show_default=True, help="Members.")
@click.option("--dataset", default="cifar10", show_default=True, help="Name, folder:PATH, npz:PATH or hf:OWNER/NAME.")
@click.option("--model", help="Architecture; several with commas, one each. By default the recipe's.")
@click.option("--recipe", help="A recipe, or a .toml of your own; by default the data set's.")
@click.option("--seed", default=0, show_default=True, help="Of initial weights and every draw.")
@click.option("--epochs", type=int, help="Instead of the recipe's.")
@click.option("--batch-size", type=int, help="Instead of the recipe's.")
@click.option("--lr", type=float, help="Instead of the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any field of the defense or recipe.")
@click.option("--init", help="baseline, scratch or a run to start from. By default the defense's own start.")
@click.option(
    "--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True, help="What it is for."
)
@click.option("--rule", type=click.Choice(RULES), help="How members decide, if not as the authors' do.")
@click.option("--name", help="Name of the run. By default made from the above.")
@click.option(
    "--track",
    type=click.Choice(["quick", "full"]),
    help="Diversity and transferability into the history: in under 15 % of the time, or the paper's protocol.",
)
@click.option(
    "--compile",
    "compiling",
    is_flag=True,
    help="Train through torch.compile, with CUDA graphs on a GPU; first minutes of compiling.",
)
@shared("log_to", "data_dir", "device", "runs")
def command(
    defense: str,
    n: int,
    dataset: str,
    model: str | None,
    recipe: str | None,
    seed: int,
    settings: tuple[str, ...],
    init: str | None,
    role: Any,
    rule: str | None,
    name: str | None,
    track: str | None,
    compiling: bool,
    log_to: tuple[str, ...],
    data_dir: str,
    device: str,
    runs: str,
    **values: Any,
) -> None:
    """Train DEFENSE; run again, it resumes or says that it is complete. Prints the run's name last."""
    from robench.core.data import load
    from robench.core.logbook import require
    from robench.evaluation.diversity import Tracking
    from robench.store.runs import Runs
    from robench.training.loop import ensure
    from robench.training.recipes import recipe_file
    from robench.training.task import resolve

    require(log_to)
    named = {key: value for key, value in values.items() if value is not None}
    overrides = named | (others := pairs(settings))
    if twice := sorted(named.keys() & others.keys()):
        raise RobenchError(f"`{twice[0]}` is said by --{twice[0].replace('_', '-')} and by --set; omit one")
    place = device_of(device)
    data = load(dataset, data_dir)
    models = model.split(",") if model else []
    words: dict[str, Any] = {"seed": seed, "role": role, "models": models, "init": init, "name": name, "rule": rule}
    task = resolve(data, defense, n, recipe=recipe, overrides=overrides, **words)
    log.info(f"{data.label}: {data.summary}")
    import_models([each for each in models if ":" in each])
    tracking = None
    if track is not None:
        usual = recipe_file(recipe or data.recipe).evaluation
        radii = usual.transfer_eps[0], usual.diversity_eps
        made = Tracking.full(*radii) if track == "full" else Tracking(*radii)
        tracking = made.on(data, place)
    with bar() as progress:
        finished = ensure(
            task,
            data,
            Runs(runs),
            device=place,
            compile=compiling,
            track=tracking,
            track_every=1 if track == "full" else None,
            logs=log_to,
            progress=progress,
        )
    click.echo(finished.name)
