"""More processes for one evaluation, which share its work through the store (`robench.core.claims`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from robench.commands._shared import device_of
from robench.core.data import load
from robench.core.errors import RobenchError
from robench.core.logs import Lines, logged
from robench.core.models import import_model
from robench.core.pool import Processes
from robench.core.runs import Run, Runs
from robench.evaluation.engine import Settings
from robench.evaluation.threats import Threat
from robench.studies.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Who is judged under which threat: a threat and its surrogates as names, as networks are not sent."""

    targets: tuple[str, ...]
    kind: type[Threat]
    options: dict[str, Any]
    surrogates: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], threat: Threat) -> Part:
        options = {each.name: getattr(threat, each.name) for each in fields(threat)}
        surrogates = tuple(subject.name for subject in options.pop("surrogates", ()))
        return cls(tuple(run.name for run in runs), type(threat), options, surrogates)

    def threat(self, bench: Workbench) -> Threat:
        if not self.surrogates:
            return self.kind(**self.options)
        return bench.hold_out([bench.store.get(name) for name in self.surrogates], **self.options)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation in words that another process of this machine understands.

    Attributes:
        runs: folder that holds all runs; dataset, data_dir: as `robench.core.data.load` takes them.
        models: ``package.module:factory`` of the runs, as the user typed them.
        device: as the user typed it: of several GPUs, every process sees one.
    """

    runs: str
    dataset: str
    data_dir: str
    models: tuple[str, ...]
    device: str
    settings: Settings
    samples: int
    subset: str
    cache: bool
    parts: tuple[Part, ...]


def assist(evaluation: Evaluation) -> None:
    """Does what is left of an evaluation; prints nothing, as the rows are all that the caller needs.

    Raises:
        RobenchError: see `robench.studies.workbench.Workbench.judge`.
    """
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), logged(Lines([])):
        for name in evaluation.models:
            import_model(name)
        data, settings = load(evaluation.dataset, evaluation.data_dir), evaluation.settings
        settings = replace(settings, device=device_of(evaluation.device))
        bench = Workbench(Runs(evaluation.runs), data, settings, evaluation.samples, evaluation.subset)
        for part in evaluation.parts:
            chosen = [bench.store.get(name) for name in part.targets]
            bench.judge(chosen, part.threat(bench), cache=evaluation.cache, probe=False)


@contextmanager
def helpers(evaluation: Evaluation, count: int, gpus: Sequence[str]) -> Iterator[None]:
    """``count`` processes that `assist`, ended when the caller has all rows. All of them share the cores.

    A helper that fails takes nothing along: what it leaves, the others do.

    Args:
        gpus: that the helpers are spread over, as CUDA_VISIBLE_DEVICES names them.
    """
    if not count:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // (count + 1))
    pool = Processes(assist, count, gpus, threads)
    try:
        torch.set_num_threads(threads)
        begun = [pool.submit((evaluation,)) for _ in range(count)]
        yield
        for number, helper in enumerate(begun, 1):
            if helper.done() and (error := helper.exception()):
                said = str(error) if isinstance(error, RobenchError) else f"{type(error).__name__}: {error}"
                log.warning(
                    f"helper {number} of {count} ended early, its share was done here: {' '.join(said.split())}"
                )
    finally:
        torch.set_num_threads(before)
        pool.close()
