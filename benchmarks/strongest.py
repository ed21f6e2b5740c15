"""robench's white-box attacks beside the official AutoAttack: the same weights, images and radii, in one run.

    robench import dverge.pth --model resnet20 --dataset cifar10 --defense dverge --name dverge-3
    python benchmarks/strongest.py dverge-3 --dataset npz:cifar10.npz --official auto-attack --out results/strongest

``--official`` is a clone of github.com/fra31/auto-attack; without it only ours are run. Every attack is given the
images that the ensemble gets right, in batches of ``--batch-size``, and is judged on the original weights. One file of
JSON per run, ε and attack: interrupted, it goes on with the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.core.data import load
from robench.core.ensemble import Ensemble
from robench.core.fast import attackable
from robench.core.runs import Runs
from robench.core.store import read_json, write_json, write_text
from robench.evaluation import words
from robench.evaluation.craft import craft
from robench.evaluation.outcomes import wilson
from robench.evaluation.predict import predict
from robench.evaluation.subjects import Subject
from robench.reports.document import Cell, Table, markdown

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
    """An ensemble, and images (B,C,H,W) that it gets right."""

    target: Subject
    images: Tensor
    labels: Tensor
    samples: Tensor
    batch: int

    def judged(self, images: Tensor, at: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return predict(self.target.ensemble, images, self.labels[at].numpy()).correct[-1]


def ours(job: Job, model: nn.Module, attack: Attack, eps: float) -> Result:
    """One of robench's attacks; PGD from `STARTS` starts, each on what the starts before it left."""
    result = Result(np.ones(len(job.images), dtype=bool))
    parts = attack.parts(10)
    for restart in range(STARTS if attack.name == "pgd" else 1):
        alive = torch.from_numpy(np.flatnonzero(result.right))
        for chunk in alive.split(job.batch) if len(alive) else ():
            found = craft(
                model,
                attack,
                job.images[chunk],
                job.labels[chunk].numpy(),
                job.samples[chunk].numpy(),
                np.full(len(chunk), eps),
                seed=0,
                restart=restart,
            )
            result.right[chunk.numpy()] = job.judged(found.images, chunk)
            for number, part in enumerate(parts):
                name = f"{part.label} {part.loss}"
                result.took[name] = result.took.get(name, 0) + int((found.part == number).sum())
    return result


def official(job: Job, model: nn.Module, clone: Path, eps: float) -> Result:
    """The standard AutoAttack of its authors: APGD-CE, APGD-T, FAB-T and Square, each on what is left."""
    sys.path.insert(0, str(clone))
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    attack = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard", device="cpu", verbose=False)
    result = Result(np.ones(len(job.images), dtype=bool))
    for name in list(attack.attacks_to_run):
        attack.attacks_to_run, attack.version = [name], "custom"
        left = torch.from_numpy(np.flatnonzero(result.right))
        if not len(left):
            break
        found = attack.run_standard_evaluation(job.images[left], job.labels[left], bs=job.batch)
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
@click.option("--runs", default="runs", show_default=True)
@click.option("--out", default="results/strongest", show_default=True, type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...],
    dataset: str,
    eps: str,
    samples: int,
    batch_size: int,
    clone: Path | None,
    runs: str,
    out: Path,
) -> None:
    data, store = load(dataset), Runs(runs)
    chosen = data.subset(samples, data.resolved("auto", samples), 0)
    for name in names:
        target = Subject.of_run(store.get(name), torch.device("cpu"))
        images, labels = data.test.images[chosen].float() / 255, data.test.labels[chosen]
        right = torch.from_numpy(predict(target.ensemble, images, labels.numpy()).correct[-1])
        job = Job(target, images[right], labels[right], chosen[right], batch_size)
        for radius in words.radii(eps):
            for attack in [*([OFFICIAL] if clone else []), *OURS]:
                _one(job, attack, radius, len(chosen), clone, out / "rows")
    write_text(out / "strongest.md", _table(out / "rows"))


def _one(job: Job, attack: str, eps: float, count: int, clone: Path | None, out: Path) -> None:
    file = out / f"{job.target.name}-{eps:g}-{attack.replace(' ', '-')}-{count}.json"
    if file.exists():
        return
    bill, start = Bill(), time.perf_counter()
    model = attackable(job.target.ensemble, job.images[:2], "float32")
    stop = bill.watch(model.members[0] if isinstance(model, Ensemble) else model)
    if attack == OFFICIAL:
        assert clone is not None
        result = official(job, model, clone, eps)
    else:
        result = ours(job, model, ATTACKS.get(attack)(**OURS[attack]), eps)
    stop()
    low, high = wilson(int(result.right.sum()), count)
    row = {
        "target": job.target.name,
        "eps": eps,
        "attack": attack,
        "samples": count,
        "clean": len(job.images) / count,
        "accuracy": int(result.right.sum()) / count,
        "low": low,
        "high": high,
        "took": result.took,
        "forward": bill.forward,
        "backward": bill.backward,
        "seconds": time.perf_counter() - start,
    }
    write_json(file, row)
    click.echo(json.dumps(row))


def _table(rows: Path) -> str:
    """What every attack leaves, beside what it takes."""
    found = [read_json(file) for file in sorted(rows.glob("*.json"))]
    headers = ["ensemble", "ε", "attack", "clean", "accuracy", "forward", "backward", "seconds", "what took images"]
    lines = [
        [
            *map(Cell.of, (row["target"], row["eps"], row["attack"])),
            Cell.of(row["clean"], rate=True),
            Cell.measured(row["accuracy"], row["low"], row["high"]),
            *map(Cell.of, (row["forward"], row["backward"], round(row["seconds"]))),
            Cell.of(", ".join(f"{name} {count}" for name, count in row["took"].items() if count)),
        ]
        for row in found
    ]
    return markdown(Table(headers, lines))


if __name__ == "__main__":
    main()
