"""Who does a plan's tasks: this process, several on this machine, or a Ray cluster. The rows are the same."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from robench.core.errors import RobenchError
from robench.core.pool import Processes
from robench.evaluation.cost import Pace
from robench.studies.plan import Kind, Plan, Step, ranks
from robench.studies.state import StudyStatus
from robench.studies.work import perform

log = logging.getLogger(__name__)

#: How often a task is begun whose worker dies.
TRIES = 3

#: Arguments of `robench.studies.work.perform`, all but the key.
Call = Callable[[str], tuple[Any, ...]]


class Engine(Protocol):
    """Attributes: slots: tasks at a time."""

    slots: int

    def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        """`perform` of these arguments, somewhere; BrokenExecutor where a worker died."""


class Here:
    """One after the other, in this process."""

    slots = 1

    def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result(perform(*call))
        return future


class Ray:
    """A Ray cluster; by default one on this machine's loopback. Ray itself tries a task again whose worker died.

    Args:
        address: of a running cluster; gpus: share of a GPU per task, by default a quarter where there are any.
    """

    def __init__(self, workers: int, address: str | None = None, gpus: float | None = None) -> None:
        # Read when ray is imported: no report to its makers, and a cluster of this machine alone listens on loopback.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            ray = import_module("ray")
        except ImportError as error:
            raise RobenchError("--engine ray needs the package ray; pip install 'robench[ray]'") from error
        local = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            ray.init(
                address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local)
            )
        except (ConnectionError, ValueError) as error:
            raise RobenchError(
                f"no Ray cluster answers at --address {address!r} ({error}); ray status tells"
            ) from error
        there = ray.cluster_resources()
        share = gpus if gpus is not None else 0.25 if there.get("GPU") else 0.0
        if share and not there.get("GPU"):
            ray.shutdown()
            raise RobenchError(f"--gpus {share:g}: the Ray cluster has no GPU; omit it")
        self.slots = max(1, int(there["GPU"] / share) if share else int(there["CPU"]))
        self._perform = ray.remote(perform).options(num_cpus=0 if share else 1, num_gpus=share, max_retries=TRIES - 1)
        self._ray = ray

    def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = self._perform.remote(*call).future()
        return future

    def close(self) -> None:
        self._ray.shutdown()


def _lacked_memory(record: dict[str, Any]) -> bool:
    return record["state"] == "failed" and str(record["error"]).startswith("OutOfMemoryError")


@contextmanager
def engine(
    name: str, workers: int, *, address: str | None = None, gpus: float | None = None, visible: Sequence[str] = ()
) -> Iterator[Here | Processes | Ray]:
    """The engine called ``name``: ``local`` or ``ray``.

    Args:
        gpus: share of a GPU per task of ``ray``; visible: GPUs that the processes of ``local`` are spread over.
    """
    if name == "local" and workers == 1:
        yield Here()
        return
    made = Ray(workers, address, gpus) if name == "ray" else Processes(perform, workers, visible)
    try:
        yield made
    finally:
        made.close()


@dataclass
class RunResult:
    """Keys of tasks: what was done by now, what failed and why, what is left and why not begun."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def run(
    plan: Plan,
    status: StudyStatus,
    workers: Engine,
    call: Call,
    *,
    only: Collection[Kind] = (),
    budget: float | None = None,
    pace: Pace | None = None,
) -> RunResult:
    """Does what is missing of a plan; a task that fails stops those alone that need it.

    Args:
        only: kinds of tasks that may be done; a report alone draws what there is.
        budget: seconds; a task is begun only if it is expected to end in time.
        pace: for that, what a pass takes here; corrected by the tasks that were done.
    """
    work = _Scheduler(plan, status, workers, call, only, budget, pace or Pace(0.0, 0.0))
    while work.begin():
        for future in wait(work.running, return_when=FIRST_COMPLETED).done:
            work.end(future)
    for key, step in work.todo.items():
        late = work.ready(step) and not work.in_time(step)
        work.result.left[key] = "beyond the budget" if late else "waits for what failed or is left"
    return work.result


class _Scheduler:
    """What of a plan is running, and what is still to be done, by key in the order in which it is begun."""

    def __init__(
        self,
        plan: Plan,
        status: StudyStatus,
        workers: Engine,
        call: Call,
        only: Collection[Kind],
        budget: float | None,
        pace: Pace,
    ) -> None:
        self.plan, self.status, self.workers, self.call = plan, status, workers, call
        self.only, self.budget, self.pace = only, budget, pace
        self.began = time.monotonic()
        self.result = RunResult()
        self.todo: dict[str, Step] = {}
        self.running: dict[Future[dict[str, Any]], Step] = {}
        self.tries: dict[str, int] = {}
        self.spent, self.expected = 0.0, 0.0
        #: Whether what is running is the last try of a task.
        self.alone = False
        order = ranks(plan.steps, lambda step: step.passes)
        for step in sorted(plan.steps.values(), key=lambda step: -order[step.key]):
            # What a report rests on is known when the rest is done; it comes last.
            if status.state(step) == "done" and not (step.kind == "report" and self.todo):
                self.result.done.add(step.key)
            elif only and step.kind not in only:
                self.result.left[step.key] = "not asked for"
            else:
                self.todo[step.key] = step
        self.total = len(self.result.done) + len(self.todo)

    def ready(self, step: Step) -> bool:
        return self.only == ("report",) or set(step.needs) <= self.result.done

    def in_time(self, step: Step) -> bool:
        estimate = step.seconds(self.pace) * (self.spent / self.expected if self.expected else 1.0)
        return self.budget is None or time.monotonic() - self.began + estimate <= self.budget

    def begin(self) -> bool:
        """Begins as many tasks as there are workers; whether any is running."""
        for step in [step for step in self.todo.values() if self.ready(step) and self.in_time(step)]:
            if len(self.running) == self.workers.slots or (self.alone and self.running):
                break
            # Memory that others took may be why it died or failed: its last try is alone.
            last = self.tries.get(step.key, 0) == TRIES - 1
            if last and self.running:
                continue
            self.alone = last
            del self.todo[step.key]
            # What was there when this began, ``status`` knows; rows may have come since.
            if step.kind == "report" and StudyStatus(self.plan, self.status.folder).state(step) == "done":
                self.result.done.add(step.key)
                continue
            self.tries[step.key] = self.tries.get(step.key, 0) + 1
            self.running[self.workers.submit(self.call(step.key))] = step
            # A task that was done at once makes others ready, of which one may be more urgent.
            if self.workers.slots == 1:
                break
        return bool(self.running)

    def end(self, future: Future[dict[str, Any]]) -> None:
        """Takes what became of a task; one whose worker died, or had too little memory, is begun again."""
        step = self.running.pop(future)
        try:
            record = future.result()
        except BrokenExecutor:
            if self._again(step, f"a worker died during {step.title}"):
                return
            record = {"state": "failed", "error": f"its worker died {TRIES} times"}
        except Exception as error:  # whatever an engine raises for a task that it gave up
            record = {"state": "failed", "error": " ".join(str(error).split())[:500]}
        if _lacked_memory(record) and self._again(step, f"no memory for {step.title} beside the others"):
            return
        if record["state"] == "done":
            self.result.done.add(step.key)
            self.spent += record["seconds"]
            self.expected += step.seconds(self.pace)
            log.info(f"[{len(self.result.done)}/{self.total}] {step.title}: {record['seconds']:.1f} s")
        else:
            self.result.failed[step.key] = record["error"]
            self.status.folder.keep_failure(step, record["error"])
            log.warning(f"failed: {step.title}")

    def _again(self, step: Step, why: str) -> bool:
        if self.tries[step.key] == TRIES:
            return False
        log.warning(f"{why}: begun again")
        self.todo[step.key] = step
        return True
