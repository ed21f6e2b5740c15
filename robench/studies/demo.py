"""The demonstration: everything robench does, on handwritten digits, in minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from robench.core.data import load
from robench.core.runs import Runs
from robench.core.store import write_json
from robench.evaluation import words
from robench.evaluation.diversity import Tracking
from robench.evaluation.engine import Settings
from robench.evaluation.outcomes import Outcomes
from robench.studies.drawing import draw
from robench.studies.pictures import pictures
from robench.studies.plane import decision_regions
from robench.studies.summary import objects
from robench.studies.workbench import Bar, Workbench, no_bar
from robench.training.task import resolve

#: Radii of the curves, and of the transferability matrix.
EPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
TRANSFER_EPS = 0.2
SURROGATES = (3, 5)
#: Pictures in the page.
IMAGES = 100


def demonstrate(
    out: Path,
    *,
    samples: int = 200,
    bar: Bar = no_bar,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Outcomes], list[Path]]:
    """Trains Baseline/3, DVERGE/3 and hold-out Baselines, judges the two under three threats, draws the result.

    Interrupted, it goes on where it was.

    Returns:
        Outcomes by threat; the files in ``out``, with ``summary.json`` first.
    """
    data = load("digits")
    device = torch.device("cpu")
    bench = Workbench(Runs(out / "runs"), data, Settings(device, batch_size=samples), samples, bar=bar, notice=notice)
    tracking = Tracking(TRANSFER_EPS, diversity_eps=0.3).on(data, device)
    targets = bench.train([resolve(data, "baseline", 3)])
    targets += bench.train([resolve(data, "dverge", 3)], track=tracking)
    surrogates = bench.train(bench.surrogate_tasks(SURROGATES, "baseline"))
    found = {
        "transfer": bench.transfer(
            targets, eps=(TRANSFER_EPS,), attacks=words.attacks("transfer", steps=20), restarts=2
        ),
        "whitebox": bench.whitebox(targets, eps=EPS, attacks=words.attacks("whitebox", steps=20), restarts=2),
        "blackbox": bench.blackbox(
            targets, surrogates, eps=EPS, attacks=words.attacks("blackbox", steps=10), restarts=2
        ),
    }
    rows = [row for name, outcomes in found.items() for row in objects(outcomes) if row.get("threat", name) == name]
    rows += [row for row in objects(found["whitebox"]) if row["threat"] == "clean"]
    write_json(out / "summary.json", rows)
    plane = decision_regions(bench, targets, surrogates[0], resolution=101, extent=max(EPS))
    outcomes = Outcomes.concat(found.values())
    seen = pictures(bench, outcomes, targets, IMAGES)
    files = draw(outcomes, targets, out, regions=plane, pictures=seen, notice=notice)
    return found, [out / "summary.json", *files]
