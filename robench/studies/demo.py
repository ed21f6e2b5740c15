"""The demonstration: everything robench does, on handwritten digits, in minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from robench.core.data import load
from robench.core.runs import Runs
from robench.core.store import write_json
from robench.evaluation import words
from robench.evaluation.engine import Settings
from robench.evaluation.outcomes import Outcomes
from robench.studies.summary import objects
from robench.studies.workbench import Bar, Workbench, no_bar
from robench.training.task import resolve

#: Radii of the curves, and of the transferability matrix.
EPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
TRANSFER_EPS = (0.2,)
SURROGATES = (3, 5)


def demonstrate(
    out: Path,
    *,
    samples: int = 250,
    bar: Bar = no_bar,
    notice: Callable[[str], None] = lambda text: None,
) -> Outcomes:
    """Trains Baseline/3, DVERGE/3 and hold-out Baselines, judges both under three threats; ``summary.json`` in ``out``.

    Interrupted, it goes on where it was.
    """
    data = load("digits")
    bench = Workbench(
        Runs(out / "runs"), data, Settings(torch.device("cpu"), batch_size=samples), samples, bar=bar, notice=notice
    )
    targets = bench.train([resolve(data, "baseline", 3), resolve(data, "dverge", 3)])
    surrogates = bench.train(bench.surrogate_tasks(SURROGATES, "baseline"))
    outcomes = Outcomes.concat(
        [
            bench.transfer(targets, eps=TRANSFER_EPS, attacks=words.attacks("transfer", steps=20), restarts=2),
            bench.whitebox(targets, eps=EPS, attacks=words.attacks("whitebox", steps=20), restarts=2),
            bench.blackbox(targets, surrogates, eps=EPS, attacks=words.attacks("blackbox", steps=20), restarts=2),
        ]
    )
    write_json(out / "summary.json", objects(outcomes))
    return outcomes
