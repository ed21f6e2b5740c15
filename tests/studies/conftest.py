"""A store of random networks, and noise that the first of them labels: nothing has to be trained. Studies, done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from robench.cli import run
from robench.core.data import load
from robench.evaluation.settings import Settings
from robench.evaluation.words import attacks
from robench.session import Session
from robench.store.runs import Runs
from tests.small import SPEC, ensemble
from tests.studies import small

SAMPLES = 16


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``noise.npz`` and ``runs``: run "base", and what three threats did to it; its surrogate "sub"."""
    folder = tmp_path_factory.mktemp("judged")
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = ensemble(0)(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    # A class more than labels, so that there are as many classes as outputs.
    train = np.concatenate([labels[:-1], [SPEC.num_classes - 1]])
    np.savez(folder / "noise.npz", x_train=255 - pixels, y_train=train, x_test=pixels, y_test=labels)
    store = Runs(folder / "runs")
    for number, (name, role) in enumerate((("base", "target"), ("sub", "surrogate"))):
        store.save(
            name, ensemble(number), members=[SPEC] * 2, defense={"name": "baseline"}, seed=number,
            role="target" if role == "target" else "surrogate", data=None, more={"dataset": "cifar10"},
        )  # fmt: skip
    judge(_session(folder))
    return folder


@pytest.fixture
def judged(original: Path, tmp_path: Path) -> Session:
    """A copy of `original`, to spoil."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return _session(tmp_path)


def _session(folder: Path) -> Session:
    data = load(f"npz:{folder / 'noise.npz'}")
    return Session(Runs(folder / "runs"), data, Settings(torch.device("cpu"), batch_size=8), SAMPLES)


def judge(session: Session) -> None:
    run, sub = session.store.get("base"), session.store.get("sub")
    options = {"eps": (0.1, 0.3), "restarts": 2}
    session.whitebox([run], attacks=attacks("whitebox", steps=2), **options)
    session.transfer([run], eps=(0.3,), attacks=attacks("transfer", steps=2), restarts=2)
    session.blackbox([run], [sub], attacks=attacks("blackbox", ["pgd", "mdi2"], ["ce"], steps=2), **options)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``small.toml``, its data and ``out``, where that study is done; to read or to copy."""
    return _done(tmp_path_factory, "whole", small.STUDY)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` of the plain study."""
    return _done(tmp_path_factory, "plain", small.PLAIN)


def _done(factory: pytest.TempPathFactory, name: str, study: str) -> Path:
    # One for all workers of xdist, whose folders of temporary files lie side by side.
    root = factory.getbasetemp().parent if os.environ.get("PYTEST_XDIST_WORKER") else factory.getbasetemp()
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            path = small.write(folder, study)
            assert run(["run", str(path), "--out", str(folder / "out"), "--workers", "1", "--device", "cpu"]) == 0
            (folder / "done").touch()
    return folder


@pytest.fixture
def place(judged: Session) -> Iterator[Path]:
    """The folder with `runs` and `noise.npz`, as the working directory."""
    before = Path.cwd()
    os.chdir(judged.store.root.parent)
    yield judged.store.root.parent
    os.chdir(before)
