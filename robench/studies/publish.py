"""A study's report: figures of its main runs, a figure per axis, and what the study is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robench.core.errors import RobenchError
from robench.core.files import write_json, write_text
from robench.reports import document
from robench.reports.sheet import Studies
from robench.session import Session, stored
from robench.store.runs import Run, Runs
from robench.studies.drawing import draw
from robench.studies.pictures import pictures
from robench.studies.plan import Plan, Pool, expand
from robench.studies.plane import decision_regions
from robench.studies.state import Basis
from robench.studies.study import find, parse
from robench.studies.summary import objects

log = logging.getLogger(__name__)

#: Threats that the figure of an axis shows.
VARIED = ("clean", "whitebox", "blackbox")


def publish(
    plan: Plan, runs: Runs, out: Path, session: Session, basis: Basis, seconds: Mapping[str, float]
) -> list[Path]:
    """Draws what was judged in ``out``, and says how many judgements are missing; the files.

    Args:
        seconds: of trainings, by name of the run.

    Raises:
        RobenchError: nothing was judged.
    """
    there = set(runs.names())
    main = [runs.get(name) for name in plan.main if name in there]
    varied = sorted({name for values in plan.axes.values() for name in values} & there)
    judged_runs = [*main, *(runs.get(name) for name in varied if name not in plan.main)]
    everything = stored(judged_runs, basis.evaluations)
    frame = everything.frame
    if frame.empty:  # before decision regions, which take minutes
        raise RobenchError("no judgement of this study is done; robench run with --only eval does them, or finds them")
    judged = set(frame["target"])
    axes = {name: {run: v for run, v in values.items() if run in judged} for name, values in plan.axes.items()}
    study = plan.study
    surrogate = next((step.surrogates[0].name for step in plan.steps.values() if step.surrogates), None)
    plane = None
    if study.report.regions and surrogate in there:
        first = [run for run in main if run.n == min(study.sizes) and run.seed == study.seeds[0]]
        plane = decision_regions(
            session, first, runs.get(surrogate), resolution=study.report.regions, extent=study.report.extent
        )
    smaller = differences(plan, study.report.like) if study.report.like else []
    more = {"study": study.title}
    if smaller:
        more[f"unlike {study.report.like}"] = "; ".join(smaller)
    if basis.missing:
        more["incomplete"] = f"{basis.missing} of the study's judgements are not done"
        log.warning(more["incomplete"])
    if untracked := _untracked(plan, main):
        more["not tracked"] = f"{', '.join(untracked)} trained without it; remove their folders in runs to have it"
        log.warning(f"{more['not tracked']}: not in Figure 2")
    shown = [run for run in main if run.name in judged]
    outcomes = everything.where(target=list(plan.main))
    files = draw(
        outcomes,
        shown,
        out,
        regions=plane,
        pictures=pictures(session, outcomes, shown, study.report.images),
        paper=study.report.against,
        studies=Studies(frame[frame["threat"].isin(VARIED)], {name: values for name, values in axes.items() if values}),
        more=more,
        shape=session.data.test.images.shape[1:],
        seconds=seconds,
    )
    rows = [*objects(everything), *basis.diversities]
    write_json(out / "summary.json", rows)
    write_text(out / "study.md", _page(plan, more.get("incomplete"), smaller, rows))
    return [out / "study.md", out / "summary.json", *files]


def _untracked(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Runs whose training should have been tracked, and was done before that was asked for."""
    asked = [run for run in runs if run.defense in plan.study.tracked and run.n > 1]
    return [run.name for run in asked if not any("track" in entry for entry in run.manifest.get("history", ()))]


def facts(plan: Plan) -> dict[str, str]:
    """What a study does, setting by setting, as it was resolved."""
    study = plan.study
    found: dict[str, Any] = {"data": study.dataset, "sizes": study.sizes, "seeds": study.seeds}
    for step in plan.steps.values():
        task = step.task
        if (
            step.kind == "train"
            and task
            and task.role == "target"
            and task.name in plan.main
            and task.n == study.sizes[0]
        ):
            fields = {**task.recipe.model_dump(), **task.defense.manifest()}
            found |= {f"{task.defense.name}: {name}": value for name, value in fields.items()}
            found["model"] = task.members[0].name
        if step.kind == "judge":
            found |= {f"{step.threat}: {name}": value for name, value in step.options.items() if name != "attacks"}
            found[f"{step.threat}: images"] = f"{step.subset} {min(step.samples, len(plan.data.test))}"
            if step.surrogates:
                found[f"{step.threat}: surrogates"] = [
                    each.pool if isinstance(each, Pool) else each.given_name or each.n for each in step.surrogates
                ]
            if "attacks" in step.options:
                found[f"{step.threat}: attacks"] = [f"{each.label} {each.loss}" for each in step.options["attacks"]]
    found |= {f"axis {name}": axis.values for name, axis in study.axes.items()}
    return {name: _word(value) for name, value in found.items()}


def differences(plan: Plan, like: str) -> list[str]:
    """What is otherwise than in another study, one line each."""
    ours, theirs = facts(plan), facts(expand(like, parse(*find(like))))
    return [
        f"{name} {ours.get(name, 'none')}, there {theirs.get(name, 'none')}"
        for name in [*theirs, *(name for name in ours if name not in theirs)]
        if ours.get(name) != theirs.get(name)
    ]


def _word(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _page(plan: Plan, incomplete: str | None, smaller: list[str], rows: list[dict[str, Any]]) -> str:
    """The study in words, and the numbers that no figure has."""
    lines = [f"# {plan.study.title}", "", *([f"Incomplete: {incomplete}.", ""] if incomplete else [])]
    if smaller:
        lines += [f"Unlike `{plan.study.report.like}`:", "", *(f"* {line}" for line in smaller), ""]
    cells = [
        [
            *map(document.TableCell.of, (row["target"], row["eps"])),
            document.TableCell.measured(row["diversity"], row["low"], row["high"], scale=1, digits=3),
            document.TableCell.of(row["samples"]),
        ]
        for row in rows
        if "diversity" in row
    ]
    table = document.Table(["diversity", "ε", "mean cross-entropy", "images"], cells)
    return "\n".join([*lines, document.markdown(table) if cells else ""])
