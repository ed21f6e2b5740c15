"""`robench run`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import device_of, refuse_given, shared
from robench.core.errors import RobenchError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from robench.studies.engines import RunResult
    from robench.studies.plan import Plan
    from robench.studies.state import StudyFolder, StudyStatus

#: Kinds of tasks per --only.
ONLY: dict[str | None, tuple[Any, ...]] = {
    None: (), "train": ("train", "combine"), "eval": ("craft", "judge"), "report": ("report",)
}  # fmt: skip


_GROUPS = (
    Group("How much", ("only", "budget", "dry_run")),
    Group("Processes", ("engine", "workers", "address", "gpus")),
)
_EXAMPLES = (
    "robench run demo --dry-run",
    "robench run dverge2020 --budget 20h --set threats.whitebox.steps=20",
)


@click.command("run", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("study")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the study; by default its name."
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who does it.")
@click.option("--workers", type=click.IntRange(1), help="Processes; by default one per core, or one per GPU.")
@click.option("--address", help="Of a running Ray cluster; by default Ray is started here, on loopback.")
@click.option("--gpus", type=click.FloatRange(0, 8), help="Share of a GPU per task, for Ray; by default .25.")
@click.option("--only", type=click.Choice(["train", "eval", "report"]), help="Tasks of this kind.")
@click.option("--budget", help="Such as 90m or 2h: nothing is begun that would end later.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of the study: threats.whitebox.steps=5"
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and what it would take.")
@shared("data_dir", "device")
def command(
    study: str,
    out: Path | None,
    engine: str,
    workers: int | None,
    address: str | None,
    gpus: float | None,
    only: str | None,
    budget: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    data_dir: str,
    device: str,
) -> int:
    """Do STUDY, a name or a .toml file: train, attack, judge, draw. Run again, it does what is missing."""
    from robench.core.pool import visible_gpus
    from robench.studies import engines
    from robench.studies.plan import expand, pace
    from robench.studies.state import StudyFolder, StudyStatus
    from robench.studies.study import find, parse

    if engine != "ray":
        refuse_given({"address", "gpus"}, "has an effect only with --engine ray")
    name, text = find(study)
    limit = None if budget is None else _seconds(budget)
    plan = expand(name, parse(name, text, settings), data_dir)
    folder = StudyFolder((out or Path(name)).absolute())
    status = StudyStatus(plan, folder)
    if dry_run:
        _forecast(plan, status, ONLY[only], device, workers)
        return 0
    if all(status.state(step) == "done" for step in plan.steps.values()):
        log.info(f"{name} is complete in {folder.out}: nothing to do")
        click.echo(folder.report / "report.html")
        return 0
    where = "auto" if device == "auto" else str(device_of(device))
    told = plan.name, plan.study.model_dump_json(by_alias=True), str(folder.out)
    images = str(Path(data_dir).absolute())
    share = 0.0 if device == "cpu" and gpus is None else gpus
    count = workers or _workers(device)
    with engines.engine(engine, count, address=address, gpus=share, visible=visible_gpus(device)) as made:
        result = engines.run(
            plan,
            status,
            made,
            lambda key: (*told, key, images, where),
            only=ONLY[only],
            budget=limit,
            pace=None if limit is None else pace(plan, device_of(device)),
        )
    _tell(plan, folder, result)
    return int(bool(result.failed))


def _tell(plan: Plan, folder: StudyFolder, result: RunResult) -> None:
    """What failed, what is left, and where the report is."""
    for key, error in result.failed.items():
        click.echo(f"failed: {plan.steps[key].title}: {error}; log: {folder.log(plan.steps[key])}", err=True)
    reasons = [reason for reason in result.left.values() if reason != "not asked for"]
    for reason in dict.fromkeys(reasons):
        click.echo(f"left: {reasons.count(reason)} tasks, {reason}; run the same command again", err=True)
    if (folder.report / "report.html").exists():
        click.echo(folder.report / "report.html")


def _forecast(plan: Plan, status: StudyStatus, only: tuple[Any, ...], device: str, workers: int | None) -> None:
    """Tasks, passes, disk and time per device."""
    import torch

    from robench.core.progress import duration
    from robench.studies.plan import bill, makespan, pace

    missing = {
        key: step
        for key, step in plan.steps.items()
        if (not only or step.kind in only) and status.state(step) != "done"
    }
    for what, (count, passes, disk) in bill(list(missing.values())).items():
        click.echo(f"{what:<22} {count:>4} tasks  {passes:>9.4g} passes  {disk / 1e6:9.1f} MB")
    click.echo(
        f"in all {len(missing)} of {len(plan.steps)} tasks, at most "
        f"{sum(step.passes for step in missing.values()):.4g} forward and backward passes of one image through one "
        f"member, {sum(step.disk for step in missing.values()) / 1e6:.0f} MB"
    )
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if device == "auto" else [device]
    for kind in kinds:
        each = pace(plan, device_of(kind))
        times = ", ".join(
            f"{duration(makespan(missing, lambda step, each=each: step.seconds(each), k))} on {k}"  # type: ignore[misc]
            for k in dict.fromkeys((1, workers or _workers(kind), 8, 64))
        )
        click.echo(
            f"{kind}: {each.training * 1e6:.3g} µs a pass of training, {each.attacking * 1e6:.3g} µs of an attack, one "
            f"thread: the passes take about {times} at a time, beside seconds of checks and drawing a task"
        )


def _workers(device: str) -> int:
    from robench.core.pool import visible_gpus

    if device.startswith("cuda:"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(visible_gpus(device)) or cores


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        value = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        value = 0
    if not 0 < value < float("inf"):
        raise RobenchError(f"expected --budget such as 45m, 2h or 1.5d, got {text!r}")
    return value
