"""A study, expanded: tasks with what they need, what they cost and in which order they are best done.

Tasks say what `robench train` and `robench eval` would be told: the same keys, rows and folders. Planning loads no
official data set and no weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import Any, Literal

import torch

from robench.core.data import DATASETS, Data, outline
from robench.core.errors import RobenchError, unknown
from robench.core.files import content_key
from robench.core.models import MODELS, ModelSpec, build
from robench.core.registry import UNDEFENDED
from robench.core.threads import fitting_threads
from robench.evaluation import cost, words
from robench.evaluation.threats import versions
from robench.session import training_passes
from robench.store.runs import Role
from robench.studies.study import (
    Axis,
    BlackboxOwnTable,
    BlackboxTable,
    DiversityTable,
    Fields,
    Study,
    ThreatTable,
    shipped,
)
from robench.training.recipes import recipe_file
from robench.training.task import Task, resolve

Kind = Literal["train", "combine", "craft", "judge", "report"]


@dataclass(frozen=True)
class Pool:
    """Surrogates of several trainings as one ensemble.

    Attributes:
        name: of its run; parts: the trainings, in the order of the members.
    """

    pool: str
    parts: tuple[Task, ...]

    @property
    def key(self) -> str:
        return content_key(["pool", *(part.key for part in self.parts)])

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.key[:6]}"

    @property
    def members(self) -> tuple[ModelSpec, ...]:
        """The architecture of each."""
        return tuple(spec for part in self.parts for spec in part.members * (part.count // part.n))

    @property
    def count(self) -> int:
        return len(self.members)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One task of a plan.

    Attributes:
        needs: keys of the tasks that are done before.
        passes, disk: at most, and bytes that it leaves, as `robench.evaluation.cost` counts them.
        task: what is trained, or who is judged: under ``threat`` with its ``options``, from ``surrogates``.
        pool: what is combined.
    """

    kind: Kind
    title: str
    key: str
    needs: tuple[str, ...] = ()
    passes: float = 0.0
    disk: int = 0
    task: Task | None = None
    pool: Pool | None = None
    threat: str = ""
    surrogates: tuple[Task | Pool, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    subset: str = "first"

    def seconds(self, pace: cost.Pace) -> float:
        """How long it takes at most, where a pass takes so long."""
        return self.passes * (pace.training if self.kind == "train" else pace.attacking)


@dataclass(frozen=True)
class Plan:
    """A study's tasks.

    Attributes:
        data: as `robench.core.data.outline` gives it.
        steps: by key, each behind those that it needs.
        main: names of the runs in the figures; axes: per ablation, the value of each of its runs.
    """

    name: str
    study: Study
    data: Data
    steps: Mapping[str, Step]
    main: tuple[str, ...]
    axes: Mapping[str, Mapping[str, Any]]


def with_recipe(data: Data, study: Study) -> Data:
    """The study's data set, which trains with the study's recipe."""
    return replace(data, recipe=study.recipe) if study.recipe else data


def expand(name: str, study: Study, data_dir: str = "data") -> Plan:
    """The plan of a study.

    Raises:
        RobenchError: a name that is not registered, or whatever cannot be trained or attacked.
    """
    if ":" not in study.dataset and study.dataset not in DATASETS.names():
        raise RobenchError(f"{name}: dataset: {unknown('dataset', study.dataset, DATASETS.names())}")
    if study.model is not None and ":" in study.model:
        raise RobenchError(f"{name}: model: expected a registered name, got {study.model!r}; robench train takes code")
    builder = _Builder(name, study, with_recipe(outline(study.dataset, data_dir), study))
    with builder.at("recipe"):
        recipe_file(builder.data.recipe)
    with builder.at("model"):
        if study.model is not None:
            MODELS.get(study.model)
    return builder.plan()


class _Builder:
    def __init__(self, name: str, study: Study, data: Data) -> None:
        self.name, self.study, self.data = name, study, data
        self.steps: dict[str, Step] = {}

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Errors within say the file and the key."""
        try:
            yield
        except RobenchError as error:
            raise RobenchError(f"{self.name}: {where}: {error}") from error

    def plan(self) -> Plan:
        study = self.study
        main = [
            self.task(f"defenses.{defense}", defense, n, seed)
            for defense in study.defenses
            for n in study.sizes
            for seed in study.seeds
        ]
        axes = {name: self.axis(name, axis) for name, axis in study.axes.items()}
        self.known("report.like", [study.report.like] if study.report.like else [], shipped())
        if study.track is not None:
            self.known("track.defenses", study.track.defenses or (), study.defenses)
        trained = [self.train(task) for task in main + [task for found in axes.values() for task, _ in found]]
        judged: list[str] = []
        for name, threat in study.threats.given().items():
            self.known(f"threats.{name}.defenses", threat.defenses or (), study.defenses)
            self.known(f"threats.{name}.sizes", threat.sizes or (), study.sizes)
            self.known(f"threats.{name}.seeds", threat.seeds or (), study.seeds)
            targets = [
                task
                for task in main
                if task.defense.name in (threat.defenses or study.defenses)
                and task.n in (threat.sizes or study.sizes)
                and task.seed in (threat.seeds or study.seeds)
            ]
            for axis, found in axes.items():
                targets += [task for task, _ in found if name in study.axes[axis].threats and task not in targets]
            judged += self.judged(name, threat, targets)
        whole = study.model_dump(mode="json", by_alias=True)
        self.add("report", "report", [*judged, whole], needs=tuple(judged or trained))
        values: dict[str, dict[str, Any]] = {}
        for name, found in axes.items():
            several = len({task.n for task, _ in found}) > 1
            for task, value in found:
                values.setdefault(f"{name}_n{task.n}" if several else name, {})[task.name] = value
        return Plan(self.name, study, self.data, self.steps, tuple(task.name for task in main), values)

    def known(self, where: str, names: Iterable[Any], allowed: Collection[Any]) -> None:
        for each in names:
            if each not in allowed:
                raise RobenchError(f"{self.name}: {where}: {unknown('name', str(each), map(str, allowed))}")

    def task(
        self,
        where: str,
        defense: str,
        n: int,
        seed: int = 0,
        *,
        role: Role = "target",
        fields: Fields | None = None,
        models: list[str] | None = None,
    ) -> Task:
        """What is trained; where its settings are the recipe's own, under the plain name."""
        overrides = {**self.study.defenses.get(defense, {}), **(fields or {})}
        init = overrides.pop("init", None)
        if init not in (None, "scratch", UNDEFENDED):
            raise RobenchError(f"{self.name}: {where}: expected `init` to be scratch or {UNDEFENDED}, got {init!r}")
        if models is None:
            models = [self.study.model] if self.study.model else []
        with self.at(where):
            # The recipe is named, as on the command line, so that a training has one name wherever it is asked for.
            same: dict[str, Any] = {"seed": seed, "role": role, "models": models, "recipe": self.study.recipe}
            if role == "target":
                same["rule"] = self.study.rule
            plain = resolve(self.data, defense, n, **same)
            if not overrides and init is None:
                return plain
            made = resolve(self.data, defense, n, **same, overrides=overrides, init=init)
        return plain if plain.key == made.key else made

    def axis(self, name: str, axis: Axis) -> list[tuple[Task, Any]]:
        where = f"axes.{name}"
        self.known(f"{where}.threats", axis.threats, self.study.threats.given())
        return [
            (self.task(where, axis.defense, n, seed, fields={**axis.fields, axis.setting: value}), value)
            for value in axis.values
            for n in axis.sizes or (min(self.study.sizes),)
            for seed in axis.seeds or self.study.seeds[:1]
        ]

    def add(self, kind: Kind, title: str, identity: Any, **about: Any) -> str:
        step = Step(kind=kind, title=title, key=content_key([kind, identity]), **about)
        self.steps.setdefault(step.key, step)
        return step.key

    def surrogate(self, where: str, value: int | str, defense: str) -> Task | Pool:
        """What is meant by a size, or by the name of a pool: of one part that part, under a name that says the pool."""
        if isinstance(value, int):
            return self.task(where, defense, value, role="surrogate")
        parts = []
        for number, part in enumerate(self.study.surrogates[value], 1):
            who = f"surrogates.{value}.{number}", part.defense, part.n, part.seed
            models = [part.model] if part.model else None
            parts.append(self.task(*who, role="surrogate", fields=part.fields, models=models))
        if len(parts) == 1:
            return replace(parts[0], given_name=f"{value}-{parts[0].key[:6]}")
        if len({part.key for part in parts}) < len(parts):
            raise RobenchError(
                f"{self.name}: surrogates.{value}: two parts are the same training; give one another seed, or raise n"
            )
        return Pool(value, tuple(parts))

    def ready(self, made: Task | Pool) -> str:
        """The key of the task after which the run is there."""
        if isinstance(made, Task):
            return self.train(made)
        return self.add(
            "combine", f"combine {made.name}", [made.name, made.key], needs=tuple(map(self.train, made.parts)),
            pool=made, disk=cost.weights(made.members),
        )  # fmt: skip

    def train(self, task: Task) -> str:
        needs = (self.train(task.start),) if task.start else ()
        return self.add(
            "train", f"train {task.name}", [task.name, task.key], needs=needs, task=task,
            passes=training_passes(task, self.data), disk=cost.weights(task.members) * (task.count // task.n),
        )  # fmt: skip

    def judged(self, name: str, threat: ThreatTable | DiversityTable, targets: list[Task]) -> list[str]:
        """Tasks that judge every target, and those that make their adversarial images first."""
        images = min(threat.samples or self.study.samples, len(self.data.test))
        if name in ("transfer", "diversity"):
            targets = [task for task in targets if task.n > 1]
        if isinstance(threat, DiversityTable):
            return [
                self.judge(
                    "judge", name, task, threat, {"eps": threat.eps or self.radii(name)[0], "steps": threat.steps},
                    cost.diversity(task.n, images, threat.steps, len(self.data.test)),
                )
                for task in targets
            ]  # fmt: skip
        family = "blackbox" if isinstance(threat, BlackboxOwnTable) else name
        options = self.options(name, family, threat)
        if not isinstance(threat, BlackboxOwnTable):
            return [
                self.judge(
                    "judge", name, task, threat, options,
                    cost.on_target(
                        name, options["attacks"], options["restarts"], task.n, images, len(options["eps"]),
                        len(self.data.test),
                    ),
                )
                for task in targets
            ]  # fmt: skip
        groups: dict[str, list[Task]] = {}
        for task in targets:
            defense = threat.surrogate_defense if isinstance(threat, BlackboxTable) else task.defense.name
            if isinstance(threat, BlackboxTable) or defense != UNDEFENDED:
                groups.setdefault(defense, []).append(task)
        done = []
        for defense, group in groups.items():
            where = f"threats.{name}.surrogate_defense"
            surrogates = tuple(self.surrogate(where, value, defense) for value in threat.surrogates)
            crafts = self.crafts(name, threat, options, group[0], surrogates, images)
            count = sum(len(versions(attack, options["restarts"])) for attack in options["attacks"]) * len(surrogates)
            seen = images * (1 + len(options["eps"]) * count)
            done += [
                self.judge(
                    "judge", name, task, threat, options, cost.judged(seen * task.n),
                    surrogates=surrogates, needs=crafts,
                )
                for task in group
            ]  # fmt: skip
        return done

    def crafts(
        self,
        name: str,
        threat: ThreatTable,
        options: dict[str, Any],
        target: Task,
        surrogates: tuple[Task | Pool, ...],
        images: int,
    ) -> tuple[str, ...]:
        """Tasks that make adversarial images, each of one attack on one surrogate, which is judged on them too."""
        cells = images * len(options["eps"])
        made = []
        for surrogate in surrogates:
            for attack in options["attacks"]:
                count = len(versions(attack, options["restarts"]))
                passes = cost.attacked(attack, count, surrogate.count, cells, cells * surrogate.count)
                if attack == options["attacks"][0]:
                    passes += cost.judged(images * surrogate.count)  # clean ones
                made.append(
                    self.judge(
                        "craft", name, target, threat, {**options, "attacks": (attack,)}, passes,
                        surrogates=(surrogate,),
                        disk=cost.adversarial(cells * count, self.data.numel, self.study.precision),
                    )
                )  # fmt: skip
        return tuple(made)

    def options(self, name: str, family: str, threat: ThreatTable) -> dict[str, Any]:
        """What `robench.session.Session` is told."""
        with self.at(f"threats.{name}"):
            return words.options(family, threat, self.radii(family))

    def radii(self, threat: str) -> tuple[float, ...]:
        return recipe_file(self.data.recipe).evaluation.radii(threat)

    def judge(
        self,
        kind: Kind,
        name: str,
        target: Task,
        threat: ThreatTable | DiversityTable,
        options: dict[str, Any],
        passes: float,
        *,
        surrogates: tuple[Task | Pool, ...] = (),
        needs: tuple[str, ...] = (),
        disk: int = 0,
    ) -> str:
        samples = threat.samples or self.study.samples
        wanted = (threat.subset if isinstance(threat, ThreatTable) else None) or self.study.subset
        subset = self.data.resolved(wanted, samples)
        attacks = options.get("attacks", ())
        if target.rule != "random":  # at most: whether a network draws is seen when it is judged
            passes *= options.get("draws", 1)
        title = f"{name} of {target.name}"
        if kind == "craft":
            title = f"craft {attacks[0].label} {attacks[0].loss} on {surrogates[0].name}"
        identity = [
            name, target.key, [task.key for task in surrogates], [attack.manifest() for attack in attacks],
            {each: value for each, value in options.items() if each != "attacks"},
            samples, subset, self.study.seed, self.study.precision,
        ]  # fmt: skip
        return self.add(
            kind, title, identity, needs=(*map(self.ready, (target, *surrogates)), *needs), task=target, threat=name,
            surrogates=surrogates, options=options, samples=samples, subset=subset, passes=passes, disk=disk,
        )  # fmt: skip


def pace(plan: Plan, device: torch.device) -> cost.Pace:
    """What a pass takes here: with one thread on a CPU, as each of the tasks has."""
    task = next(step.task for step in plan.steps.values() if step.task)
    recipe, study, shape = task.recipe, plan.study, plan.data.test.images.shape[1:]
    member = build(task.members[0], 0).to(device)
    with fitting_threads(device, 0):
        return cost.Pace(
            cost.training_pace(task.members, shape, device, recipe.batch_size, recipe.precision),
            cost.attacking_pace(member, shape, device, study.batch_size, study.precision),
        )


def ranks(steps: Mapping[str, Step], cost: Callable[[Step], float]) -> dict[str, float]:
    """Per key, the cost of the longest chain of tasks that begins with it (critical path), which is begun first."""
    found: dict[str, float] = {}
    behind = dict.fromkeys(steps, 0.0)  # the longest chain of those that need it
    for key in reversed(list(steps)):
        found[key] = cost(steps[key]) + behind[key]
        for need in behind.keys() & steps[key].needs:
            behind[need] = max(behind[need], found[key])
    return found


def makespan(steps: Mapping[str, Step], cost: Callable[[Step], float], workers: int) -> float:
    """How long ``workers`` take together, each task as soon as one is free, by `ranks`."""
    order = ranks(steps, cost)
    graph = TopologicalSorter({key: steps.keys() & step.needs for key, step in steps.items()})
    graph.prepare()
    ready: list[tuple[float, str]] = []
    running: list[tuple[float, str]] = []
    now = 0.0
    while graph.is_active():
        for key in graph.get_ready():
            heapq.heappush(ready, (-order[key], key))
        while ready and len(running) < workers:
            key = heapq.heappop(ready)[1]
            heapq.heappush(running, (now + cost(steps[key]), key))
        now, done = heapq.heappop(running)
        graph.done(done)
    return now


def bill(steps: Sequence[Step]) -> dict[str, tuple[int, float, int]]:
    """Per kind, or threat of a judgement: how many tasks, their passes and bytes."""
    found: dict[str, tuple[int, float, int]] = {}
    for step in steps:
        name = f"{step.kind} {step.threat}".strip()
        count, passes, disk = found.get(name, (0, 0.0, 0))
        found[name] = count + 1, passes + step.passes, disk + step.disk
    return found
