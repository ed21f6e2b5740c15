"""robench's white-box attacks beside the official AutoAttack: the same weights, images and radii, in one run.

    robench import dverge.pth --model resnet20 --dataset cifar10 --defense dverge --name dverge-3
    python benchmarks/strongest.py dverge-3 --dataset npz:cifar10.npz --official auto-attack --out results/strongest

``--official`` is a clone of github.com/fra31/auto-attack; without it only ours are run. Every attack is given the
images that the ensemble gets right, in batches of ``--batch-size``, and is judged on the original weights. One file of
JSON per run, ε, attack and batch: interrupted, it goes on with the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.core.data import Data, load, to_images
from robench.core.ensemble import Ensemble
from robench.core.fast import attackable
from robench.core.files import read_json, write_json, write_text
from robench.evaluation import words
from robench.evaluation.craft import craft
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import wilson
from robench.evaluation.predict import predict
from robench.reports.document import Table, TableCell, markdown
from robench.store.runs import Runs

#: The paper's, as it is reported; then those that a reviewer asks for.
OURS: dict[str, dict[str, Any]] = {"pgd": {"steps": 50}, "mora": {}, "square": {"queries": 1000}, "strongest": {}}
#: Starts of the paper's attack.
STARTS = 5
OFFICIAL = "official AutoAttack"


@dataclass
class Bill:
    """Images that went forward through an ensemble, and those of them whose gradient was taken, by its first member."""

    forward: int = 0
    backward: int = 0

    def watch(self, member: nn.Module) -> Callable[[], None]:
        """Counts the calls of ``member`` until what it returns is called."""

        def called(module: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> None:
            images = len(outputs)
            self.forward += images
            if outputs.requires_grad:
                outputs.register_hook(lambda slope: self._back(images))

        return member.register_forward_hook(called).remove

    def _back(self, images: int) -> None:
        self.backward += images


@dataclass
class Result:
    """What an attack leaves of an ensemble's images.

    Attributes:
        right: whether each image is still classified right, (B,).
        took: images that each part took, by its name.
    """

    right: np.ndarray[Any, np.dtype[np.bool_]]
    took: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """An ensemble, and images (B,C,H,W) that it gets right, on its device."""

    target: EvaluatedModel
    images: Tensor
    labels: Tensor
    samples: Tensor

    def judged(self, images: Tensor, at: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return predict(self.target.ensemble, images, self.labels[at].numpy()).correct[-1]


def ours(job: Job, model: nn.Module, attack: Attack, eps: float) -> Result:
    """One of robench's attacks; PGD from `STARTS` starts, each on what the starts before it left."""
    result = Result(np.ones(len(job.images), dtype=bool))
    parts = attack.parts(10)
    for restart in range(STARTS if attack.name == "pgd" else 1):
        alive = torch.from_numpy(np.flatnonzero(result.right))
        if not len(alive):
            break
        found = craft(
            model,
            attack,
            job.images[alive],
            job.labels[alive].numpy(),
            job.samples[alive].numpy(),
            np.full(len(alive), eps),
            seed=0,
            restart=restart,
        )
        result.right[alive.numpy()] = job.judged(found.images, alive)
        for number, part in enumerate(parts):
            result.took[f"{part.label} {part.loss}"] = int((found.part == number).sum())
    return result


def official(job: Job, model: nn.Module, clone: Path, eps: float) -> Result:
    """The standard AutoAttack of its authors: APGD-CE, APGD-T, FAB-T and Square, each on what is left."""
    sys.path.insert(0, str(clone))
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    device = str(job.images.device)
    attack = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard", device=device, verbose=False)
    result = Result(np.ones(len(job.images), dtype=bool))
    for name in list(attack.attacks_to_run):
        attack.attacks_to_run, attack.version = [name], "custom"
        left = torch.from_numpy(np.flatnonzero(result.right))
        if not len(left):
            break
        found = attack.run_standard_evaluation(job.images[left], job.labels[left].to(device), bs=len(left))
        result.right[left.numpy()] = job.judged(found, left)
        result.took[name] = len(left) - int(result.right.sum())
    return result


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--eps", default="0.01,0.03", show_default=True)
@click.option("--samples", default=300, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--official", "clone", type=click.Path(exists=True, path_type=Path), help="A clone of auto-attack.")
@click.option("--attacks", default="", help=f"Some of {', '.join([*OURS, OFFICIAL])}; by default all.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--runs", default="runs", show_default=True)
@click.option("--out", default="results/strongest", show_default=True, type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...],
    dataset: str,
    eps: str,
    samples: int,
    batch_size: int,
    clone: Path | None,
    attacks: str,
    device: str,
    runs: str,
    out: Path,
) -> None:
    asked = attacks.split(",") if attacks else [*OURS, *([OFFICIAL] if clone else [])]
    if unknown := [attack for attack in asked if attack not in (*OURS, OFFICIAL)]:
        raise click.UsageError(f"there is no attack {unknown[0]!r} here; there are {', '.join([*OURS, OFFICIAL])}")
    if OFFICIAL in asked and clone is None:
        raise click.UsageError(f"{OFFICIAL} needs --official, a clone of it")
    data, store = load(dataset), Runs(runs)
    chosen = data.subset(samples, data.resolved("auto", samples), 0)
    for name in names:
        target = EvaluatedModel.of_run(store.get(name), torch.device(device))
        for radius in words.radii(eps):
            for first in range(0, len(chosen), batch_size):
                part = chosen[first : first + batch_size]
                for attack in asked:
                    _one(target, data, part, first, attack, radius, clone, out / "rows")
    write_text(out / "strongest.md", _table(out / "rows"))


def _one(
    target: EvaluatedModel,
    data: Data,
    chosen: Tensor,
    first: int,
    attack: str,
    eps: float,
    clone: Path | None,
    out: Path,
) -> None:
    """One attack on the images ``chosen``, whose first is number ``first`` of all, unless it is done."""
    name, last = f"{target.name}-{eps:g}-{attack.replace(' ', '-')}", first + len(chosen)
    if _is_done(out, name, first, last):
        return
    device = next(target.ensemble.parameters()).device
    images, labels = to_images(data.test.images[chosen]).to(device), data.test.labels[chosen]
    right = torch.from_numpy(predict(target.ensemble, images, labels.numpy()).correct[-1])
    job = Job(target, images[right], labels[right], chosen[right])
    bill, start = Bill(), time.perf_counter()
    model = attackable(target.ensemble, images[:2], "float32")
    stop = bill.watch(model.members[0] if isinstance(model, Ensemble) else model)
    if attack == OFFICIAL:
        assert clone is not None
        result = official(job, model, clone, eps)
    else:
        result = ours(job, model, ATTACKS.get(attack)(**OURS[attack]), eps)
    stop()
    row = {
        "target": target.name,
        "eps": eps,
        "attack": attack,
        "images": len(chosen),
        "clean": len(job.images),
        "left": int(result.right.sum()),
        "took": result.took,
        "forward": bill.forward,
        "backward": bill.backward,
        "seconds": time.perf_counter() - start,
    }
    write_json(out / f"{name}-{first}-{last}.json", row)
    click.echo(json.dumps(row))


def _is_done(out: Path, name: str, first: int, last: int) -> bool:
    """Whether a file has these images, maybe with others; ClickException where one has some of them, as an image would
    count twice."""
    for path in out.glob(f"{name}-*.json"):
        start, end = map(int, path.stem.removeprefix(f"{name}-").split("-"))
        if start <= first and last <= end:
            return True
        if start < last and first < end:
            raise click.ClickException(f"{path} has some of images {first} to {last}: give the same --batch-size again")
    return False


def _table(rows: Path) -> str:
    """What every attack leaves of all images that it was given, beside what it takes."""
    found = pd.DataFrame([read_json(file) for file in sorted(rows.glob("*.json"))])
    lines = []
    for (target, eps, attack), parts in found.groupby(["target", "eps", "attack"], sort=False):
        images, clean, left = (int(parts[name].sum()) for name in ("images", "clean", "left"))
        took: Counter[str] = sum(map(Counter, parts["took"]), Counter())
        lines.append(
            [
                *map(TableCell.of, (target, eps, attack, images)),
                TableCell.of(clean / images, rate=True),
                TableCell.measured(left / images, *wilson(left, images)),
                *(TableCell.of(int(parts[name].sum())) for name in ("forward", "backward", "seconds")),
                TableCell.of(", ".join(f"{name} {count}" for name, count in took.most_common() if count)),
            ]
        )
    headers = [
        "ensemble",
        "ε",
        "attack",
        "images",
        "clean",
        "accuracy",
        "forward",
        "backward",
        "seconds",
        "took images",
    ]
    return markdown(Table(headers, lines))


if __name__ == "__main__":
    main()
