"""What of a plan is done: the store says, helped by a record beside each task. Without rows, it imports no pandas."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from robench.core.errors import RobenchError
from robench.core.runs import Runs
from robench.core.store import content_key, read_json
from robench.evaluation.claims import _alive
from robench.studies.plan import Plan, Step
from robench.studies.seal import sources

if TYPE_CHECKING:
    from robench.evaluation.rows import FolderRows

State = Literal["done", "running", "failed", "left"]


class Place:
    """The folder of a study: ``runs/``, a record and a log per task in ``tasks/``, and ``report/``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs = Runs(out / "runs")
        self.tasks = out / "tasks"
        self.report = out / "report"

    def record(self, step: Step) -> dict[str, Any]:
        """What is known of a task; nothing where it was never begun, or the record is damaged."""
        try:
            found = read_json(self.tasks / f"{step.key}.json")
        except RobenchError:
            return {}
        return found if isinstance(found, dict) else {}

    def log(self, step: Step) -> Path:
        return self.tasks / f"{step.key}.log"


class Progress:
    """What of a plan is done: a run that is there, rows that are there. Looked up once."""

    def __init__(self, plan: Plan, place: Place) -> None:
        self.plan, self.place = plan, place
        self._names = set(place.runs.names())
        self._keys: dict[str, tuple[str | None, str]] = {}
        self._rows: dict[str, FolderRows] = {}

    def state(self, step: Step) -> State:
        record = self.place.record(step)
        if self.done(step, record):
            return "done"
        if record.get("state") == "running":
            elsewhere = record.get("host") != socket.gethostname()
            return "running" if elsewhere or _alive(int(record["process"])) else "left"
        return "failed" if record.get("state") == "failed" else "left"

    def done(self, step: Step, record: Mapping[str, Any]) -> bool:
        if step.kind == "train":
            assert step.task is not None
            return self._run(step.task.name)[0] == step.task.key
        if record.get("state") != "done":
            return False
        if step.kind == "report":
            here = all((self.place.report / name).exists() for name in record["files"])
            return here and record["rows"] == rows_key(self.plan, self.place)
        if any(self._run(name)[1] != weights for name, weights in record["weights"].items()):
            return False
        assert step.task is not None
        from robench.studies.workbench import DIVERSITY

        if step.threat == "diversity":
            return any((self.place.runs.folder(step.task.name) / DIVERSITY).glob("part-*.parquet"))
        rows = self._rows_of(step.task.name)
        return all(rows.samples(cell) >= set(record["samples"]) for cell in record["cells"])

    def _rows_of(self, name: str) -> FolderRows:
        from robench.evaluation.rows import FolderRows
        from robench.studies.workbench import OUTCOMES

        if name not in self._rows:
            self._rows[name] = FolderRows(self.place.runs.folder(name) / OUTCOMES)
        return self._rows[name]

    def _run(self, name: str) -> tuple[str | None, str]:
        """Key and weights of a run; empty where it is not there."""
        if name not in self._names:
            return None, ""
        if name not in self._keys:
            run = self.place.runs.get(name)
            self._keys[name] = run.manifest["key"], run.weights
        return self._keys[name]


def rows_key(plan: Plan, place: Place) -> str:
    """What a report rests on: what every judgement measured, and the code that draws it."""
    records = [place.record(step) for step in plan.steps.values() if step.kind == "judge"]
    parts = [[record.get(name) for name in ("cells", "samples", "weights", "diversities")] for record in records]
    return content_key([parts, sources()])


def measured(plan: Plan, place: Place) -> dict[str, Any]:
    """Cells and diversities that the study's judgements made, and nothing else that lies beside them."""
    records = [place.record(step) for step in plan.steps.values() if step.kind == "judge"]
    return {
        "cells": {cell for record in records for cell in record.get("cells", ())},
        "diversities": [row for record in records for row in record.get("diversities", ())],
        "missing": sum(record.get("state") != "done" for record in records),
    }
