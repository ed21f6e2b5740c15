"""What `test_parallel` runs on two processes: argument 1 is the folder for what they find.

A step of some defenses in float64, with its gradients; then two whole trainings in float32.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from robench.core.data import Data, load, make
from robench.core.ensemble import Ensemble
from robench.core.files import write_tensors
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import Batch
from robench.store.runs import Runs
from robench.training import parallel
from robench.training.loop import ensure, make_optimizer, train_step
from robench.training.task import Task, resolve


def tiny() -> Data:
    digits = load("digits")
    images, labels = digits.train.images.numpy(), digits.train.labels.numpy()
    return make("npz:tiny", (images[:40], labels[:40]), (images[40:50], labels[40:50]), recipe="digits")


#: BatchNorm alone, differentiated twice, under distillation and an attack with draws per image, and an attack on a
#: slope's length; with what is kept per image, and with a hook after the step.
DEFENSES = {
    "baseline": {},
    "gal": {},
    "dverge-advt": {"steps": 2, "advt_steps": 2},
    "trs": {"steps": 2},
    "fasten": {},
    "lotos": {},
}


def task_of(data: Data, defense: str) -> Task:
    short = {"epochs": 2, "batch_size": 8, "lr": 0.02, **DEFENSES[defense]}
    return resolve(data, defense, 2, overrides=short, init="scratch", name=f"tiny-{defense}")


def step(task: Task) -> dict[str, torch.Tensor]:
    """Terms, gradients, BatchNorm's statistics and what the defense keeps after one step in float64."""
    ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).double().train()
    parallel.share_batchnorm(ensemble)
    draws = Stream(("test",))
    images, paired = (draws.uniform((8, 1, 8, 8), name).double() for name in ("images", "paired"))
    labels, samples = draws.permutation(8, "labels"), draws.permutation(8, "samples") + 3
    pairs = paired if task.defense.paired else None
    batch = Batch(images, labels, draws, draws, pairs, samples=samples, train_size=12)
    terms = train_step(ensemble, make_optimizer(task.recipe, ensemble), task, batch)
    found = {f"gradient.{name}": value.grad for name, value in ensemble.named_parameters() if value.grad is not None}
    found.update({f"term.{name}": value for name, value in terms.items()})
    return {**found, **dict(ensemble.state_dict()), **{f"kept.{name}": value for name, value in batch.state.items()}}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    data = tiny()
    parallel.join(torch.device("cpu"))
    for defense in DEFENSES:
        write_tensors(out / f"{defense}-{parallel.place()[0]}.safetensors", step(task_of(data, defense)))
    for name in ("one", "two"):
        task = replace(task_of(data, "baseline"), given_name=name)
        ensure(task, data, Runs(out / "runs"), device=torch.device("cpu"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
