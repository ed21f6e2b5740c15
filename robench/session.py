"""Runs in, outcomes out: threats on trained runs, surrogates made where they are missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from robench.api import chosen_samples
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.models import build
from robench.core.progress import Progress, bar, duration, silent
from robench.core.threads import fitting_threads
from robench.evaluation import cost
from robench.evaluation.cells import Cell
from robench.evaluation.cost import Forecast
from robench.evaluation.craft import attack_of
from robench.evaluation.diversity import GROUP, measure
from robench.evaluation.engine import Evaluator, correct_for_all
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.fingerprint import Recognised, judged_identity, recognise
from robench.evaluation.images import Images
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.rows import FolderRows
from robench.evaluation.schema import DIVERSITY_STEPS, SAMPLES
from robench.evaluation.settings import Settings
from robench.evaluation.threats import BLACKBOX, Blackbox, Job, Threat, Transfer, Whitebox, surrogates_of
from robench.store.runs import Run, Runs
from robench.training.loop import ensure
from robench.training.task import Task, resolve
from robench.validity.probe import attack_again

log = logging.getLogger(__name__)

#: Folders of a run that hold its rows, those that serve checks alone, and its diversity; folder of all runs that holds
#: the adversarial images.
OUTCOMES = "outcomes"
ASIDE = "checked"
DIVERSITY = "diversity"
CRAFTED = ".crafted"

#: Bytes of adversarial images beyond which their size is said before they are made.
LARGE = 100_000_000

Bar = Callable[[], AbstractContextManager[Progress]]


def training_passes(task: Task, data: Data) -> float:
    """Passes of a training on ``data``, without the Baseline that it starts from."""
    return cost.training(task.defense, task.n, len(data.train), task.epochs, task.recipe.batch_size)


@dataclass
class Session:
    """A store of runs, a data set, and how to compute.

    Attributes:
        bar: makes a progress bar for one job; by default in notebooks alone.
        confirm: asks whether to go on with what takes long; False ends the job.
    """

    store: Runs
    data: Data
    settings: Settings
    samples: int = SAMPLES
    subset: str = "auto"
    bar: Bar = lambda: bar(terminal=False)
    confirm: Callable[[str], bool] = lambda question: True
    _loaded: dict[str, EvaluatedModel] = field(default_factory=dict)
    _recognised: dict[str, Recognised] = field(default_factory=dict)

    def load(self, run: Run) -> EvaluatedModel:
        """A run, loaded once, on the device, with the identity of the function that it is now; a change since it was
        judged is told. RobenchError where it does not fit the data."""
        if run.name not in self._loaded:
            for spec in run.specs:
                if (spec.num_classes, spec.in_channels) != (
                    self.data.num_classes,
                    self.data.test.images.shape[1],
                ):
                    raise RobenchError(
                        f"run {run.name!r} takes {spec.in_channels} channels and has {spec.num_classes} classes, "
                        f"{self.data.label} has {self.data.test.images.shape[1]} and {self.data.num_classes}; "
                        f"choose another --dataset"
                    )
            model = EvaluatedModel.of_run(run, self.settings.device)
            found = recognise(run, model.ensemble, self.data.test.images.shape[1:], self.settings.device)
            if found.changed:
                log.info(
                    f"run {run.name!r} is another function than the one that was judged: for the same images its "
                    f"outputs differ by {found.changed:.1%} of their scale, so its code, a library or the precision of "
                    f"its weights has changed; it is judged anew"
                )
            self._recognised[run.name] = found
            self._loaded[run.name] = replace(model, identity=found.identity)
        return self._loaded[run.name]

    def whitebox(self, runs: Sequence[Run], **options: Any) -> Outcomes:
        return self.judge(runs, Whitebox(**options))

    def transfer(self, runs: Sequence[Run], **options: Any) -> Outcomes:
        return self.judge(runs, Transfer(**options))

    def blackbox(
        self, runs: Sequence[Run], surrogates: Sequence[Run], *, cache: bool = True, part: bool = False, **options: Any
    ) -> Outcomes:
        return self.judge(runs, self.hold_out(surrogates, **options), cache=cache, part=part)

    def diversity(self, runs: Sequence[Run], *, eps: float, steps: int = DIVERSITY_STEPS) -> pd.DataFrame:
        """`robench.evaluation.diversity.measure` of every run, on the images that all its members get right."""
        device, seed = self.settings.device, self.settings.seed
        order = self.data.order(self.data.resolved(self.subset, self.samples), seed)
        frames = []
        for target in map(self.load, runs):
            right = correct_for_all(target, self.data, order, self.samples, device, self.settings.batch_size)
            folder = self.store.folder(target.name) / DIVERSITY
            with self.bar() as progress, fitting_threads(device, GROUP * self.data.numel):
                frames.append(
                    measure(
                        target, self.data, right, folder,
                        eps=eps, steps=steps, seed=seed, device=device, progress=progress,
                    )
                )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def hold_out(self, surrogates: Sequence[Run], *, missing: Sequence[Task] = (), **options: Any) -> Blackbox:
        """The black-box threat from these runs; for a forecast, untrained networks stand for those that are missing."""
        stand_ins = []
        for task in missing:
            members = [build(spec, number) for number, spec in enumerate(task.members)]
            made = EvaluatedModel.of_model(
                members, self.settings.device, name=task.name, defense=task.defense.name, seed=task.seed
            )
            stand_ins.append(replace(made, trained=False))
        return Blackbox(surrogates=(*map(self.load, surrogates), *stand_ins), **options)

    def job(self, target: EvaluatedModel, cell: Cell) -> Job:
        """The crafting behind an attacked cell of ``target``, on the target, one of its members, or a surrogate.

        Raises:
            RobenchError: the attack has changed, or the surrogate is not among the runs any more.
        """
        attack, source, restarts = attack_of(cell), cell.attacked.source, cell.attacked.restarts
        draws = max(cell.draws, cell.attacked.draws, 1)
        # A target may be its own surrogate, where that was allowed.
        if source == target.identity and cell.threat not in BLACKBOX:
            return Job.on_target(cell.threat, target, attack, restarts, draws)
        identity, slash, number = source.partition("/")
        if slash and identity == target.identity and number.isdigit() and 1 <= int(number) <= target.n:
            return Job.on_member(cell.threat, target, int(number), attack, restarts, draws)
        for run in self.store.all():
            if judged_identity(run) == source:
                return Job.on_surrogate(cell.threat, self.load(run), attack, restarts, draws)
        raise RobenchError(
            f"surrogate {cell.surrogate!r} is not among the runs in {self.store.root}, or has other weights than were "
            f"attacked"
        )

    def surrogate_tasks(self, sizes: Iterable[int], defense: str, **options: Any) -> list[Task]:
        """Hold-out ensembles: the same recipe, in the role of a surrogate, so that every draw differs."""
        return [resolve(self.data, defense, n, role="surrogate", **options) for n in sizes]

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of ``tasks`` that have no run, each behind the Baseline that it starts from."""
        found: dict[str, Task] = {}
        for task in tasks:
            if task.name not in self.store.names():
                found.update((each.name, each) for each in self.missing([task.start] if task.start else ()))
                found[task.name] = task
        return list(found.values())

    def trainings(self, tasks: Iterable[Task]) -> list[Forecast]:
        """What training the `missing` ones of ``tasks`` takes."""
        found, paces = [], {}
        shape, device = self.data.train.images.shape[1:], self.settings.device
        for task in self.missing(tasks):
            kind = task.members, task.recipe.batch_size, task.recipe.precision
            if kind not in paces:
                paces[kind] = cost.training_pace(task.members, shape, device, *kind[1:])
            passes = training_passes(task, self.data)
            found.append(
                Forecast(f"train {task.name}", passes, cost.weights(task.members), seconds=passes * paces[kind])
            )
        return found

    def train(
        self,
        tasks: Sequence[Task],
        *,
        allowed: bool = True,
        ask_beyond: float | None = None,
    ) -> list[Run]:
        """The runs of ``tasks``, trained where they are missing.

        Args:
            allowed: False makes a missing run an error.
            ask_beyond: estimated seconds beyond which `confirm` is asked.
        """
        missing = [task for task in tasks if task.name not in self.store.names()]
        if missing and not allowed:
            raise RobenchError(
                f"run {missing[0].name!r} is missing; train it, or leave --no-train away: "
                f"robench train {missing[0].defense.name} --n {missing[0].n} --role {missing[0].role}"
            )
        if missing and ask_beyond is not None:
            estimate = sum(part.seconds for part in self.trainings(missing))
            log.info(f"training {', '.join(task.name for task in missing)}: about {duration(estimate)}")
            if estimate > ask_beyond and not self.confirm(f"That is about {duration(estimate)}. Train them?"):
                raise RobenchError(
                    f"surrogates are missing and would take about {duration(estimate)}; "
                    f"pass --yes, or name other runs with --surrogates"
                )
        finished = []
        for task in tasks:
            with self.bar() as progress:
                finished.append(ensure(task, self.data, self.store, device=self.settings.device, progress=progress))
        return finished

    def judge(
        self, runs: Sequence[Run], threat: Threat, *, cache: bool = True, probe: bool = True, part: bool = False
    ) -> Outcomes:
        """Rows of ``runs`` under ``threat``; what is there already is not computed again.

        Args:
            cache: keep the adversarial images of surrogates, for other targets.
            probe: attack a few survivors of a white-box threat otherwise.
            part: see `robench.evaluation.evaluations.Evaluation`.
        """
        with self.bar() as progress:
            evaluator, targets, samples = self._prepared(runs, threat, cache, progress)
            if cache and isinstance(threat, Blackbox):
                size = sum(part.disk for part in evaluator.forecast(targets, threat, samples, timed=False))
                if size > LARGE:
                    log.info(f"adversarial images: up to {size / 1e9:.1f} GB in {self.store.root / CRAFTED}")
            for model in (*targets, *surrogates_of(threat)):
                if model.name in self._recognised:
                    self._recognised[model.name].keep()
            outcomes = evaluator.run(targets, threat, samples, part=part)
            return attack_again(evaluator, targets, threat, outcomes) if probe else outcomes

    def forecast(
        self, runs: Sequence[Run], threat: Threat, *, cache: bool = True, probe: bool = True
    ) -> list[Forecast]:
        """What `judge` would do; writes nothing."""
        evaluator, targets, samples = self._prepared(runs, threat, cache, silent, repair=False)
        return evaluator.forecast(targets, threat, samples, again=probe)

    def _prepared(
        self, runs: Sequence[Run], threat: Threat, cache: bool, progress: Progress, *, repair: bool = True
    ) -> tuple[Evaluator, list[EvaluatedModel], Any]:
        if not runs:
            raise RobenchError("there is no run to judge; robench train or robench import makes one")
        small = [run.name for run in runs if run.n < 2]
        if small and isinstance(threat, Transfer):
            raise RobenchError(f"threat 'transfer' is among members, and {small[0]!r} has one; leave it out")
        targets = [self.load(run) for run in runs]
        evaluator = Evaluator(
            self.data,
            self.settings,
            rows=lambda model: FolderRows(self.store.folder(model.name) / OUTCOMES, repair=repair),
            aside=lambda model: FolderRows(self.store.folder(model.name) / ASIDE, repair=repair),
            images=Images(self.store.root / CRAFTED) if cache and isinstance(threat, Blackbox) else None,
            claims=self.store.claims(),
            progress=progress,
        )
        return evaluator, targets, chosen_samples(self.data, threat, self.samples, self.subset, self.settings)


def rows_of(run: Run) -> FolderRows:
    """The rows of a run, to read."""
    return FolderRows(run.folder / OUTCOMES, repair=False)


def stored(runs: Sequence[Run], only: Collection[str] | None = None) -> Outcomes:
    """The rows of all complete evaluations of ``runs`` as they are now; changes nothing.

    Args:
        only: keys of evaluations.
    """
    return Outcomes.concat(rows_of(run).outcomes(judged_identity(run), only).called(run.name) for run in runs)
