"""Outcomes to files: figures, their values, tables, and one page to explore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robench.core.errors import RobenchError
from robench.core.provenance import versions
from robench.core.runs import Run
from robench.core.store import content_key
from robench.evaluation.checks import check
from robench.evaluation.outcomes import Outcomes
from robench.reports import build, html
from robench.reports.regions import Regions

#: What a tracked training records, see `robench.evaluation.diversity.Tracking`.
TRACKED = ("diversity", "diversity_eps", "transferability", "transferability_eps")


def draw(
    outcomes: Outcomes,
    runs: Sequence[Run],
    out: Path,
    *,
    regions: Regions | None = None,
    paper: str | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Every figure and table that the rows have data for, and ``report.html``, in ``out``; the files.

    Args:
        runs: whose histories and provenance belong to the rows.
        paper: published numbers to set beside ours, such as ``dverge2020``.
    """
    if outcomes.frame.empty:
        raise RobenchError("nothing was measured on these runs; robench eval does it")
    facts = provenance(outcomes, runs)
    history = tracked(runs)
    files, notices = build.write(outcomes.frame, out, facts, history=history, images=regions)
    for text in notices:
        notice(text)
    page = html.write(
        outcomes.frame,
        out / "report.html",
        facts,
        checks=[{"name": each.name, "status": each.status, "evidence": each.evidence} for each in check(outcomes)],
        paper=paper,
        different_data=facts["data"] != ["cifar10"],
        history=history,
        images=regions,
    )
    return [*files, page]


def provenance(outcomes: Outcomes, runs: Sequence[Run]) -> dict[str, Any]:
    """What made the rows: versions, seeds, data and weights by content; no path, no date."""
    described = {run.name: run.manifest for run in runs}
    data = {str((manifest["data"] or {}).get("name", manifest.get("dataset"))) for manifest in described.values()}
    return {
        "cells": content_key(sorted(outcomes.frame["cell"].unique().tolist())),
        "data": sorted(data),
        "fingerprints": sorted({m["data"]["fingerprint"][:16] for m in described.values() if m["data"]}),
        "seeds": sorted({run.seed for run in runs}),
        "weights": {run.name: run.weights[:16] for run in runs},
        "versions": versions(),
    }


def tracked(runs: Sequence[Run]) -> pd.DataFrame:
    """Diversity and transferability along training, of the runs that tracked them: one row per run and epoch."""
    rows = [
        {
            "run": run.name,
            "defense": run.defense,
            "n": run.n,
            "seed": run.seed,
            "epoch": entry["epoch"],
            **{name: entry["track"][name] for name in TRACKED},
        }
        for run in runs
        for entry in run.manifest.get("history", ())
        if "diversity" in entry.get("track", {})
    ]
    return pd.DataFrame(rows, columns=["run", "defense", "n", "seed", "epoch", *TRACKED])
