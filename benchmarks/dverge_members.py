"""What one DVERGE step costs against the number of members, and which part of it is distillation.

    python benchmarks/dverge_members.py --dataset npz:cifar10.npz

Fresh ResNet-20s: time does not depend on the weights. On the CPU on one thread, in processor time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from speed import measure, published

from robench.commands._shared import device_of
from robench.core.data import load
from robench.core.ensemble import Ensemble
from robench.core.fast import Precision, widen_heads
from robench.core.files import write_text
from robench.core.frozen import full_float32
from robench.core.models import build
from robench.core.rng import Stream
from robench.training.batches import batches
from robench.training.loop import make_optimizer, train_step
from robench.training.task import resolve


@click.command()
@click.option("--members", default="3,5,8", show_default=True)
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--layer", default=10, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for dverge-members.md.")
def main(members: str, dataset: str, layer: int, batch_size: int, rounds: int, device: str, out: Path | None) -> None:
    data, place = load(dataset), device_of(device)
    if place.type == "cpu":
        torch.set_num_threads(1)
    split = data.train.to(place)
    ours = measure.native(place)
    distillation = "of which distillation, float32"
    columns = [measure.AUTHORS, *ours, distillation]
    head = f"A DVERGE step at layer {layer}, {batch_size} images, {data.label}; medians of {rounds} rounds in turns."
    lines = [head, "", f"| members | {' | '.join(columns)} | times faster |", "|---" * (len(columns) + 2) + "|"]
    for n in map(int, members.split(",")):
        fixed = {"layer": layer, "layer_per": "epoch", "batch_size": batch_size}
        tasks = {
            precision: resolve(data, "dverge", n, overrides={**fixed, "precision": precision})
            for precision in ours.values()
        }
        task = tasks["float32"]
        defense: Any = task.defense
        batch = next(batches(split, task.recipe, Stream(("bench",)), 0, paired=True))
        assert batch.paired is not None

        def fresh(precision: Precision | None = None, task: Any = task) -> Ensemble:
            ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).to(place).train()
            if precision is None:
                return ensemble
            if precision == "bfloat16":
                widen_heads(ensemble, data.num_classes)
            return ensemble.to(memory_format=torch.channels_last)

        theirs = list(fresh().members)
        calls: dict[str, Any] = {
            measure.AUTHORS: partial(
                published.dverge_step,
                theirs,
                [make_optimizer(task.recipe, Ensemble([member])) for member in theirs],
                batch.images.contiguous(),
                batch.labels,
                batch.paired.contiguous(),
                layer=layer,
                eps=defense.eps,
                steps=defense.steps,
                early=True,
            ),
            distillation: partial(defense.distilled, fresh("float32"), batch),
        }
        for column, precision in ours.items():
            own = fresh(precision)
            calls[column] = partial(train_step, own, make_optimizer(task.recipe, own), tasks[precision], batch)
        with full_float32():
            times = {name: median(found) for name, found in measure.in_turns(calls, rounds, place).items()}
        ratios = " and ".join(f"{times[measure.AUTHORS] / times[name]:.2f}" for name in ours)
        lines.append(f"| {n} | " + " | ".join(f"{times[name]:.2f}" for name in columns) + f" | {ratios} |")
        click.echo(lines[-1])
    text = "\n".join([*lines, "", f"Seconds; times faster than the authors' way: {', '.join(ours)}.", ""])
    if out:
        write_text(out / "dverge-members.md", text)
    click.echo(text)


if __name__ == "__main__":
    main()
