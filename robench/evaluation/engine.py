"""The evaluator: unfolds a threat into cells, crafts what is missing, judges in float32, keeps rows."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from robench.attacks import Attack, Crafted
from robench.core import rules
from robench.core.data import Data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, out_of_memory
from robench.core.fast import Precision, attackable, compiled, crafting_dtype, slow_precision
from robench.core.files import content_key
from robench.core.frozen import frozen
from robench.core.progress import Progress, silent
from robench.core.threads import USUAL, fitting_batch, fitting_threads, judging_batch
from robench.evaluation import cost
from robench.evaluation.attacked import AttackedModel
from robench.evaluation.cells import Cell, Craft
from robench.evaluation.checks import stands_for, surrogates_work
from robench.evaluation.cost import Forecast
from robench.evaluation.craft import craft
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.evaluations import Evaluation
from robench.evaluation.findings import Finding
from robench.evaluation.images import Images
from robench.evaluation.outcomes import ASIDE, ENSEMBLE, SURROGATE, Outcomes
from robench.evaluation.predict import Indices, Predictions, Radii, correct, predict
from robench.evaluation.rows import Rows
from robench.evaluation.soundness import GRADIENT, REPEAT, changed, examine
from robench.evaluation.threats import Blackbox, Job, Threat
from robench.store.claims import PAUSE, Claims

log = logging.getLogger(__name__)

#: Looks at what other processes have in hand, before the user is told: a minute.
TOLD_AFTER = 120


@dataclass(frozen=True)
class Settings:
    """How to compute; nothing here changes a row beyond rounding, but ``precision`` and ``seed``, which keys hold.

    Attributes:
        precision: in which images are crafted. Verdicts are taken in float32 on the original weights (in float64
            where that is the precision).
        batch_size: images per forward pass at most, by default what suits the device; on a CPU fewer where they are
            large, which is faster; halved by itself when memory runs out.
        seed: of the attacks' draws.
        compile: crafts on a model that went through torch.compile, where no attack hooks its modules; without a
            compiler, as usual, and a warning says so.
        workers: processes with these settings that share the work, which is cut so that there is enough for all.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    batch_size: int | None = None
    seed: int = 0
    compile: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise RobenchError(f"expected `batch_size` to be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class _Pending:
    """A cell of a target, and its samples that are still to be judged.

    Attributes:
        anew: how many passes a verdict takes.
    """

    cell: Cell
    target: EvaluatedModel
    samples: Indices
    anew: int


@dataclass(frozen=True)
class _Crafting:
    """Cells that one crafting serves: the same source, attack and restarts."""

    key: str
    job: Job
    parts: list[_Pending]

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

    def passes(self, crafted: int | None = None) -> float:
        """What it takes at most, see `robench.evaluation.cost`; ``crafted`` images are missing, by default all."""
        images = len(self.pairs[0]) if crafted is None else crafted
        judges = sum(len(part.samples) * part.target.n * part.anew for part in self.parts)
        attack, restarts = self.job.attack, len(self.job.restarts)
        return cost.attacked(attack, restarts, len(self.job.source), images, judges, self.draws)

    @property
    def draws(self) -> int:
        """Over how many draws of the source gradients are means; 0 where it draws nothing."""
        return self.parts[0].cell.attacked.draws


def _title(job: Job, target: EvaluatedModel) -> str:
    return f"{job.threat}: {job.attack.label} {job.attack.loss} on {job.source_name if not job.pooled else target.name}"


def _with_cw(threat: Threat) -> Threat:
    twins = []
    for attack in threat.attacks:
        with suppress(RobenchError):  # an attack with a loss of its own
            twins.append(replace(attack, loss="cw"))
    return threat.model_copy(update={"attacks": tuple(dict.fromkeys((*threat.attacks, *twins)))})


def surrogates_of(threat: Threat) -> tuple[EvaluatedModel, ...]:
    """The surrogates of a black-box threat; none of any other."""
    return threat.surrogates if isinstance(threat, Blackbox) else ()


def correct_for_all(
    target: EvaluatedModel, data: Data, order: Tensor, samples: int, device: torch.device, batch_size: int | None = None
) -> Tensor:
    """The first ``samples`` test images, in ``order``, that every member classifies correctly: indices, ascending.

    The transferability matrix and the diversity are measured on these (protocol §3); RobenchError where there is none.
    """
    chosen = order[:0]
    for at in _chunks(len(order), judging_batch(data.test.images[0].numel(), batch_size)):
        if len(chosen) >= samples:
            break
        chunk = order[at]
        images = _images(data, chunk.numpy(), device, torch.float32)
        right = correct(target.ensemble, images, data.test.labels[chunk], members=True)[:-1].cpu()
        chosen = torch.cat([chosen, chunk[right.all(dim=0)]])
    chosen = chosen[:samples]
    if not len(chosen):
        raise RobenchError(
            f"no image of {data.name} is classified right by every member of {target.name!r}, and these alone are "
            f"attacked here; robench check model looks at what is wrong with it"
        )
    return chosen.sort().values


class Evaluator:
    """Runs threats on targets.

    Args:
        rows: where the rows of a target are kept; by default in memory.
        aside: where those are that serve checks and no number: of a surrogate on itself, of survivors attacked again.
        images: the cache of adversarial images; None crafts again for every call.
        claims: through which processes on the same store share the work.
        drawing: identities of models that are known to draw at inference; targets and surrogates are examined.
    """

    def __init__(
        self,
        data: Data,
        settings: Settings | None = None,
        *,
        rows: Callable[[EvaluatedModel], Rows] = lambda model: Rows(),
        aside: Callable[[EvaluatedModel], Rows] = lambda model: Rows(),
        images: Images | None = None,
        claims: Claims | None = None,
        progress: Progress = silent,
        drawing: Collection[str] = (),
    ) -> None:
        self.data = data
        self.settings = settings or Settings()
        self._rows_of = {False: rows, True: aside}
        self._rows: dict[tuple[str, bool], Rows] = {}
        self._doubles: dict[str, Ensemble] = {}
        self._images = images
        self._claims = claims or Claims(None)
        self._progress = progress
        self._batch = self.settings.batch_size
        self._drawing = set(drawing)
        self._blind: set[str] = set()
        self._done = 0.0
        self._total = 0.0
        self._told_why = False
        if slow := slow_precision(self.settings.precision, self.settings.device):
            log.warning(slow)

    def run(
        self,
        targets: Sequence[EvaluatedModel],
        threat: Threat,
        samples: Tensor | Callable[[EvaluatedModel], Tensor],
        *,
        part: bool = False,
    ) -> Outcomes:
        """Rows of every target under ``threat``, and its clean rows; only what is missing is computed.

        Args:
            samples: indices of test images, or per target.
            part: see `robench.evaluation.evaluations.Evaluation`.

        Under a black-box threat the surrogates are judged too, clean and on what was crafted on them. Rows of these are
        kept aside, see `checks.surrogates_work`.

        Raises:
            RobenchError: a surrogate that is no hold-out, a model or an attack that breaks its contract.
        """
        indices = self._open(targets, threat, samples)
        threats, found = self._examined(targets, threat)
        everything = np.unique(np.concatenate(list(indices.values())))
        for surrogate in surrogates_of(threat):
            self._clean(surrogate, everything, SURROGATE, threat.draws)
        evaluations = {
            target.name: self._evaluation(target, threat, threats[target.name], indices[target.name], part)
            for target in targets
        }
        if threat.clean:
            for target in targets:
                self._clean(target, indices[target.name], threat.name, threat.draws)
        for attack in dict.fromkeys(attack for each in threats.values() for attack in each.attacks):
            if attack.batch_dependent:
                log.warning(
                    f"{attack.label}: an image depends on the others in its batch, so other samples, another "
                    f"--batch-size or an interruption give other rows"
                )
        units = self._units(targets, threats, indices)
        # Closed, it gives back the claim of a unit that failed.
        with fitting_threads(self.settings.device, self._fitting() * self._numbers), closing(units):
            for unit, source in units:
                make = self._pooled if unit.job.pooled else self._version
                make(unit, source)
        for rows in self._rows.values():
            rows.compact()
        self._again(targets, threat, found)
        return Outcomes.concat(
            self._judged(target, threat, evaluations[target.name], found[target.name]) for target in targets
        )

    def _evaluation(
        self, target: EvaluatedModel, threat: Threat, made: Threat, samples: Indices, part: bool
    ) -> Evaluation:
        """What is asked of a target, with the attacks of ``made``; kept before the first row, so that one that is cut
        off is known as such."""
        cells = [cell for job in made.jobs(target) for cell in self._cells(job, target, threat)]
        if threat.clean:
            cells.append(self._clean_cell(target, threat.draws))
        keys, chosen = sorted({cell.key for cell in cells}), sorted(set(samples.tolist()))
        evaluation = Evaluation(threat.name, target.identity, tuple(keys), tuple(chosen), part)
        rows = self._kept(target, threat.name)
        for cell in cells:
            rows.declare(cell)
        rows.begin(evaluation)
        return evaluation

    def _judged(
        self, target: EvaluatedModel, threat: Threat, evaluation: Evaluation, found: Sequence[Finding]
    ) -> Outcomes:
        """The rows of an evaluation, and what is to be known of them."""
        own = self._kept(target, threat.name).of([evaluation])
        said = [*found, *self._surrogates_work(own, threat)]
        if threat.clean:
            said.append(stands_for(self.data, torch.tensor(evaluation.samples)))
        self._kept(target).remember(target.identity, threat.name, said)
        return own.with_checks(said)

    def remember(self, target: EvaluatedModel, threat: str, checks: Sequence[Finding]) -> None:
        """Keeps beside the rows of ``target`` what was found since `run`."""
        self._kept(target).remember(target.identity, threat, checks)

    def _examined(
        self, targets: Sequence[EvaluatedModel], threat: Threat
    ) -> tuple[dict[str, Threat], dict[str, list[Finding]]]:
        """The threat of every target, with CW beside cross-entropy where that has no gradient on what is attacked; what
        was found of the target and of the surrogates that attack it."""
        device = self.settings.device
        follows = not all(attack.gradient_free for attack in threat.attacks)
        found: dict[str, list[Finding]] = {}
        threats: dict[str, Threat] = {}
        for target in targets:
            own = found.setdefault(target.name, [])
            threats[target.name] = threat
            for model in (target, *(each for each in surrogates_of(threat) if each.trained)):
                sound = examine(model, self.data, device)
                if not sound.differentiable and model in (surrogates_of(threat) or (target,)):
                    _refuse_to_follow(model, threat)
                followed = follows and sound.differentiable
                own += [
                    check
                    for check in sound.checks
                    if (check.status != "pass" or model is target) and (followed or check.name != GRADIENT)
                ]
                if sound.draws:
                    self._drawing.add(model.identity)
                    if threat.draws > 1:
                        own[:] = [_over_draws(check, model, threat) for check in own]
                if sound.blind and model in (surrogates_of(threat) or (target,)):
                    why = sound.blind.evidence
                    own.append(replace(sound.blind, evidence=f"{why}; every attack is made with CW too"))
                    threats[target.name] = _with_cw(threat)
                    if why not in self._blind:
                        log.warning(f"{why}: attacking with CW too")
                    self._blind.add(why)
        return threats, found

    def _again(self, targets: Sequence[EvaluatedModel], threat: Threat, found: dict[str, list[Finding]]) -> None:
        """Adds to what was found of every target that it, or a surrogate of it, is no longer who it was."""
        late = [check for each in surrogates_of(threat) if (check := changed(each, self.data, self.settings.device))]
        for target in targets:
            own = changed(target, self.data, self.settings.device)
            if own or late:
                kept = [check for check in found[target.name] if check.name != REPEAT]
                found[target.name] = [*kept, *([own] if own else []), *late]

    def _surrogates_work(self, outcomes: Outcomes, threat: Threat) -> list[Finding]:
        surrogates = surrogates_of(threat)
        if not surrogates:
            return []
        sources = Outcomes.concat(self._kept(surrogate, SURROGATE).everything() for surrogate in surrogates)
        return surrogates_work(outcomes, sources, self.data.num_classes)

    def forecast(
        self,
        targets: Sequence[EvaluatedModel],
        threat: Threat,
        samples: Tensor | Callable[[EvaluatedModel], Tensor],
        *,
        again: bool = False,
        timed: bool = True,
    ) -> list[Forecast]:
        """What `run` would do of each attack on each source, and for how long at most; writes nothing.

        Args:
            again: survivors of a white-box result are attacked again, as by `robench.validity.probe.attack_again`.
            timed: False measures nothing and leaves the seconds at 0.
        """
        indices = self._open(targets, threat, samples)
        threats, _ = self._examined(targets, threat)
        works = self.plan(targets, threats, indices)
        found = [
            (targets[0].ensemble, self._clean_forecast(targets, threat, indices)),
            *self._attack_forecasts(targets, threats, works),
        ]
        if again and threat.name == "whitebox":
            for target in {work.parts[0].target.name: work.parts[0].target for work in works}.values():
                count, radii = len(indices[target.name]), len(threat.eps)
                draws = threat.draws if target.identity in self._drawing else 1
                passes = draws * cost.survivors(threat.attacks, threat.restarts, target.n, count, radii)
                found.append((target.ensemble, Forecast(f"whitebox: survivors again on {target.name}", passes)))
        if not timed:
            return [part for _, part in found]
        paces: dict[str, float] = {}
        at_once = min(self._fitting(), max((len(work.pairs[0]) for work in works), default=USUAL))
        return [
            replace(part, seconds=part.passes * self._pace(source, at_once, paces)) if part.passes else part
            for source, part in found
        ]

    def _clean_forecast(
        self, targets: Sequence[EvaluatedModel], threat: Threat, indices: Mapping[str, Indices]
    ) -> Forecast:
        """Verdicts on clean images: of all models, or to find the images that all members of a target get right."""
        everything, draws = np.unique(np.concatenate(list(indices.values()))), threat.draws
        left = [
            len(self._not_judged(each, everything, SURROGATE, draws)) * each.n * self._anew(each, draws)
            for each in surrogates_of(threat)
        ]
        for target in targets:
            own = self._not_judged(target, indices[target.name], threat.name, draws) if threat.clean else self.data.test
            left.append(len(own) * target.n * (self._anew(target, draws) if threat.clean else 1))
        return Forecast("clean images", cost.judged(sum(left)))

    def _attack_forecasts(
        self, targets: Sequence[EvaluatedModel], threats: Mapping[str, Threat], works: Sequence[_Crafting]
    ) -> Iterator[tuple[Ensemble, Forecast]]:
        """Per attack and source, which is given too."""
        jobs: dict[str, list[Job]] = {}
        for target in targets:
            for job in threats[target.name].jobs(target):
                jobs.setdefault(_title(job, target), []).append(job)
        todo: dict[str, list[_Crafting]] = {title: [] for title in jobs}
        for work in works:
            todo.setdefault(_title(work.job, work.parts[0].target), []).append(work)
        for title, own in todo.items():
            job = (jobs.get(title) or [work.job for work in own])[0]
            missing = [self._uncrafted(work) for work in own]
            kept = self._images is not None and not job.pooled
            pending = sum(part.cell.threat not in ASIDE for work in own for part in work.parts)
            cells = len(jobs.get(title, ())) * len(threats[targets[0].name].eps)
            yield (
                job.source,
                Forecast(
                    title,
                    sum(work.passes(count) for work, count in zip(own, missing, strict=True)),
                    cost.adversarial(sum(missing), self._numbers, self.settings.precision) if kept else 0,
                    cells=cells,
                    done=cells - pending,
                ),
            )

    def _uncrafted(self, work: _Crafting) -> int:
        """How many images of ``work`` are in no cache."""
        samples, eps = work.pairs
        if self._images is None or work.job.pooled:
            return len(samples)
        there = sum(
            int(np.isin(samples[eps == radius], self._images.samples(cell.attacked)).sum())
            for radius, cell in work.cells.items()
        )
        return len(samples) - there

    def _pace(self, source: Ensemble, batch: int, known: dict[str, float]) -> float:
        """Seconds of a pass through a member of ``source``, on average; each architecture is measured once."""
        shape, how = self.data.test.images.shape[1:], self.settings
        drawings = [repr(member) for member in source.members]
        for drawing, member in zip(drawings, source.members, strict=True):
            if drawing not in known:
                known[drawing] = cost.attacking_pace(member, shape, how.device, batch, how.precision)
        return sum(known[drawing] for drawing in drawings) / len(drawings)

    def _open(
        self, targets: Sequence[EvaluatedModel], threat: Threat, samples: Tensor | Callable[[EvaluatedModel], Tensor]
    ) -> dict[str, Indices]:
        """Opens the rows of all who are judged; the samples of each target."""
        indices = {
            target.name: (samples(target) if callable(samples) else samples).numpy().astype(np.int64)
            for target in targets
        }
        if len(indices) != len(targets):
            raise RobenchError(f"expected targets of different names, got {', '.join(t.name for t in targets)}")
        known: dict[str, str] = {}
        for model in (*targets, *surrogates_of(threat)):
            if known.setdefault(model.name, model.identity) != model.identity:
                raise RobenchError(
                    f"two models are called {model.name!r}; give every target and surrogate its own name"
                )
        return indices

    def _kept(self, model: EvaluatedModel, threat: str = "") -> Rows:
        """The rows of a target, or, of a threat that serves checks alone, those aside; opened when first asked for."""
        aside = threat in ASIDE
        place = (model.name, aside)
        if place not in self._rows:
            self._rows[place] = self._rows_of[aside](model)
        return self._rows[place]

    def _kept_of(self, part: _Pending) -> Rows:
        return self._kept(part.target, part.cell.threat)

    def plan(
        self, targets: Sequence[EvaluatedModel], threats: Mapping[str, Threat], indices: Mapping[str, Indices]
    ) -> list[_Crafting]:
        """What is still to be done: the threat of each target by its name."""
        works: dict[str, _Crafting] = {}

        def add(job: Job, target: EvaluatedModel, threat: Threat, wanted: set[int], threat_of_rows: str) -> None:
            rows = self._kept(target, threat_of_rows)
            for cell in self._cells(job, target, threat):
                samples = np.array(sorted(wanted - rows.samples(cell.key)), dtype=np.int64)
                if len(samples):
                    key = content_key([cell.attacked.at_any_eps, target.identity if job.pooled else None])
                    part = _Pending(cell, target, samples, self._anew(target, threat.draws))
                    works.setdefault(key, _Crafting(key, job, [])).parts.append(part)

        for target in targets:
            threat, wanted = threats[target.name], set(indices[target.name].tolist())
            for job in threat.jobs(target):
                add(job, target, threat, wanted, threat.name)
        everything = set(np.concatenate(list(indices.values())).tolist())
        for threat, surrogate, job in self._on_themselves(targets, threats):
            add(job, surrogate, threat, everything, SURROGATE)
        return list(works.values())

    def _on_themselves(
        self, targets: Sequence[EvaluatedModel], threats: Mapping[str, Threat]
    ) -> Iterator[tuple[Threat, EvaluatedModel, Job]]:
        """What is crafted on each surrogate, as a job on the surrogate itself: whether the attack works where it is
        made."""
        seen = set()
        for target in targets:
            threat = threats[target.name]
            surrogates = {surrogate.identity: surrogate for surrogate in surrogates_of(threat)}
            for job in threat.jobs(target) if surrogates else ():
                key = self._craft(job, threat.eps[0]).at_any_eps
                if key not in seen:
                    seen.add(key)
                    yield threat, surrogates[job.source_key], replace(job, threat=SURROGATE)

    def _craft(self, job: Job, eps: float) -> Craft:
        """What images of a job are made of."""
        batch = (self.settings.batch_size or USUAL) if job.attack.batch_dependent else None
        seed, precision = self.settings.seed, self.settings.precision
        made = job.source_key, job.attack.manifest(), job.restarts, seed, precision, eps, batch
        return Craft(self.data.identity, *made, draws=job.draws if self._draws(job.source_key) else 0)

    def _cells(self, job: Job, target: EvaluatedModel, threat: Threat) -> Iterator[Cell]:
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

    def _clean_cell(self, target: EvaluatedModel, draws: int) -> Cell:
        double = self.settings.precision == "float64"
        return Cell(**self._who(target), threat="clean", double=double, draws=self._judged_over(target, draws))

    def _draws(self, key: str) -> bool:
        """Whether the model of that identity, or one of that model's members, draws at inference."""
        return key.partition("/")[0] in self._drawing

    def _judged_over(self, target: EvaluatedModel, draws: int) -> int:
        """Over how many draws it is judged, of those asked for; 0 where it has nothing to draw. The drawn member of
        rule ``random`` needs no word of it where it is one."""
        if target.identity in self._drawing:
            return draws
        return draws if target.ensemble.rule == "random" and draws > 1 else 0

    def _anew(self, target: EvaluatedModel, draws: int) -> int:
        """Passes of a verdict over so many draws."""
        return draws if target.identity in self._drawing else 1

    def _keys(self, target: EvaluatedModel, samples: Indices) -> Indices | None:
        """What the draws of ``target`` at inference are keyed by: ``samples``; None where it draws nothing."""
        return samples if target.identity in self._drawing else None

    def _who(self, target: EvaluatedModel) -> dict[str, Any]:
        who = {"target": target.name, "defense": target.defense, "n": target.n, "seed": target.seed}
        return {**who, "identity": target.identity, "data": self.data.identity}

    def _not_judged(self, target: EvaluatedModel, samples: Indices, threat: str, draws: int) -> Indices:
        """Those of ``samples``, ascending, that ``target`` has not judged clean."""
        done = self._kept(target, threat).samples(self._clean_cell(target, draws).key)
        return np.array(sorted(set(samples.tolist()) - done), dtype=np.int64)

    def _clean(self, target: EvaluatedModel, wanted: Indices, threat: str, draws: int) -> None:
        pending = self._not_judged(target, wanted, threat, draws)
        if not len(pending):
            return
        cell, rows = self._clean_cell(target, draws), self._kept(target, threat)
        rows.declare(cell)
        parts = []
        for chunk in _chunks(len(pending), judging_batch(self._numbers, self.settings.batch_size)):
            samples = pending[chunk]
            images, labels, keys = self._batch_of(samples), self._labels(samples), self._keys(target, samples)
            try:
                verdict = predict(self._judge_of(target), images, labels, draws=cell.draws, samples=keys)
            except RobenchError:
                raise
            except Exception as error:  # whatever a user's module may raise
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                raise RobenchError(
                    f"{target.name} takes a few images and not {len(images)} at once ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:160]}); evaluate with a smaller --batch-size"
                ) from error
            nothing = np.zeros(len(images))
            parts.append(_rows(cell, samples, labels, verdict, nothing, nothing, False))
        rows.append(pd.concat(parts, ignore_index=True))

    def _units(
        self, targets: Sequence[EvaluatedModel], threats: Mapping[str, Threat], indices: Mapping[str, Indices]
    ) -> Generator[tuple[_Crafting, AttackedModel]]:
        """Units of what is missing that no other process has, and whom their attack follows, until nothing is missing.
        Each is claimed until the next one is asked for: by then its rows are kept.

        Units are cut by the rank of a sample among those requested, so that processes with the same command cut alike.
        """
        requested = np.unique(np.concatenate(list(indices.values())))
        radii = len(next(iter(threats.values())).eps)
        self._done = 0.0
        left: int | None = None
        waits = 0
        while works := self.plan(targets, threats, indices):
            now = sum(len(part.samples) for work in works for part in work.parts)
            assert left is None or now < left, "units were done and their rows are still missing"
            self._total = self._done + sum(work.passes() for work in works)
            left = None
            for work in works:
                source, size = self._source(work), self._unit_size(work, len(requested), radii)
                for number, at in enumerate(_chunks(len(requested), size)):
                    with self._claims.take(content_key([work.key, number, size])) as granted:
                        unit = self._unit(work, requested[at]) if granted else None
                        if unit is not None:
                            left = now
                            for part in unit.parts:
                                self._kept_of(part).declare(part.cell)
                            yield unit, source
            if left is None:  # what is missing, other processes have
                time.sleep(PAUSE)
                waits += 1
                if waits == TOLD_AFTER:
                    log.info(f"waiting for what other processes have in hand ({self._claims.terms})")
            for rows in self._rows.values():
                rows.refresh()

    def _unit_size(self, work: _Crafting, count: int, radii: int) -> int:
        """Samples of a unit, of ``count``: a few passes, and two units at least for every process."""
        usual = self.settings.batch_size or USUAL
        if work.job.attack.batch_dependent:  # rows depend on it: no matter of the machine
            return max(1, 2 * usual // radii)
        size = max(1, 2 * max(usual, self._fitting()) // radii)
        return size if self.settings.workers == 1 else min(size, -(-count // (2 * self.settings.workers)))

    def _unit(self, work: _Crafting, samples: Indices) -> _Crafting | None:
        """The part of ``work`` on these samples that nobody has done by now; None where there is none."""
        parts = []
        for part in work.parts:
            rows = self._kept_of(part)
            pending = part.samples[np.isin(part.samples, samples)]
            if len(pending):
                rows.refresh()
                done = rows.samples(part.cell.key)
                pending = np.array([sample for sample in pending if int(sample) not in done], dtype=np.int64)
            if len(pending):
                parts.append(replace(part, samples=pending))
        return replace(work, parts=parts) if parts else None

    def _source(self, work: _Crafting) -> AttackedModel:
        job, draws = work.job, bool(work.draws)
        image = self._batch_of(work.parts[0].samples[:1])

        def copied(plain: bool) -> nn.Module:
            with frozen(job.source):
                model = attackable(job.source, image, self.settings.precision, plain=plain)
                if self.settings.compile and not job.attack.hooks and not plain and not draws:
                    model, why = compiled(model, image)
                    if why and not self._told_why:
                        log.warning(f"torch.compile failed, going on without: {why}")
                        self._told_why = True
                return model

        name = job.source_name if not job.pooled else work.parts[0].target.name
        return AttackedModel(name, job.source, copied, self.settings.precision, draws)

    def _pooled(self, work: _Crafting, source: AttackedModel) -> None:
        """All restarts, each on what still stands in some draw; a row says whether any succeeded, and which was the
        first, or of several draws the one that is survived in the fewest."""
        samples, eps = work.pairs
        job, target, draws = work.job, work.parts[0].target, work.parts[0].cell.draws
        judge, labels = self._judge_of(target), self._labels(samples)
        count, judged = len(samples), (target.n if job.members_too else 0) + 1
        verdict = Predictions.empty(judged, count)
        restart_of = np.zeros((judged, count), dtype=np.int16)
        part_of = np.full(count, "", dtype=object)
        distance, flat = np.zeros((judged, count), dtype=np.float32), np.zeros((judged, count), dtype=bool)
        alive = np.arange(count)
        for restart in job.restarts:
            for chunk, crafted in self._adversarial(work, source, alive, restart):
                found = predict(
                    judge, crafted.images, labels[chunk],
                    members=job.members_too, draws=draws, samples=self._keys(target, samples[chunk]),
                )  # fmt: skip
                update = verdict.correct[:, chunk] | (found.expected < verdict.expected[:, chunk])
                for mine, theirs in zip(verdict.arrays(), found.arrays(), strict=True):
                    mine[:, chunk] = np.where(update, theirs, mine[:, chunk])
                restart_of[:, chunk] = np.where(update, restart, restart_of[:, chunk])
                part_of[chunk] = np.where(update[-1] & ~found.correct[-1], _parts(job.attack, crafted), part_of[chunk])
                distance[:, chunk] = np.where(update, crafted.linf.cpu().numpy(), distance[:, chunk])
                flat[:, chunk] = np.where(update, crafted.zero_gradient.cpu().numpy(), flat[:, chunk])
                self._advance(len(chunk), work)
            fallen = alive[(verdict.expected[:, alive] == 0).all(axis=0)]
            left = len(job.restarts) - 1 - job.restarts.index(restart)
            self._advance(len(fallen) * left, work)
            alive = alive[(verdict.expected[:, alive] > 0).any(axis=0)]
            if not len(alive):
                break
        frames = []
        for part in work.parts:
            at = np.flatnonzero((eps == part.cell.eps) & np.isin(samples, part.samples))
            if len(at):
                rest = distance[:, at], flat[:, at], restart_of[:, at], part_of[at]
                frames.append(_rows(part.cell, samples[at], labels[at], verdict.at(at), *rest))
        self._kept_of(work.parts[0]).append(pd.concat(frames, ignore_index=True))

    def _version(self, work: _Crafting, source: AttackedModel) -> None:
        """One version of every image, judged by all targets that lack it."""
        samples, eps = work.pairs
        (restart,) = work.job.restarts
        made: dict[Rows, list[pd.DataFrame]] = {}
        targets = {part.target.name: part.target for part in work.parts}
        for chunk, crafted in self._adversarial(work, source, np.arange(len(samples)), restart):
            for name, target in targets.items():
                parts = [part for part in work.parts if part.target.name == name]
                order = np.concatenate(
                    [
                        np.flatnonzero((eps[chunk] == part.cell.eps) & np.isin(samples[chunk], part.samples))
                        for part in parts
                    ]
                )
                if not len(order):
                    continue
                at = torch.from_numpy(order).to(crafted.images.device)
                judged, radii = samples[chunk][order], eps[chunk][order]
                labels = self._labels(judged)
                judge, draws = self._judge_of(target), parts[0].cell.draws
                verdict = predict(judge, crafted.images[at], labels, draws=draws, samples=self._keys(target, judged))
                distance, flat = crafted.linf[at].cpu().numpy(), crafted.zero_gradient[at].cpu().numpy()
                for part in parts:
                    own = np.flatnonzero(radii == part.cell.eps)
                    found = verdict.at(own), distance[own], flat[own], restart
                    made.setdefault(self._kept_of(part), []).append(_rows(part.cell, judged[own], labels[own], *found))
            self._advance(len(chunk), work)
        for rows, frames in made.items():
            rows.append(pd.concat(frames, ignore_index=True))

    def _adversarial(
        self, work: _Crafting, source: AttackedModel, chosen: Indices, restart: int
    ) -> Iterator[tuple[Indices, Crafted]]:
        """Adversarial images of ``chosen`` positions in ``work.pairs``, batch by batch: (positions, crafted). Those of
        surrogates, which other targets meet too, are taken from the cache where it has them, and else kept there."""
        samples, eps = work.pairs
        attack, cache = work.job.attack, None if work.job.pooled else self._images
        if cache is not None:
            for radius, cell in work.cells.items():
                kept = chosen[(eps[chosen] == radius) & np.isin(samples[chosen], list(cache.kept(cell.attacked)))]
                for at in _chunks(len(kept), self._images_per_pass(attack, len(kept))):
                    own = samples[kept[at]]
                    yield kept[at], cache.load(cell.attacked, own, self._batch_of(own))
                chosen = np.setdiff1d(chosen, kept)
        start = 0
        while start < len(chosen):
            chunk = chosen[start : start + self._images_per_pass(attack, len(chosen) - start)]
            try:
                images, labels = self._batch_of(samples[chunk]), self._labels(samples[chunk])
                crafted = craft(
                    source.model, attack, images, labels, samples[chunk], eps[chunk],
                    seed=self.settings.seed, restart=restart, draws=work.draws,
                )  # fmt: skip
                same = source.proves(attack, crafted, torch.from_numpy(labels).to(images.device))
            except RuntimeError as error:
                self._halve(attack, len(chunk), error)
                continue
            if not same:  # once more, on a plain copy
                continue
            if cache is not None:
                cache.save(work.cells, samples[chunk], eps[chunk], crafted)
            yield chunk, crafted
            start += len(chunk)

    def _halve(self, attack: Attack, images: int, error: RuntimeError) -> None:
        """Halves batches from now on, as memory ran out with so many ``images``; raises where that is not what
        happened, or no way out."""
        if not out_of_memory(error) or images == 1:
            raise error
        if attack.batch_dependent:
            raise RobenchError(
                f"out of memory with {images} images, and of attack {attack.label!r} an image depends on its batch: "
                f"choose a smaller --batch-size"
            ) from error
        self._batch = max(1, images // 2)
        log.warning(f"out of memory with {images} images: going on with {self._batch}")

    def _images_per_pass(self, attack: Attack, count: int) -> int:
        """As many as are allowed, but no small rest of ``count``, which would take longer by the image."""
        if attack.batch_dependent:  # its rows depend on it, and their key holds it
            return self.settings.batch_size or USUAL
        most = fitting_batch(self.settings.device, self._numbers, self._batch)
        passes = max(1, -(-count // most))
        return max(1, -(-count // passes))

    def _fitting(self) -> int:
        """Images per pass before memory ran out: the same in every process with the same settings."""
        return fitting_batch(self.settings.device, self._numbers, self.settings.batch_size)

    @property
    def _numbers(self) -> int:
        """Elements of an image."""
        return self.data.test.images[0].numel()

    def _judge_of(self, target: EvaluatedModel) -> Ensemble:
        """The original weights, in the dtype of verdicts."""
        if self.settings.precision != "float64":
            return target.ensemble
        if target.name not in self._doubles:
            self._doubles[target.name] = copy.deepcopy(target.ensemble).double()
        return self._doubles[target.name]

    def _batch_of(self, samples: Indices) -> Tensor:
        return _images(self.data, samples, self.settings.device, crafting_dtype(self.settings.precision))

    def _labels(self, samples: Indices) -> Indices:
        return np.asarray(self.data.test.labels.numpy()[samples], dtype=np.int64)

    def _advance(self, images: int, work: _Crafting) -> None:
        """So many images of a restart are done."""
        self._done += images * work.passes() / (len(work.pairs[0]) * len(work.job.restarts))
        source = work.job.source_name or work.parts[0].target.name
        self._progress(round(self._done), round(self._total), f"{work.job.threat}: {work.job.attack.label} on {source}")


def _over_draws(check: Finding, model: EvaluatedModel, threat: Threat) -> Finding:
    """What is to be known of the draws of ``model`` in place of `REPEAT`'s failure, where several are asked for; any
    other check as it is.

    Raises:
        RobenchError: an attack on it whose gradients are no means over draws.
    """
    if check.name != REPEAT or check.status != "fail":
        return check
    attacked = model in (surrogates_of(threat) or (model,))
    if others := [attack.label for attack in threat.attacks if attacked and not attack.over_draws]:
        raise RobenchError(
            f"{model.name} draws at inference, and `draws` does not reach attack {others[0]!r}, which takes gradients "
            f"of its own; omit it, or choose one of robench's, such as pgd"
        )
    drawn = "its gradients are means over, and its verdicts over" if attacked else "its verdicts are over"
    return Finding(REPEAT, "pass", f"{model.name} draws at inference: {drawn} {threat.draws} draws")


def _refuse_to_follow(model: EvaluatedModel, threat: Threat) -> None:
    """RobenchError where an attack of ``threat`` follows gradients and ``model``, which it attacks, gives none."""
    if followers := [attack.label for attack in threat.attacks if not attack.gradient_free]:
        judged = (
            "choose another surrogate"
            if surrogates_of(threat)
            else (
                "judge it on what surrogates give (--threat blackbox), by queries (--threat queries), or with "
                "--attacks square"
            )
        )
        raise RobenchError(
            f"attack {followers[0]!r} of threat {threat.name!r} follows gradients, and {model.name} gives none: its "
            f"outputs do not depend differentiably on its input, as of a vote or of remote predictions; {judged}. If "
            f"it should have gradients, remove `no_grad`, `detach` and argmax from its forward pass"
        )


def _rows(
    cell: Cell,
    samples: Indices,
    labels: Indices,
    verdict: Predictions,
    distance: npt.NDArray[Any],
    flat: npt.NDArray[Any],
    restart: Any,
    part: Any = "",
) -> pd.DataFrame:
    """Rows of each judge; ``part`` is what took the images of the last, which is the ensemble."""
    judges, count = verdict.correct.shape
    members = [*(str(i) for i in range(1, judges)), ENSEMBLE]
    shape = (judges, count)
    return pd.DataFrame(
        {
            "cell": cell.key,
            "sample": np.tile(samples, judges).astype(np.int32),
            "member": np.repeat(members, count),
            "restart": np.broadcast_to(restart, shape).ravel().astype(np.int16),
            "label": np.tile(labels, judges).astype(np.int16),
            "prediction": verdict.prediction.ravel(),
            "correct": verdict.correct.ravel(),
            "margin": verdict.margin.ravel(),
            "linf": np.broadcast_to(distance, shape).ravel().astype(np.float32),
            "zero_gradient": np.broadcast_to(flat, shape).ravel().astype(bool),
            "part": pd.Series([""] * (judges - 1) * count + np.broadcast_to(part, count).tolist(), dtype="str"),
            "expected": verdict.expected.ravel(),
            "draws": np.full(judges * count, max(cell.draws, 1), dtype=np.int16),
        }
    )


def _parts(attack: Attack, crafted: Crafted) -> npt.NDArray[np.object_]:
    """The name of the part that took each image, (B,); empty where there is none."""
    names = [f"{part.label} {part.loss}" for part in attack.parts(crafted.outputs.shape[1])]
    if not names:  # and nothing is asked of the device
        return np.full(len(crafted.part), "", dtype=object)
    found: npt.NDArray[np.object_] = np.array([*names, ""], dtype=object)[crafted.part.cpu().numpy()]
    return found


def _images(data: Data, samples: Indices, device: torch.device, dtype: torch.dtype) -> Tensor:
    pixels = data.test.images[torch.from_numpy(samples)].to(device)
    return pixels.to(dtype) / 255


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
