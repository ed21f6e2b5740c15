"""`robench show`."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robench.commands import _gate
from robench.commands._help import Group, Grouped
from robench.commands._shared import device_of, import_models, judged, refuse_given, require_models, shared
from robench.core.errors import RobenchError
from robench.core.progress import bar
from robench.core.terminal import drawn, interval
from robench.store.names import RunNames

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from robench.evaluation.outcomes import Outcomes
    from robench.store.runs import Run, Runs

#: Epochs of a history that the terminal shows.
EPOCHS = 12


_GROUPS = (
    Group("Images that fell", ("images", "count", "dataset", "model")),
    Group("Checks", ("require", "lower_bound")),
)
_EXAMPLES = (
    "robench show my-dverge",
    'robench show my-dverge --require "whitebox@0.1>=20"',
)


@click.command("show", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("name", metavar="RUN")
@click.option("--images", type=click.Path(path_type=Path), help="Writes images that fell to a .png; needs the data.")
@click.option("--count", default=8, show_default=True, type=click.IntRange(1, 100), help="Images, for --images.")
@click.option("--dataset", help="For --images: which rows; needed for several data sets, npz: and folder: data.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Of what is printed.",
)
@_gate.gated
@shared("model", "data_dir", "device", "runs")
def command(
    name: str,
    images: Path | None,
    count: int,
    dataset: str | None,
    style: str,
    require: tuple[str, ...],
    lower_bound: bool,
    model: tuple[str, ...],
    data_dir: str,
    device: str,
    runs: str,
) -> int:
    """What a run is, how its training went, and what was measured on it."""
    RunNames(runs).manifest(name)
    import json
    from dataclasses import asdict

    from robench.evaluation.checks import doubts
    from robench.reports.style import words
    from robench.session import stored
    from robench.store.runs import Runs

    store = Runs(runs)
    run = store.get(name)
    if images is None:
        refuse_given({"count", "dataset", "model", "data_dir", "device"}, "has an effect only with --images")
    else:
        import_models(model, store.all())
        require_models([run])
        _write(images, store, run, count, dataset, data_dir, device)
    outcomes = stored([run])
    about, history, scores = _about(run), _history(run), _scores(outcomes)
    rows = [{**row, "target": f"{name} on {row['data']}"} for row in scores]
    verdicts = _gate.judge(_gate.requirements(require), rows, name, by_low=lower_bound)
    failed = int(not all(verdict.met for verdict in verdicts))
    doubted = doubts(outcomes)
    if style == "json":
        parts = {"run": about, "history": history, "scores": scores, "doubts": list(map(asdict, doubted))}
        click.echo(json.dumps(parts | ({"requirements": _gate.plain(verdicts)} if verdicts else {}), indent=2))
        return failed
    width = max(map(len, about))
    for key, value in about.items():
        if value not in (None, []):
            click.echo(f"{key:<{width}}  {words(value)}")
    if history:
        click.echo(_trained(history))
    click.echo(_measured(scores) if scores else f"nothing was measured; robench eval {name} --threat whitebox does it")
    for each in [*doubted, *verdicts]:
        click.echo(each)
    return failed


def _write(path: Path, store: Runs, run: Run, count: int, dataset: str | None, data_dir: str, device: str) -> None:
    """A sheet of images that fell."""
    from robench.evaluation.settings import Settings
    from robench.reports import build, style
    from robench.reports.pictures import sheet
    from robench.session import Session
    from robench.studies.drawing import provenance
    from robench.studies.pictures import pictures

    if path.suffix != ".png":
        raise RobenchError(f"expected --images as the name of a .png file, got {str(path)!r}")
    outcomes, data = judged([run], dataset, data_dir, needed=True)
    assert data is not None
    session = Session(store, data, Settings(device_of(device)), bar=bar)
    seen = pictures(session, outcomes, [run], count)
    if not seen:
        raise RobenchError(f"no image that an attack took from {run.name!r} can be shown; robench eval {run.name}")
    with style.context():
        build.save(sheet(seen), f"Images that fell: {run.name}", path, provenance(outcomes, [run]))
    log.info(f"{path}: {len(seen)} images that fell")


def _about(run: Run) -> dict[str, Any]:
    """What the manifest says, without every member's weights."""
    manifest = run.manifest
    return {
        "name": run.name,
        "defense": manifest["defense"],
        "n": run.n,
        "members": [f"{count} x {name}" for name, count in Counter(spec.name for spec in run.specs).items()],
        "seed": run.seed,
        "role": run.role,
        "data": manifest["data"] or {"name": manifest.get("dataset")},
        "recipe": manifest.get("recipe"),
        "imported": manifest.get("imported"),
        "ancestors": [entry["run"] for entry in manifest["ancestors"]],
        "weights": run.weights,
        "versions": manifest["versions"],
    }


def _history(run: Run) -> list[dict[str, Any]]:
    """One flat object per epoch: learning rate, loss terms, what was tracked."""
    flat: list[dict[str, Any]] = []
    for entry in run.manifest.get("history", ()):
        parts = [value if isinstance(value, dict) else {key: value} for key, value in entry.items()]
        flat.append({key: value for part in parts for key, value in part.items()})
    return flat


def _scores(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One object per data set, threat and ε (of convergence, per attack); for transfer the mean over member pairs; what
    is left under all of them is called worst."""
    from robench.evaluation.outcomes import counted, left_out
    from robench.studies.summary import left, objects

    found: list[dict[str, Any]] = []
    for data, part in outcomes.by_data().items():
        for text in left_out(part.frame):
            log.warning(text)
        pairs: dict[float, list[dict[str, Any]]] = {}
        for row in objects(part):
            if "success" in row:
                if row["target"] not in ("ensemble", row["source"]):
                    pairs.setdefault(row["eps"], []).append(row)
                continue
            cells = part.where(**{name: row[name] for name in ("threat", "eps", "attack") if name in row}).frame
            cells = cells[counted(cells, ["threat"])]
            made_on = {"cells": int(cells["cell"].nunique()), "surrogates": sorted(set(cells["surrogate"]) - {""})}
            found.append({"data": data, **_unnamed(row), **made_on})
        for eps, rows in pairs.items():
            success = sum(row["success"] for row in rows) / len(rows)
            samples = rows[0]["samples"]
            found.append({"data": data, "threat": "transfer", "eps": eps, "success": success, "samples": samples})
        found += [{"data": data, **_unnamed(row)} for row in left(outcomes)]
    return found


def _unnamed(row: dict[str, Any]) -> dict[str, Any]:
    """Without what every row of a run has."""
    return {key: row[key] for key in row if key not in ("target", "defense", "n", "seed")}


def _trained(history: list[dict[str, Any]]) -> str:
    """The first epoch, the last and some between; where some were tracked, those."""
    most, last = max(map(len, history)), len(history) - 1
    places = [place for place, entry in enumerate(history) if len(entry) == most or place == last]
    places = sorted({places[round(step * (len(places) - 1) / (EPOCHS - 1))] for step in range(EPOCHS)})
    radii = {key.removesuffix("_eps"): entry[key] for entry in history for key in entry if key.endswith("_eps")}
    hidden = {"every", "images", *(f"{name}_eps" for name in radii)}
    columns = list(dict.fromkeys(key for entry in history for key in entry if key not in hidden))
    lines = [[f"{history[place][key]:.4g}" if key in history[place] else "" for key in columns] for place in places]
    headings = [f"{key}, ε {radii[key]:g}" if key in radii else key for key in columns]
    return drawn(f"training: {len(lines)} of {len(history)} epochs", headings, lines)


def _measured(scores: list[dict[str, Any]]) -> str:
    from robench.evaluation.words import radius

    lines = []
    for row in scores:
        value = interval(row, "accuracy") if "accuracy" in row else f"{100 * row['success']:.1f}"
        what = f"{row['threat']} {row.get('attack', '')}".rstrip()
        lines.append([row["data"], what, radius(row["eps"]), value, str(row["samples"]), str(row.get("cells", ""))])
    title = "accuracy in % [95 % interval]; transfer: mean success in % between different members"
    table = drawn(title, ["data", "threat", "ε", "%", "images", "cells"], lines)
    named = [f"{row['threat']} surrogates: {', '.join(row['surrogates'])}" for row in scores if row.get("surrogates")]
    taken = [f"worst, ε {radius(row['eps'])}: {row['by']}" for row in scores if row.get("by")]
    return "\n".join([table, *dict.fromkeys(named), *taken])
