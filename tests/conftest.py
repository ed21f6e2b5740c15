"""What tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published weights, real images and reference answers; a test that needs it is skipped without."""
    folder = Path(os.environ.get("ROBENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set ROBENCH_DATA to the folder with parity.npz and checkpoints/")
    return folder
