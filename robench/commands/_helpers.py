"""More processes for one evaluation, which share its work through the store (`robench.store.claims`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robench.core.errors import in_a_line
from robench.core.logs import Lines, logged
from robench.core.pool import Processes
from robench.evaluation.threats import Threat
from robench.session import Session
from robench.store.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Who is judged under which threat, in names that another process finds in the store: no network is sent."""

    targets: tuple[str, ...]
    kind: type[Threat]
    options: dict[str, Any]
    surrogates: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], threat: Threat) -> Part:
        options = {name: getattr(threat, name) for name in type(threat).model_fields}
        surrogates = tuple(model.name for model in options.pop("surrogates", ()))
        return cls(tuple(run.name for run in runs), type(threat), options, surrogates)

    def judge(self, session: Session, *, cache: bool) -> None:
        """Makes the rows that are missing and in nobody's hands."""
        surrogates = [session.store.get(name) for name in self.surrogates]
        threat = session.hold_out(surrogates, **self.options) if surrogates else self.kind(**self.options)
        session.judge([session.store.get(name) for name in self.targets], threat, cache=cache, probe=False)


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is printed: the caller of a helper prints the same."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), logged(Lines([])):
        yield


@contextmanager
def helpers(count: int, gpus: Sequence[str], function: Callable[..., None], *call: Any) -> Iterator[None]:
    """``count`` processes that do ``function`` of ``call``, ended when the caller is done. All of them share the cores.

    A helper that fails takes nothing along: what it leaves, the others do.

    Args:
        gpus: that the helpers are spread over, as CUDA_VISIBLE_DEVICES names them.
    """
    if not count:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // (count + 1))
    pool = Processes(function, count, gpus, threads)
    try:
        torch.set_num_threads(threads)
        begun = [pool.submit(call) for _ in range(count)]
        yield
        for number, helper in enumerate(begun, 1):
            if helper.done() and (error := helper.exception()):
                said = in_a_line(error, 1000)
                log.warning(f"helper {number} of {count} ended early, its share was done here: {said}")
    finally:
        torch.set_num_threads(before)
        pool.close()
