"""How long a training would take, from a few of its steps."""

from __future__ import annotations

import time

import torch

from robench.core.data import Data
from robench.core.ensemble import Ensemble
from robench.core.models import build
from robench.core.rng import Stream
from robench.training.loop import batches, check_networks, make_optimizer, train_step
from robench.training.task import Task


def seconds(task: Task, data: Data, device: torch.device, *, steps: int = 2) -> float:
    """Estimated seconds of ``task``, and of the Baseline that it starts from, measured over a few steps here."""
    stream = Stream(("estimate",))
    ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).to(device)
    check_networks(ensemble, task, data)
    optimizer = make_optimizer(task.recipe, ensemble.train())
    source = batches(data.train.to(device), task.recipe, stream, 0, task.defense.paired)
    per_epoch = len(data.train) // task.recipe.batch_size
    times = []
    for batch, _ in zip(source, range(steps + 1), strict=False):
        start = time.perf_counter()
        train_step(ensemble, optimizer, task, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    # The first step warms up.
    own = min(times[1:] or times) * per_epoch * task.epochs
    return own + (seconds(task.start, data, device, steps=steps) if task.start else 0.0)
