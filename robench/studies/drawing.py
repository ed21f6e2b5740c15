"""Outcomes to files: figures, their values, tables, and one page to explore."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from robench.core.errors import RobenchError
from robench.core.files import content_key
from robench.evaluation import cost
from robench.evaluation.checks import check
from robench.evaluation.findings import gravest_first
from robench.evaluation.outcomes import ENSEMBLE, Outcomes, survived
from robench.evaluation.rows import FolderRows
from robench.evaluation.threats import BLACKBOX
from robench.reports import build, document, html, pareto, published
from robench.reports._queries import by_own_names
from robench.reports.pictures import Picture
from robench.reports.regions import Regions
from robench.reports.sheet import Studies
from robench.session import ASIDE
from robench.store.provenance import versions
from robench.store.runs import Run, Runs
from robench.studies import unlike

log = logging.getLogger(__name__)

#: What a tracked training records, see `robench.evaluation.diversity.Tracking`.
TRACKED = ("diversity", "diversity_eps", "transferability", "transferability_eps", "images")
#: Not in what earlier versions tracked.
CLEAN = ("clean", "clean_images")


def draw(
    outcomes: Outcomes,
    runs: Sequence[Run],
    out: Path,
    *,
    regions: Regions | None = None,
    pictures: Sequence[Picture] = (),
    paper: str | None = None,
    same_data: bool = False,
    studies: Studies | None = None,
    more: Mapping[str, str] | None = None,
    shape: torch.Size | None = None,
    seconds: Mapping[str, float] | None = None,
) -> list[Path]:
    """Every figure and table that the rows have data for, and ``report.html``, in ``out``; the files.

    Args:
        runs: whose histories and provenance belong to the rows.
        pictures: for the page.
        paper: published numbers to set beside ours, such as ``dverge2020``.
        same_data: the user's word that the images are the paper's, whatever they are called.
        studies: one setting of a defense varied, see `robench.reports.sheet.Studies`.
        more: what else belongs to the provenance.
        shape: of an image (C,H,W), where it is known; seconds: of trainings, by name of the run.
    """
    if outcomes.frame.empty:
        raise RobenchError("nothing was measured on these runs; robench eval does it")
    facts = {**provenance(outcomes, runs), **(more or {})}
    beside, told = ({}, []) if paper is None else _beside(paper, same_data, facts["data"], runs)
    frame, history, apart = _kept_apart(outcomes, runs)
    drawn = build.draw(
        frame,
        history=history,
        regions=regions,
        studies=studies,
        costs=costs(runs, shape, seconds or {}),
        surrogates=surrogates(outcomes, runs),
    )
    drawn = replace(drawn, notices=(*apart, *told, *unlike.attacks(outcomes), *drawn.notices))
    for text in drawn.notices:
        log.warning(text)
    files = build.write(drawn, out, facts, **beside)
    page = html.write(
        drawn,
        out / "report.html",
        facts,
        checks=gravest_first(check(outcomes)),
        trainings=trainings(runs) if runs else None,
        pictures=pictures,
        **beside,
    )
    return [*files, page]


def _beside(paper: str, same_data: bool, data: Sequence[str], runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """What `robench.reports.build.write` takes of a paper, and what keeps our numbers from being judged by its."""
    source = published.read(paper)
    same = list(data) == [source.data]
    if same and same_data:
        raise RobenchError("--same-data has no effect: the images are those of the paper already; omit it")
    others = [run.name for run in runs if any(spec.name != source.model for spec in run.specs)]
    told = []
    if not same and not same_data:
        told.append(f"{paper}: its images are {source.data}, ours {', '.join(data)}: side by side, not judged")
    if others:
        told.append(
            f"{paper}: its members are {source.model}, not those of {', '.join(others)}: side by side, not judged"
        )
    return {"paper": paper, "data": "same" if same else "vouched" if same_data else "different", "others": others}, told


def _kept_apart(outcomes: Outcomes, runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Rows and histories in which runs that do not differ in their seed alone go by their own names, and which these
    are, in words."""
    groups = list(unlike.trainings(outcomes.frame, runs))
    apart = {name for names, _ in groups for name in names}
    history = tracked(runs)
    told = [
        f"{', '.join(names)} share defense and size and differ in {what}, not in the seed alone: each is shown under "
        f"its own name"
        for names, what in groups
    ]
    return (
        by_own_names(outcomes.frame, apart) if apart else outcomes.frame,
        history.assign(defense=history["defense"].where(~history["run"].isin(apart), history["run"])),
        told,
    )


def trainings(runs: Sequence[Run]) -> document.Table:
    """How each run was trained: a line each, with what sets them apart; above it what all have in common."""
    told = {run.name: run.training for run in runs}
    names = list(dict.fromkeys(name for each in told.values() for name in each))
    values = {name: [each.get(name, "not known") for each in told.values()] for name in names}
    apart = [name for name in names if len({*values[name]}) > 1]
    lines = [
        {"run": run.name, "defense": _fields(run), **{name: told[run.name].get(name, "not known") for name in apart}}
        for run in sorted(runs, key=lambda run: (run.defense, run.n, run.seed, run.name))
    ]
    shared = "; ".join(f"{name.replace('_', ' ')} {values[name][0]}" for name in names if name not in apart)
    caption = f"How they were trained. Alike in all: {shared or 'nothing'}"
    return document.of_frame(pd.DataFrame(lines), caption)


def _fields(run: Run) -> str:
    """The defense and its fields, in words."""
    return ", ".join([run.defense, *(f"{name} {value}" for name, value in run.fields.items())])


def provenance(outcomes: Outcomes, runs: Sequence[Run]) -> dict[str, Any]:
    """What made the rows: configuration, seeds, data and weights by content, versions; no path, no date."""
    cells = {key: outcomes.cells[key] for key in outcomes.frame["cell"].unique()}
    seeds = sorted({cell.craft.seed for cell in cells.values() if cell.craft is not None})
    trained = [run.manifest["data"] for run in runs if run.manifest["data"]]
    return {
        # A cell's key is the hash of all that it depends on: data, weights, attack, precision, seed.
        "config": content_key(sorted(cells)),
        "data": sorted({cell.data for cell in cells.values()}),
        **({"training data": {data["name"]: data["fingerprint"][:16] for data in trained}} if trained else {}),
        "seeds": {"training": sorted({run.seed for run in runs}), "attacks": seeds},
        "weights": {run.name: run.weights[:16] for run in runs},
        "versions": versions(),
    }


def costs(runs: Sequence[Run], shape: torch.Size | None, seconds: Mapping[str, float]) -> pd.DataFrame:
    """What training and decision cost, of each run.

    A training that starts from others takes theirs too, which are found by their weights; it is NaN where one of them
    is not there.

    Args:
        shape, seconds: of `draw`.

    Returns:
        Columns target, passes (of a training image, see `robench.evaluation.cost.trained`), seconds, and flops (of the
        decision on one image, in millions).
    """
    rows = []
    for run in runs:
        made = cost.trainings(run, Runs(run.folder.parent))
        rows.append(
            {
                "target": run.name,
                "passes": sum(passes for _, passes in made),
                "seconds": sum(math.nan if each is None else seconds.get(each.name, math.nan) for each, _ in made),
                "flops": math.nan if shape is None else cost.decision(run.specs, shape) / 1e6,
            }
        )
    return pd.DataFrame(rows, columns=["target", *pareto.COSTS])


def surrogates(outcomes: Outcomes, runs: Sequence[Run]) -> dict[str, float]:
    """Clean accuracy, in [0, 1], of each black-box surrogate that lies beside ``runs``, on the images that were
    attacked; by name."""
    rows = outcomes.where(threat=list(BLACKBOX)).frame
    cells = [outcomes.cells[key] for key in rows["cell"].unique()]
    sources, data = {cell.attacked.source for cell in cells}, {cell.data for cell in cells}
    stores = {run.folder.parent: Runs(run.folder.parent) for run in runs}
    found = {}
    for name, own in rows.groupby("surrogate", observed=True):
        for store in stores.values():
            if name in store.names():
                kept = FolderRows(store.folder(str(name)) / ASIDE, repair=False).everything()
                kept = kept.of_cells(lambda cell: cell.identity in sources and cell.data in data)
                clean = kept.where(threat="clean", member=ENSEMBLE).frame
                clean = clean[clean["sample"].isin(own["sample"])]
                if len(clean):
                    found[str(name)] = float(survived(clean)["correct"].mean())
    return found


def tracked(runs: Sequence[Run]) -> pd.DataFrame:
    """What was tracked along training, of the runs that tracked diversity: one row per run and epoch."""
    rows = [
        {
            "run": run.name,
            "defense": run.defense,
            "n": run.n,
            "seed": run.seed,
            "epoch": entry["epoch"],
            **{name: entry["track"][name] for name in TRACKED},
            **{name: entry["track"].get(name) for name in CLEAN},
        }
        for run in runs
        for entry in run.manifest.get("history", ())
        if "diversity" in entry.get("track", {})
    ]
    return pd.DataFrame(rows, columns=["run", "defense", "n", "seed", "epoch", *TRACKED, *CLEAN])
