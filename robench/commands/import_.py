"""`robench import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import refuse_given, shared
from robench.core.errors import RobenchError
from robench.core.rules import RULES, USUAL

if TYPE_CHECKING:
    from robench.store.runs import Runs
    from robench.store.sources import FetchedWeights


_GROUPS = (
    Group("Network", ("model", "rule", "mean", "std", "key")),
    Group("Run", ("name", "role", "defense", "seed", "derived_from")),
)
_EXAMPLES = (
    "robench import resnet20.pth --model resnet20 --dataset cifar10 --name mine",
    "robench import hf:owner/repo@v1 --model resnet20",
)


@click.command("import", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("weights", nargs=-1, required=True)
@click.option("--model", help="Name or package.module:factory; by default what the source says, else resnet20.")
@click.option("--dataset", default="cifar10", show_default=True, help="Whose classes they have.")
@click.option(
    "--mean", help="Of their normalisation, R,G,B in [0, 1], with --std; none where they take images as such."
)
@click.option("--std", help="By default what the file says, or what fits the data.")
@click.option("--key", help="Which of several state dicts in each file.")
@click.option("--defense", default="unknown", show_default=True, help="How they were trained.")
@click.option("--name", help="Name of the run; by default the file's.")
@click.option("--seed", default=0, show_default=True, help="With which they were trained.")
@click.option(
    "--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True, help="What it is for."
)
@click.option("--rule", type=click.Choice(RULES), default=USUAL, show_default=True, help="How the ensemble decides.")
@click.option("--derived-from", help="The run that these weights were trained from.")
@shared("data_dir", "runs")
def command(
    weights: tuple[str, ...],
    model: str | None,
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
    """Make a run of WEIGHTS that others trained: one file or source, or several members.

    WEIGHTS are .pth files without code, safetensors, or hf:OWNER/REPO[/FILE][@REVISION], timm:NAME, torchhub:FILE,
    torchhub:OWNER/REPO:TAG/FILE, robustbench:NAME and https://...[#sha256=HASH]. A folder
    that robench publish wrote is taken with its rows and surrogates.
    """
    from robench.core.models import import_model
    from robench.store.importing import import_weights
    from robench.store.runs import Runs
    from robench.store.sources import fetch

    store = Runs(runs)
    if len(weights) == 1 and Path(weights[0]).is_dir():
        _published(Path(weights[0]), store)
        return
    if model is not None and ":" in model:
        import_model(model)
    given = _normalisation(mean, std, dataset, data_dir)
    with TemporaryDirectory() as folder:
        sources = []
        for number, each in enumerate(weights):
            (place := Path(folder) / str(number)).mkdir()
            sources.append(fetch(each, place))
        told = _told(sources, dataset, data_dir)
        run = import_weights(
            [source.path for source in sources],
            store,
            model=model or told.model or "resnet20",
            dataset=dataset,
            defense=defense,
            seed=seed,
            role=role,
            name=name,
            parent=store.get(derived_from) if derived_from else None,
            data_folder=Path(data_dir),
            key=key,
            rule=rule,
            normalisation=given or told.normalisation,
            whose="as given" if given else f"as {told.origin['source']} says",
            origins=[source.origin for source in sources],
        )
    click.echo(run.name)


def _published(folder: Path, store: Runs) -> None:
    """Takes what `robench publish` wrote."""
    from robench.studies.card import take

    own = {"model", "dataset", "mean", "std", "key", "defense", "name", "seed", "role", "rule", "derived_from"}
    refuse_given({*own, "data_dir"}, "has no effect for a folder of robench publish, which says it")
    for taken in take(folder, store):
        click.echo(taken.name)


def _told(sources: Sequence[FetchedWeights], dataset: str, data_dir: str) -> FetchedWeights:
    """A source, with what all of them say of the network; RobenchError where they differ, or the data do."""
    from robench.core.data import outline

    first = sources[0]
    for source in sources:
        if (source.model, source.normalisation) != (first.model, first.normalisation):
            raise RobenchError(
                f"{first.origin['source']} and {source.origin['source']} are of different networks or normalisations; "
                f"import them one by one"
            )
        classes = outline(dataset, data_dir).num_classes
        if source.classes not in (None, classes):
            raise RobenchError(
                f"{source.origin['source']} tells {source.classes} classes apart, and {dataset} has {classes}; choose "
                f"the data with --dataset"
            )
    return first


def _normalisation(
    mean: str | None, std: str | None, dataset: str, data_dir: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What --mean and --std say."""
    from robench.core.data import outline

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
