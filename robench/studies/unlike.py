"""What stands side by side in a report and is not of the same kind: trainings, attacks, surrogates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from robench.evaluation.cells import Cell
from robench.evaluation.outcomes import ENSEMBLE, Outcomes, that_count
from robench.evaluation.threats import BLACKBOX
from robench.reports._queries import ambiguous
from robench.store.runs import Run


def trainings(frame: pd.DataFrame, runs: Sequence[Run]) -> Iterator[tuple[list[str], str]]:
    """Groups of runs that share defense and size, and that differ in more than their seed: their names, and in what.

    Runs that share the seed too are `robench.reports._queries.ambiguous`: a group of these alone is left out.

    Args:
        frame: outcomes of ``runs``.
    """
    known = set(ambiguous(frame))
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.defense, run.n), []).append(run)
    for own in groups.values():
        names = sorted({run.name for run in own})
        if set(names) - known and (fields := _differ(own)):
            yield names, ", ".join(f"`{field}`" for field in fields)


def _differ(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same for all runs; one that a manifest does not have, as of an import, is no other."""
    values: dict[str, list[Any]] = {}
    for run in runs:
        told = run.manifest
        settings = {**(told.get("recipe") or {}), **told["defense"]}
        data = (told["data"] or {}).get("fingerprint")
        about = {"members": told["members"], "rule": run.rule, "started from others": bool(told["ancestors"])}
        for name, value in {**settings, **about, **({"data": data} if data else {})}.items():
            values.setdefault(name, []).append(value)
    return [name for name, own in values.items() if any(value != own[0] for value in own)]


def attacks(outcomes: Outcomes) -> Iterator[str]:
    """Threats whose numbers at one ε are not of the same attacks for every target, and surrogates that are several."""
    frame = outcomes.frame
    rows = that_count(frame[frame["threat"].isin(("whitebox", *BLACKBOX)) & (frame["member"] == ENSEMBLE)])
    tried = rows[["threat", "eps", "target", "cell"]].drop_duplicates()
    told: dict[str, list[float]] = {}
    for (threat, radius), here in tried.groupby(["threat", "eps"], observed=True):
        under: dict[str, list[str]] = {}
        for target, own in here.groupby("target", observed=True):
            under.setdefault(_tried([outcomes.cells[key] for key in own["cell"]]), []).append(str(target))
        if len(under) > 1:
            each = "; ".join(f"{', '.join(names)}: {words}" for words, names in under.items())
            text = f"{threat} numbers are of other attacks, and not all are comparable: {each}"
            told.setdefault(text, []).append(float(str(radius)))
    for text, radii in told.items():
        yield f"at ε {', '.join(f'{eps:g}' for eps in radii)} {text}"
    sources: dict[str, set[str]] = {}
    for key in tried["cell"].unique():
        if (cell := outcomes.cells[key]).surrogate:
            sources.setdefault(cell.surrogate, set()).add(cell.attacked.source)
    for name, found in sources.items():
        if len(found) > 1:
            yield f"surrogate {name} is {len(found)} models of different weights in these rows: images of all count"


def _tried(cells: Sequence[Cell]) -> str:
    """What the images of these cells, of one target and ε, were made with; of a target's own surrogates not on whom."""
    made = sorted(
        {
            f"{cell.attacked.attack['name']}{_fields(cell)} {cell.loss} x {len(cell.attacked.restarts)}"
            if cell.threat == "whitebox"
            else f"{cell.attacked.attack['name']}{_fields(cell)} {cell.loss}"
            for cell in cells
        }
    )
    precision = sorted({cell.attacked.precision for cell in cells} - {"float32"})
    on = sorted({cell.surrogate for cell in cells} - {""}) if cells[0].threat != "blackbox-own" else []
    parts = [", ".join(made), *([f"on {', '.join(on)}"] if on else []), *(f"in {name}" for name in precision)]
    return " ".join(parts) + (f" ({len(cells)} versions)" if cells[0].threat != "whitebox" else "")


def _fields(cell: Cell) -> str:
    """What an attack's label says beside its name; not what is followed where a rule has no gradient."""
    return "".join(f":{part}" for part in cell.attack.split(":")[1:] if not part.startswith("follows="))
