"""Tasks of a plan, done: each in any process, with a record and a log beside the runs; what is done, the store says."""

from __future__ import annotations

import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from robench.core.data import Data, load
from robench.core.errors import in_a_line
from robench.core.files import file_hash, write_record, write_text
from robench.core.logs import Lines, logged
from robench.evaluation.diversity import Tracking
from robench.evaluation.settings import Settings
from robench.evaluation.threats import THREATS
from robench.session import Session
from robench.store.claims import owner
from robench.store.combining import combine
from robench.studies.plan import Plan, Step, expand, with_recipe
from robench.studies.state import DRAWN, StudyFolder, StudyStatus
from robench.studies.study import Study
from robench.studies.summary import diversities
from robench.training.loop import CHECKPOINT, ensure
from robench.training.recipes import recipe_file


@lru_cache(maxsize=4)
def _plan(name: str, study: str, data_dir: str) -> Plan:
    return expand(name, Study.model_validate_json(study), data_dir)


@lru_cache(maxsize=4)
def _data(name: str, data_dir: str) -> Data:
    return load(name, data_dir)


def perform(name: str, study: str, out: str, key: str, data_dir: str, device: str = "auto") -> dict[str, Any]:
    """Does one task of a study, here.

    Args:
        study: as JSON; key: of the task in its plan; out: the study's folder.

    Returns:
        Its record: state (``done`` or ``failed``), seconds, error in one line.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    plan, folder = _plan(name, study, data_dir), StudyFolder(Path(out))
    step = plan.steps[key]
    path, log = folder.tasks / f"{key}.json", folder.log(step)
    about = {"title": step.title, **owner(), "device": device}
    write_record(path, {**about, "state": "running"})
    lines: list[str] = [step.title]
    began = time.perf_counter()
    threads = torch.get_num_threads()
    if device == "cpu":
        # Rounding depends on the number of threads: one, so that every engine gives the same rows.
        torch.set_num_threads(1)
    try:
        with logged(Lines(lines)):
            # A fresh one for every task: no process keeps the networks of all runs.
            session = Session(
                folder.runs,
                with_recipe(_data(plan.study.dataset, data_dir), plan.study),
                Settings(torch.device(device), plan.study.precision, plan.study.batch_size, plan.study.seed),
                step.samples,
                step.subset,
            )
            found: dict[str, Any] = {"state": "done", **_do(plan, step, folder, session)}
    except Exception as error:
        lines.append(traceback.format_exc())
        found = {"state": "failed", "error": in_a_line(error, 500)}
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # for other processes on this GPU
    found = {**about, **found, "seconds": round(time.perf_counter() - began, 3)}
    write_text(log, "\n".join([*lines, f"{found['state']} after {found['seconds']} s", ""]))
    write_record(path, found)
    return found


def _do(plan: Plan, step: Step, folder: StudyFolder, session: Session) -> dict[str, Any]:
    """What is to be remembered of a task that is done."""
    if step.kind == "report":
        # Only one of many workers draws.
        from robench.studies.publish import publish

        (folder.report / DRAWN).unlink(missing_ok=True)
        basis = StudyStatus(plan, folder).basis()
        made = publish(plan, folder.runs, folder.report, session, basis, folder.seconds(plan))
        files = {path.name: file_hash(path) for path in made}
        shown = {"step": step.key, "basis": basis.key, "evaluations": basis.evaluations, "files": files}
        write_record(folder.report / DRAWN, shown)
        return {}
    if step.pool is not None:
        parts = [session.store.get(part.name) for part in step.pool.parts]
        pool = combine(step.pool.name, parts, session.store, key=step.pool.key)
        return {"weights": {pool.name: pool.weights}}
    assert step.task is not None
    if step.kind == "train":
        track, every = None, None
        asked = plan.study.track
        if asked is not None and step.task.name in plan.main and step.task.defense.name in plan.study.tracked:
            every = asked.every
            usual = recipe_file(session.data.recipe).evaluation.diversity_eps
            fields = {"diversity_eps": usual, **asked.model_dump(exclude={"defenses", "every"}, exclude_none=True)}
            track = Tracking(**fields).on(session.data, session.settings.device) if step.task.n > 1 else None
        resumed = (folder.runs.folder(step.task.name) / CHECKPOINT).exists()
        run = ensure(
            step.task, session.data, session.store, device=session.settings.device, track=track, track_every=every,
        )  # fmt: skip
        return {"weights": {run.name: run.weights}, **({"resumed": True} if resumed else {})}
    target = session.store.get(step.task.name)
    surrogates = [session.store.get(task.name) for task in step.surrogates]
    kept = {"weights": {run.name: run.weights for run in (target, *surrogates)}}
    if step.threat == "diversity":
        return {**kept, "diversities": diversities(session.diversity([target], **step.options))}
    if surrogates:
        outcomes = session.blackbox([target], surrogates, part=step.kind == "craft", **step.options)
    else:
        outcomes = session.judge([target], THREATS[step.threat](**step.options))
    (evaluation,) = outcomes.evaluations
    return {**kept, "evaluation": evaluation.key}
