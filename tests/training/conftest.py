"""Trainings that take a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from robench.core.data import Data, load, make
from robench.store.runs import Run, Runs
from robench.training import loop
from robench.training.loop import ensure
from robench.training.task import Task, resolve

#: 40 images in 5 steps of 8, two epochs.
SMALL = {"epochs": 2, "batch_size": 8, "lr": 0.02}


@pytest.fixture(scope="session")
def tiny() -> Data:
    digits = load("digits")
    images, labels = digits.train.images.numpy(), digits.train.labels.numpy()
    return make("npz:tiny", (images[:40], labels[:40]), (images[40:50], labels[40:50]), recipe="digits")


@pytest.fixture
def runs(tmp_path: Any) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture(autouse=True)
def checkpoint_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)


@pytest.fixture
def small(tiny: Data) -> Callable[..., Task]:
    """A task of two members and two short epochs; dverge starts from scratch unless told."""

    def make_task(defense: str = "baseline", n: int = 2, *, overrides: Any = None, **changes: Any) -> Task:
        changes.setdefault("init", "scratch")
        return resolve(tiny, defense, n, overrides={**SMALL, **(overrides or {})}, **changes)

    return make_task


@pytest.fixture
def train(tiny: Data, runs: Runs) -> Callable[..., Run]:
    def run(task: Task, into: Runs = runs, **changes: Any) -> Run:
        return ensure(task, tiny, into, device=torch.device("cpu"), **changes)

    return run
