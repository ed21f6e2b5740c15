"""What tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from robench.core.data import Data
from robench.core.logs import Lines, logged
from robench.evaluation.evaluated import EvaluatedModel
from tests.small import ensemble, noise


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published weights, real images and reference answers; a test that needs it is skipped without."""
    folder = Path(os.environ.get("ROBENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set ROBENCH_DATA to the folder with parity.npz and checkpoints/")
    return folder


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What robench logs from INFO on while the test runs."""
    lines: list[str] = []
    with logged(Lines(lines)):
        yield lines


@pytest.fixture(scope="session")
def make_model() -> Callable[[int], EvaluatedModel]:
    return lambda seed: EvaluatedModel.of_model(ensemble(seed), torch.device("cpu"), name=f"model{seed}", seed=seed)


@pytest.fixture(scope="session")
def data() -> Data:
    return noise()
