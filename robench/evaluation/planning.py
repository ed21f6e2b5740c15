"""What a threat asks for, and what of it is missing: cells, and works, the cells that one crafting serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from robench.core import rules
from robench.core.data import Data
from robench.core.files import content_key
from robench.core.threads import USUAL
from robench.evaluation import cost
from robench.evaluation.cells import Cell, Craft
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import SURROGATE
from robench.evaluation.predict import Indices, Radii
from robench.evaluation.rows import OpenRows
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Job, Threat, surrogates_of


@dataclass(frozen=True)
class Request:
    """What is asked of a target.

    Attributes:
        threat: with the attacks that are made, which may be more than were asked for.
        samples: indices in the test set.
    """

    target: EvaluatedModel
    threat: Threat
    samples: Indices


def all_samples(requests: Sequence[Request]) -> Indices:
    """Those of any target, ascending."""
    return np.unique(np.concatenate([each.samples for each in requests]))


@dataclass(frozen=True)
class Pending:
    """A cell of a target, and its samples that are still to be judged.

    Attributes:
        anew: how many passes a verdict takes.
    """

    cell: Cell
    target: EvaluatedModel
    samples: Indices
    anew: int


@dataclass(frozen=True)
class Work:
    """Cells that one crafting serves: the same source, attack and restarts."""

    key: str
    job: Job
    parts: list[Pending]

    @cached_property
    def pairs(self) -> tuple[Indices, Radii]:
        """(sample, ε) pairs that some part waits for, by ε and sample."""
        wanted: dict[float, set[int]] = {}
        for part in self.parts:
            wanted.setdefault(part.cell.eps, set()).update(map(int, part.samples))
        samples = [np.array(sorted(wanted[eps]), dtype=np.int64) for eps in sorted(wanted)]
        radii = [np.full(len(wanted[eps]), eps) for eps in sorted(wanted)]
        return np.concatenate(samples), np.concatenate(radii)

    @property
    def cells(self) -> dict[float, Cell]:
        """By ε, one that says what the images are made of: those of several targets say the same."""
        return {part.cell.eps: part.cell for part in self.parts}

    @property
    def source(self) -> str:
        """The name of the model that is attacked."""
        return self.job.source_name if not self.job.pooled else self.parts[0].target.name

    @property
    def draws(self) -> int:
        """Over how many draws of the source gradients are means; 0 where it draws nothing."""
        return self.parts[0].cell.attacked.draws

    def passes(self, crafted: int | None = None) -> float:
        """What it takes at most, see `robench.evaluation.cost`; ``crafted`` images are missing, by default all."""
        images = len(self.pairs[0]) if crafted is None else crafted
        judges = sum(len(part.samples) * part.target.n * part.anew for part in self.parts)
        attack, restarts = self.job.attack, len(self.job.restarts)
        return cost.attacked(attack, restarts, len(self.job.source), images, judges, self.draws)


class Planner:
    """Says which cells are asked for, and what they lack.

    Args:
        rows: what is there.
        drawing: identities of models that draw at inference; more may be added as they are found.
    """

    def __init__(self, data: Data, settings: Settings, rows: OpenRows, drawing: set[str]) -> None:
        self.data = data
        self.settings = settings
        self.rows = rows
        self.drawing = drawing

    def plan(self, requests: Sequence[Request]) -> list[Work]:
        """What is still to be done."""
        works: dict[str, Work] = {}

        def add(job: Job, target: EvaluatedModel, threat: Threat, wanted: set[int], threat_of_rows: str) -> None:
            rows = self.rows.of(target, threat_of_rows)
            for cell in self.cells(job, target, threat):
                samples = np.array(sorted(wanted - rows.samples(cell.key)), dtype=np.int64)
                if len(samples):
                    key = content_key([cell.attacked.at_any_eps, target.identity if job.pooled else None])
                    part = Pending(cell, target, samples, self.anew(target, threat.draws))
                    works.setdefault(key, Work(key, job, [])).parts.append(part)

        for each in requests:
            wanted = set(each.samples.tolist())
            for job in each.threat.jobs(each.target):
                add(job, each.target, each.threat, wanted, each.threat.name)
        everything = set(all_samples(requests).tolist())
        for threat, surrogate, job in self._on_themselves(requests):
            add(job, surrogate, threat, everything, SURROGATE)
        return list(works.values())

    def left(self, work: Work, samples: Indices) -> Work | None:
        """The part of ``work`` on these samples that nobody has done by now; None where there is none."""
        parts = []
        for part in work.parts:
            rows = self.rows.of(part.target, part.cell.threat)
            pending = part.samples[np.isin(part.samples, samples)]
            if len(pending):
                rows.refresh()
                done = rows.samples(part.cell.key)
                pending = np.array([sample for sample in pending if int(sample) not in done], dtype=np.int64)
            if len(pending):
                parts.append(replace(part, samples=pending))
        return replace(work, parts=parts) if parts else None

    def cells(self, job: Job, target: EvaluatedModel, threat: Threat) -> Iterator[Cell]:
        """One for each ε."""
        for eps in threat.eps:
            craft = self._craft(job, eps)
            about: dict[str, Any] = {
                "surrogate": job.source_name,
                "attack": rules.label(job.attack.label, job.source.rule),
                "loss": job.attack.loss,
                "eps": eps,
            }
            drawn = self._judged_over(target, job.draws)
            yield Cell(**self._who(target), threat=job.threat, **about, craft=craft, draws=drawn)

    def clean_cell(self, target: EvaluatedModel, draws: int) -> Cell:
        double = self.settings.precision == "float64"
        return Cell(**self._who(target), threat="clean", double=double, draws=self._judged_over(target, draws))

    def not_judged(self, target: EvaluatedModel, samples: Indices, threat: str, draws: int) -> Indices:
        """Those of ``samples``, ascending, that ``target`` has not judged clean."""
        done = self.rows.of(target, threat).samples(self.clean_cell(target, draws).key)
        return np.array(sorted(set(samples.tolist()) - done), dtype=np.int64)

    def anew(self, target: EvaluatedModel, draws: int) -> int:
        """Passes of a verdict over so many draws."""
        return draws if target.identity in self.drawing else 1

    def _on_themselves(self, requests: Sequence[Request]) -> Iterator[tuple[Threat, EvaluatedModel, Job]]:
        """What is crafted on each surrogate, as a job on the surrogate itself: whether the attack works where it is
        made."""
        seen = set()
        for each in requests:
            surrogates = {surrogate.identity: surrogate for surrogate in surrogates_of(each.threat)}
            for job in each.threat.jobs(each.target) if surrogates else ():
                key = self._craft(job, each.threat.eps[0]).at_any_eps
                if key not in seen:
                    seen.add(key)
                    yield each.threat, surrogates[job.source_key], replace(job, threat=SURROGATE)

    def _craft(self, job: Job, eps: float) -> Craft:
        """What images of a job are made of."""
        batch = (self.settings.batch_size or USUAL) if job.attack.batch_dependent else None
        seed, precision = self.settings.seed, self.settings.precision
        made = job.source_key, job.attack.manifest(), job.restarts, seed, precision, eps, batch
        return Craft(self.data.identity, *made, draws=job.draws if self._draws(job.source_key) else 0)

    def _draws(self, key: str) -> bool:
        """Whether the model of that identity, or one of that model's members, draws at inference."""
        return key.partition("/")[0] in self.drawing

    def _judged_over(self, target: EvaluatedModel, draws: int) -> int:
        """Over how many draws it is judged, of those asked for; 0 where it has nothing to draw. The drawn member of
        rule ``random`` needs no word of it where it is one."""
        if target.identity in self.drawing:
            return draws
        return draws if target.ensemble.rule == "random" and draws > 1 else 0

    def _who(self, target: EvaluatedModel) -> dict[str, Any]:
        who = {"target": target.name, "defense": target.defense, "n": target.n, "seed": target.seed}
        return {**who, "identity": target.identity, "data": self.data.identity}
