"""The units that works are cut into, which processes on one store share, and how much of them is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence

from robench.core.files import content_key
from robench.core.progress import Progress
from robench.core.threads import USUAL, chunks
from robench.evaluation.planning import Planner, Request, Work, all_samples
from robench.evaluation.settings import Settings
from robench.store.claims import PAUSE, Claims

log = logging.getLogger(__name__)

#: Looks at what other processes have in hand, before the user is told: a minute.
TOLD_AFTER = 120


class Tally:
    """How many passes are done, of how many; tells ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0.0
        self._total = 0.0

    def begin(self) -> None:
        self._done = 0.0

    def left(self, works: Sequence[Work]) -> None:
        """Nothing but ``works`` is left."""
        self._total = self._done + sum(work.passes() for work in works)

    def advance(self, images: int, work: Work) -> None:
        """So many images of a restart are done."""
        self._done += images * work.passes() / (len(work.pairs[0]) * len(work.job.restarts))
        source = work.job.source_name or work.parts[0].target.name
        self._progress(round(self._done), round(self._total), f"{work.job.threat}: {work.job.attack.label} on {source}")


def units(planner: Planner, requests: Sequence[Request], claims: Claims, tally: Tally) -> Generator[Work]:
    """Units of what is missing that no other process has, until nothing is missing. Each is claimed until the next one
    is asked for: by then its rows are kept.

    Works are cut by the rank of a sample among those requested, so that processes with the same command cut alike.
    """
    requested, radii = all_samples(requests), len(requests[0].threat.eps)
    tally.begin()
    left: int | None = None
    waits = 0
    while works := planner.plan(requests):
        now = sum(len(part.samples) for work in works for part in work.parts)
        assert left is None or now < left, "units were done and their rows are still missing"
        tally.left(works)
        left = None
        for work in works:
            size = _unit_size(work, planner.settings, planner.data.numel, len(requested), radii)
            for number, at in enumerate(chunks(len(requested), size)):
                with claims.take(content_key([work.key, number, size])) as granted:
                    unit = planner.left(work, requested[at]) if granted else None
                    if unit is not None:
                        left = now
                        for part in unit.parts:
                            planner.rows.of(part.target, part.cell.threat).declare(part.cell)
                        yield unit
        if left is None:  # what is missing, other processes have
            time.sleep(PAUSE)
            waits += 1
            if waits == TOLD_AFTER:
                log.info(f"waiting for what other processes have in hand ({claims.terms})")
        for rows in planner.rows:
            rows.refresh()


def _unit_size(work: Work, settings: Settings, numel: int, count: int, radii: int) -> int:
    """Samples of a unit, of ``count``: a few passes, and two units at least for every process."""
    usual = settings.batch_size or USUAL
    if work.job.attack.batch_dependent:  # rows depend on it: no matter of the machine
        return max(1, 2 * usual // radii)
    size = max(1, 2 * max(usual, settings.images_per_pass(numel)) // radii)
    return size if settings.workers == 1 else min(size, -(-count // (2 * settings.workers)))
