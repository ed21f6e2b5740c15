"""A study of a few images, for tests: two defenses, every threat, one axis."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd

from robench.session import stored
from robench.store.runs import Runs
from robench.studies.plan import Plan, expand
from robench.studies.study import find, parse

_DEFENSES = """
dataset = "npz:{data}"
model = "resnet8"
sizes = [2]
samples = 8
batch_size = 16

[defenses.baseline]
epochs = 8
batch_size = 16
[defenses.dverge]
init = "scratch"
epochs = 1
batch_size = 16
steps = 1
"""

STUDY = f"""
title = "Small"
{_DEFENSES}
[threats.transfer]
eps = [0.3]
steps = 1
restarts = 1
[threats.whitebox]
eps = [0.1, 0.3]
steps = 2
restarts = 2
[threats.blackbox]
eps = [0.3]
attacks = ["pgd", "mdi2"]
losses = ["ce"]
surrogates = [1, 2]
steps = 1
restarts = 1
[threats.diversity]
steps = 1

[axes.distillation]
defense = "dverge"
setting = "steps"
values = [1, 2]
threats = ["whitebox"]

[report]
regions = 5
"""

#: Where it matters that a report is drawn, and not what is in it: two figures, drawn in a third of the time.
PLAIN = f"""
title = "Plain"
{_DEFENSES}
[threats.whitebox]
eps = [0.1]
steps = 2
restarts = 2

[report]
images = 0
"""


def write(folder: Path, study: str = STUDY) -> Path:
    """A study file in ``folder``, and its data: 64 + 24 images of 8x8 in three classes."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 60, (88, 1, 8, 8), dtype=np.uint8), np.arange(88) % 3
    for label in range(3):
        images[labels == label, 0, 2 * label : 2 * label + 3] += 180
    data = folder / "data.npz"
    np.savez(data, x_train=images[:64], y_train=labels[:64], x_test=images[64:], y_test=labels[64:])
    path = folder / "small.toml"
    path.write_text(study.format(data=data))
    return path


def rows(out: Path) -> pd.DataFrame:
    """Every row of a study's folder."""
    return stored(Runs(out / "runs").all()).frame.sort_values(["cell", "member", "sample"], ignore_index=True)


def kill_a_training(out: Path, killed: list[int]) -> None:
    """kill -9 for the first other process that trains for a study; adds its id to ``killed``."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in (out / "tasks").glob("*.json"):
            record = json.loads(path.read_text())
            training = record["state"] == "running" and record["title"].startswith("train")
            if training and record["process"] != os.getpid():
                os.kill(record["process"], signal.SIGKILL)
                killed.append(record["process"])
                return
        time.sleep(0.02)


def planned(study: str | Path, *settings: str) -> Plan:
    """A study by name, or of a file, as a plan."""
    name, text = find(str(study))
    return expand(name, parse(name, text, settings))
