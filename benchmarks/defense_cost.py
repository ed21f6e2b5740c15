"""What a training step of each defense costs against a Baseline's: seconds, beside the passes that forecasts count.

    python benchmarks/defense_cost.py --dataset folder:IMAGES

Untrained ensembles, in turns with the Baseline, so that a machine that does other things slows both; the median of the
steps. The two defenses that differentiate twice are also timed with torch's own second gradient of BatchNorm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from unittest.mock import patch

import click
import torch

from robench.core.data import Data, load
from robench.core.ensemble import Ensemble
from robench.core.fast import channels_last, widen_heads
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import DEFENSES
from robench.reports.document import Table, TableCell, markdown
from robench.training.batches import batches
from robench.training.loop import make_optimizer, train_step
from robench.training.task import resolve

#: Before the timed ones, which meet kernels that are made.
WARM = 1
TORCHS_OWN = "robench.defenses._slopes.TwiceDifferentiable"


def steps(data: Data, name: str, n: int, recipe: str) -> tuple[Iterator[Callable[[], object]], float]:
    """Training steps, each on a batch of its own, and the passes of one."""
    task = resolve(data, name, n, recipe=recipe)
    ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).train()
    for member in ensemble.members:
        channels_last(member, torch.rand(2, *data.test.images.shape[1:]))
    if task.recipe.precision == "bfloat16":
        widen_heads(ensemble, data.num_classes)
    optimizer = make_optimizer(task.recipe, ensemble)
    made = batches(data.train, task.recipe, Stream(("cost",)), 0, task.defense.paired)
    return (partial(train_step, ensemble, optimizer, task, batch) for batch in made), task.defense.passes(n)


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


@click.command()
@click.argument("names", nargs=-1, metavar="[DEFENSE]...")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--n", default=3, show_default=True, help="Members.")
@click.option("--recipe", default="cifar10-fast", show_default=True)
@click.option("--steps", "count", default=3, show_default=True, help="Timed, of each.")
def main(names: tuple[str, ...], dataset: str, n: int, recipe: str, count: int) -> None:
    torch.set_num_threads(1)
    data, rows = load(dataset), []
    kinds = [(name, False) for name in names or DEFENSES.names()]
    kinds += [(name, True) for name in ("gal", "trs") if (name, False) in kinds]
    for name, torchs in kinds:
        (own, passes), (beside, _) = steps(data, name, n, recipe), steps(data, "baseline", n, recipe)
        with patch(TORCHS_OWN, nullcontext) if torchs else nullcontext():
            pairs = [
                (seconds(one), seconds(other)) for one, other in islice(zip(own, beside, strict=True), WARM + count)
            ]
        took, usual = (statistics.median(each) for each in zip(*pairs[WARM:], strict=True))
        label = f"{name}, torch's BatchNorm" if torchs else name
        cells = [label, f"{took:.2f}", f"{took / usual:.1f}", f"{passes:g}"]
        rows.append([TableCell.of(cell) for cell in cells])
        click.echo("  ".join(cells), err=True)
    click.echo(markdown(Table(["defense", "s a step", "of a Baseline's", "passes counted"], rows)))


if __name__ == "__main__":
    main()
