"""A store of random networks, and noise that the first of them labels: nothing has to be trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robench.core.data import Data, load
from robench.core.runs import Runs
from robench.evaluation.engine import Settings
from robench.evaluation.words import attacks
from robench.studies.workbench import Workbench
from tests.evaluation.conftest import SPEC, ensemble

SAMPLES = 16


@pytest.fixture
def noise(tmp_path: Path) -> Data:
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = ensemble(0)(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    # A class more than labels, so that there are as many classes as outputs.
    train = np.concatenate([labels[:-1], [SPEC.num_classes - 1]])
    np.savez(tmp_path / "noise.npz", x_train=pixels, y_train=train, x_test=pixels, y_test=labels)
    return load(f"npz:{tmp_path / 'noise.npz'}")


@pytest.fixture
def judged(tmp_path: Path, noise: Data) -> Workbench:
    """Run "base", and what three threats did to it; its surrogate "sub"."""
    store = Runs(tmp_path / "runs")
    for number, (name, role) in enumerate((("base", "target"), ("sub", "surrogate"))):
        store.save(
            name, ensemble(number), members=[SPEC] * 2, defense={"name": "baseline"}, seed=number,
            role="target" if role == "target" else "surrogate", data=None, more={"dataset": "cifar10"},
        )  # fmt: skip
    bench = Workbench(store, noise, Settings(torch.device("cpu"), batch_size=8), SAMPLES)
    judge(bench)
    return bench


def judge(bench: Workbench) -> None:
    run, sub = bench.store.get("base"), bench.store.get("sub")
    options = {"eps": (0.1, 0.3), "restarts": 2}
    bench.whitebox([run], attacks=attacks("whitebox", steps=2), **options)
    bench.transfer([run], eps=(0.3,), attacks=attacks("transfer", steps=2), restarts=2)
    bench.blackbox([run], [sub], attacks=attacks("blackbox", ["pgd", "mdi2"], ["ce"], steps=2), **options)
