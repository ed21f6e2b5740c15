"""What of a plan is done: the store says, helped by a record beside each task. Without rows, it imports no pandas."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from robench.core.errors import RobenchError
from robench.core.files import content_key, file_hash, read_record, write_record, write_text
from robench.store.claims import alive
from robench.store.provenance import sources
from robench.store.runs import Runs
from robench.studies.plan import Plan, Step

if TYPE_CHECKING:
    from robench.evaluation.rows import FolderRows

#: In the folder of a report, written last: what it shows.
DRAWN = "drawn.json"

TaskState = Literal["done", "running", "failed", "left"]


class Record(BaseModel):
    """What is known of a task."""

    state: str
    weights: dict[str, str] = {}
    evaluation: str = ""
    diversities: list[dict[str, Any]] = []


class Drawn(BaseModel):
    """What a report shows, and the hash of each of its files."""

    step: str
    basis: str
    evaluations: list[str]
    files: dict[str, str]


class StudyFolder:
    """The folder of a study: ``runs/``, a record and a log per task in ``tasks/``, and ``report/``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs = Runs(out / "runs")
        self.tasks = out / "tasks"
        self.report = out / "report"

    def record(self, step: Step) -> dict[str, Any]:
        """What is known of a task; nothing where it was never begun, or the record is damaged."""
        try:
            return read_record(self.tasks / f"{step.key}.json", Record)
        except RobenchError:
            return {}

    def seconds(self, plan: Plan) -> dict[str, float]:
        """What trainings took that were made here in one piece, by name of the run."""
        steps = [step for step in plan.steps.values() if step.kind == "train" and step.task]
        records = {step.task.name: self.record(step) for step in steps if step.task}
        return {
            name: record["seconds"]
            for name, record in records.items()
            if record.get("state") == "done" and "seconds" in record and not record.get("resumed")
        }

    def log(self, step: Step) -> Path:
        return self.tasks / f"{step.key}.log"

    def keep_failure(self, step: Step, error: str) -> None:
        """Record and log of a task whose worker wrote neither."""
        record = self.record(step)
        if record.get("state") != "failed":
            write_record(self.tasks / f"{step.key}.json", {**record, "state": "failed", "error": error})
            write_text(self.log(step), f"{step.title}\nfailed: {error}\n")

    def drawn(self) -> dict[str, Any]:
        """What the report shows, see `Basis`; nothing where there is no whole report."""
        try:
            return read_record(self.report / DRAWN, Drawn)
        except RobenchError:
            return {}


@dataclass(frozen=True)
class Basis:
    """What a report rests on: judgements that are done, and nothing else that lies beside them.

    Attributes:
        evaluations: keys of `robench.evaluation.evaluations.Evaluation`; diversities: rows of those; missing:
            judgements that are not done; key: of all this and of the code that draws it.
    """

    evaluations: list[str]
    diversities: list[dict[str, Any]]
    missing: int
    key: str


class StudyStatus:
    """What of a plan is done: a run that is there, rows that are there. Looked up once."""

    def __init__(self, plan: Plan, folder: StudyFolder) -> None:
        self.plan, self.folder = plan, folder
        self._names = set(folder.runs.names())
        self._keys: dict[str, tuple[str | None, str]] = {}
        self._rows: dict[str, FolderRows] = {}
        self._done: dict[str, bool] = {}

    def state(self, step: Step) -> TaskState:
        record = self.folder.record(step)
        if self.done(step, record):
            return "done"
        if record.get("state") == "running":
            elsewhere = record.get("host") != socket.gethostname()
            return "running" if elsewhere or alive(record) else "left"
        return "failed" if record.get("state") == "failed" else "left"

    def done(self, step: Step, record: Mapping[str, Any]) -> bool:
        if step.key not in self._done:
            self._done[step.key] = self._look(step, record)
        return self._done[step.key]

    def _look(self, step: Step, record: Mapping[str, Any]) -> bool:
        if step.kind == "train":
            assert step.task is not None
            return self._run(step.task.name)[0] == step.task.key
        if step.pool is not None:
            return self._run(step.pool.name)[0] == step.pool.key
        if step.kind == "report":
            drawn = self.folder.drawn()
            files = drawn.get("files", {})
            here = bool(files) and all(file_hash(self.folder.report / name) == hashed for name, hashed in files.items())
            return here and drawn.get("step") == step.key and drawn.get("basis") == self.basis().key
        if record.get("state") != "done":
            return False
        if any(self._run(name)[1] != weights for name, weights in record["weights"].items()):
            return False
        assert step.task is not None
        from robench.session import DIVERSITY

        if step.threat == "diversity":
            return any((self.folder.runs.folder(step.task.name) / DIVERSITY).glob("part-*.parquet"))
        rows = self._rows_of(step.task.name)
        return any(
            not rows.missing(asked) and all(map(rows.declared, asked.cells))
            for asked in rows.evaluations([record.get("evaluation", "")])
        )

    def basis(self) -> Basis:
        judgements = [(step, self.folder.record(step)) for step in self.plan.steps.values() if step.kind == "judge"]
        done = [record for step, record in judgements if self.done(step, record)]
        parts = [[record.get(name) for name in ("evaluation", "weights", "diversities")] for record in done]
        missing = len(judgements) - len(done)
        return Basis(
            [record["evaluation"] for record in done if "evaluation" in record],
            [row for record in done for row in record.get("diversities", ())],
            missing,
            content_key([parts, missing, sources()]),
        )

    def _rows_of(self, name: str) -> FolderRows:
        from robench.session import rows_of

        if name not in self._rows:
            self._rows[name] = rows_of(self.folder.runs.get(name))
        return self._rows[name]

    def _run(self, name: str) -> tuple[str | None, str]:
        """Key and weights of a run; empty where it is not there."""
        if name not in self._names:
            return None, ""
        if name not in self._keys:
            run = self.folder.runs.get(name)
            self._keys[name] = run.manifest["key"], run.weights
        return self._keys[name]
