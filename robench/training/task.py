"""What one training is, before it exists: names and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.files import checked_name, content_key
from robench.core.models import MODELS, ModelSpec
from robench.core.registry import UNDEFENDED
from robench.core.rules import USUAL, Rule, checked
from robench.defenses import Defense
from robench.store.runs import Role
from robench.training.recipes import Recipe, recipe_file


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training, fully resolved: the same task gives the same weights.

    Attributes:
        init: ``scratch``, or the name of the run that the weights start from, or ``baseline``: the Baseline of the
            same data, models, size, seed and role, which `start` describes.
        start: the task of that Baseline.
        rule: how the ensemble decides.
    """

    data: str
    data_label: str
    defense: Defense
    n: int
    seed: int
    role: Role
    members: tuple[ModelSpec, ...]
    recipe: Recipe
    init: str
    start: Task | None
    given_name: str | None = None
    customised: bool = False
    rule: Rule = USUAL

    def manifest(self) -> dict[str, Any]:
        """Everything that determines the weights."""
        return {
            "data": self.data,
            "defense": self.defense.manifest(),
            "n": self.n,
            "seed": self.seed,
            "role": self.role,
            "members": [spec.manifest() for spec in self.members],
            "recipe": self.recipe.model_dump(mode="json"),
            "init": self.init,
            "start": self.start.key if self.start else None,
            **({} if self.rule == USUAL else {"rule": self.rule}),
        }

    @cached_property
    def key(self) -> str:
        return content_key(self.manifest())

    @property
    def epochs(self) -> int:
        """Of the whole training: those of the recipe that are made, for each member where these are trained in turn."""
        return self.recipe.trained * (self.n if self.defense.in_turn else 1)

    @property
    def count(self) -> int:
        """Members of the run: the task's, or their snapshots."""
        return self.n * (self.recipe.trained * self.recipe.snapshots or 1)

    @property
    def name(self) -> str:
        """The given name, or one that says what it is; with a part of the key where anything is not the default."""
        if self.given_name:
            return self.given_name
        models = list(dict.fromkeys(spec.name.replace("/", ".").replace(":", ".") for spec in self.members))
        parts = [self.data_label, "+".join(models).replace("+", "_"), self.defense.name, f"n{self.n}", f"s{self.seed}"]
        if self.role == "surrogate":
            parts.append("surrogate")
        if self.customised:
            parts.append(self.key[:6])
        return checked_name("-".join(parts))


def resolve(
    data: Data,
    defense: str,
    n: int,
    *,
    seed: int = 0,
    role: Role = "target",
    models: Sequence[str] = (),
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    init: str | None = None,
    name: str | None = None,
    rule: str | None = None,
) -> Task:
    """The task that a user's words mean.

    Args:
        models: registered names; one for all members, or one each. The recipe's by default.
        recipe: name of a recipe file; the data set's by default.
        overrides: fields of the recipe or the defense.
        init: ``scratch``, ``baseline`` or the name of a run; the defense's own start by default.
        rule: how the ensemble decides; by default as the defense's authors do.

    Raises:
        RobenchError: whatever cannot be trained.
    """
    _check(data, n, seed)
    file = recipe_file(recipe or data.recipe)
    settings, loss = file.resolve(defense, n, overrides or {})
    loss.check(members=n, classes=data.num_classes)
    _check_snapshots(data, settings)
    members = _members(data, list(models) or [file.model], n, settings.negative_slope)
    chosen = init or loss.start
    start = None
    if chosen == UNDEFENDED:
        start = resolve(data, UNDEFENDED, n, seed=seed, role=role, models=models, recipe=recipe)
        if settings.negative_slope:
            start = replace(start, members=members, customised=True)
        if name == start.name:
            raise RobenchError(f"{name!r} is the Baseline that {defense!r} starts from; choose another --name")
    return Task(
        data=data.identity,
        data_label=data.label,
        defense=loss,
        n=n,
        seed=seed,
        role=role,
        members=members,
        recipe=settings,
        init=chosen,
        start=start,
        given_name=checked_name(name) if name else None,
        rule=loss.rule if rule is None else checked(rule),
        # A field that is set to what it is anyway makes no other training.
        customised=(bool(overrides) and (settings, loss) != file.resolve(defense, n, {}))
        or bool(recipe)
        or rule not in (None, loss.rule)
        or (bool(init) and init != loss.start),
    )


def _check(data: Data, n: int, seed: int) -> None:
    for what, value, least in (("n", n, 1), ("seed", seed, 0)):
        if value < least:
            raise RobenchError(f"expected `{what}` to be at least {least}, got {value}")
    if not len(data.train):
        raise RobenchError(f"{data.label} has no images to train on; train on the clean ones, and judge on these")


def _check_snapshots(data: Data, settings: Recipe) -> None:
    steps = len(data.train) // settings.batch_size
    if settings.snapshots > max(steps, 1):
        raise RobenchError(
            f"`snapshots` of the recipe, {settings.snapshots}, is more than the {steps} steps of an epoch; choose "
            f"fewer, or a smaller batch_size"
        )


def _members(data: Data, names: list[str], n: int, negative_slope: float) -> tuple[ModelSpec, ...]:
    """The architecture of each member."""
    if len(names) not in (1, n):
        raise RobenchError(f"expected one model, or one for each of the {n} members, got {len(names)}")
    for each in names:
        if ":" not in each:
            MODELS.get(each)
    return tuple(replace(data.model(each), negative_slope=negative_slope) for each in names * (n // len(names)))
