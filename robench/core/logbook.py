"""Where a training and its results are logged as they come: `--log-to`. One protocol; what holds a step already gets it
no second time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from robench.core.errors import RobenchError
from robench.core.files import content_key, read_record, write_record
from robench.core.registry import Registry

#: Folder of a run that holds what was logged.
FOLDER = "log"

Values = Mapping[str, float]


class Log(Protocol):
    """What a package of experiment tracking is asked for."""

    def write(self, step: int, values: Values) -> None:
        """Keeps ``values`` of a step; steps ascend from 1."""

    def close(self) -> None:
        """Ends it; all is kept."""


@dataclass(frozen=True)
class About:
    """What a log is opened with.

    Attributes:
        folder: of its own, in the run's; it exists.
        name: of the run; part: ``train`` or ``eval``.
        config: what the run is, as JSON.
        done: steps that it has; it forgets any beyond, which a process wrote that was killed at once.
    """

    folder: Path
    name: str
    part: str
    config: Mapping[str, Any]
    done: int


#: By name, what opens a log. Another package adds its own by an entry point.
LOGS: Registry[Callable[[About], Log]] = Registry("log", group="robench.logs")


@dataclass
class Book:
    """Open logs of one run, with the record of what each has."""

    about: About
    logs: dict[str, Log] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def history(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Logs the epochs that a log has not: entry i is step i + 1."""
        for kind in self.logs:
            for number, entry in enumerate(entries[self.done[kind] :], self.done[kind] + 1):
                self._write(kind, number, flat(entry))

    def result(self, values: Values) -> None:
        """Logs the numbers of an evaluation as a step, unless the log has the same already."""
        key = content_key(dict(values))
        for kind in self.logs:
            known = _record(self.about, kind).get("results", [])
            if key not in known:
                self._write(kind, self.done[kind] + 1, values, [*known, key])

    def _write(self, kind: str, step: int, values: Values, results: Sequence[str] = ()) -> None:
        self.logs[kind].write(step, values)
        self.done[kind] = step
        write_record(_path(self.about, kind), {"done": step, **({"results": list(results)} if results else {})})


def require(kinds: Sequence[str]) -> None:
    """RobenchError where a kind is unknown, or its package is not installed: before hours of work, not after."""
    for kind in kinds:
        if package := getattr(LOGS.get(kind), "package", ""):
            _package(kind, package)


@contextmanager
def opened(kinds: Sequence[str], run: Path, part: str, config: Mapping[str, Any]) -> Iterator[Book]:
    """The logs of ``kinds`` of a run in the folder ``run``; none makes a book that writes nothing.

    Raises:
        RobenchError: an unknown kind, or one whose package is not installed.
    """
    require(kinds)
    makers = {kind: LOGS.get(kind) for kind in kinds}
    book = Book(About(run / FOLDER, run.name, part, config, 0))
    try:
        for kind, make in makers.items():
            book.done[kind] = int(_record(book.about, kind).get("done", 0))
            folder = run / FOLDER / kind / part
            folder.mkdir(parents=True, exist_ok=True)
            book.logs[kind] = make(About(folder, run.name, part, config, book.done[kind]))
        yield book
    finally:
        for log in book.logs.values():
            log.close()


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings, under names with slashes; whatever is no number is left out."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def _path(about: About, kind: str) -> Path:
    return about.folder / kind / f"{about.part}.json"


def _record(about: About, kind: str) -> dict[str, Any]:
    """What a log has; a record that is damaged or absent knows of nothing."""
    with suppress(RobenchError):
        return read_record(_path(about, kind))
    return {}


def _package(kind: str, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RobenchError(
            f"--log-to {kind} needs its package, which does not import ({error}); pip install robench[{kind}]"
        ) from error


@LOGS.register("jsonl")
class JsonLines:
    """``log.jsonl``: a JSON object per step."""

    def __init__(self, about: About) -> None:
        path = about.folder / "log.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True)[: about.done] if path.exists() else []
        path.write_text("".join(lines), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@LOGS.register("tensorboard")
class TensorBoard:
    """Event files, for ``tensorboard --logdir runs``."""

    package = "tensorboard"

    def __init__(self, about: About) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(about.folder), purge_step=about.done + 1)
        if not about.done:
            self._writer.add_text("config", f"```\n{json.dumps(dict(about.config), indent=2, default=str)}\n```")

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@LOGS.register("wandb")
class WeightsAndBiases:
    """A run of the project ``robench``, or of ``WANDB_PROJECT``; with ``WANDB_MODE=offline`` in the run's folder."""

    package = "wandb"

    def __init__(self, about: About) -> None:
        self._run = import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", "robench"), name=f"{about.name} {about.part}",
            id=content_key([about.name, about.part, str(about.folder.resolve())]), resume="allow",
            config=dict(about.config), dir=str(about.folder),
        )  # fmt: skip

    def write(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


@LOGS.register("mlflow")
class MLflow:
    """A run of the experiment ``robench`` at ``MLFLOW_TRACKING_URI``, else in a file in the run's folder."""

    package = "mlflow"

    def __init__(self, about: About) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{about.folder.resolve() / 'mlflow.db'}"
        self._client = import_module("mlflow").MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("robench")
        experiment = found.experiment_id if found else self._client.create_experiment("robench")
        key = content_key([about.name, about.part, str(about.folder.resolve())])
        runs = self._client.search_runs([experiment], f"tags.robench = '{key}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            made = self._client.create_run(experiment, tags={"robench": key}, run_name=f"{about.name} {about.part}")
            self._id = made.info.run_id
            for name, value in about.config.items():
                self._client.log_param(self._id, name, str(value)[:500])

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)
