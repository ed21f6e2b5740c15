"""Recipes: a data set's constants, as validated data."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from robench.core.errors import RobenchError, unknown
from robench.core.plugins import construct, explained
from robench.defenses import DEFENSES, Defense


class _Table(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recipe(_Table):
    """How to train: everything but the loss. Frozen; unknown keys are errors.

    Attributes:
        schedule: of the learning rate: ``steps`` multiplies it by ``gamma`` at ``milestones``, fractions of all epochs;
            ``cosine`` lets it fall to 0 along half a cosine, at every step (Loshchilov & Hutter 2017, eq. 5, without
            restarts, https://arxiv.org/abs/1608.03983).
        warmup: fraction of all epochs in which the rate rises linearly from 0.
        pad: random crop after zero-padding by this many pixels; flip: random horizontal flip.
        noise: standard deviation of Gaussian noise that is added to a batch with ``noise_probability``, not clamped.
        negative_slope: of every activation; 0 is ReLU.
        stop_after: epochs after which training ends, before its schedule does; 0 is none. Surrogates that are stopped
            early transfer better (Zhang et al. 2024, §4, https://arxiv.org/abs/2304.02688).
        snapshots: of an epoch: members are kept so often, evenly, and the run's members are these, the earliest first,
            instead of the last weights; 0 is none. With a constant rate, from trained weights, these are LGV (Gubri et
            al. 2022, algorithm 1, https://arxiv.org/abs/2207.13129): 10 epochs at .05, 4 of each.
        precision: of the passes through the network, in training and in crafting for it (autocast); weights, gradients,
            the optimiser and BatchNorm's statistics stay float32.
    """

    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(ge=2)
    optimizer: Literal["sgd", "adam"]
    lr: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["steps", "cosine"] = "steps"
    warmup: float = Field(0.0, ge=0, lt=1)
    milestones: tuple[float, ...] = ()
    gamma: float = Field(0.1, gt=0)
    pad: int = Field(0, ge=0)
    flip: bool = False
    noise: float = Field(0.0, ge=0)
    noise_probability: float = Field(1.0, ge=0, le=1)
    negative_slope: float = Field(0.0, ge=0, lt=1)
    stop_after: int = Field(0, ge=0)
    snapshots: int = Field(0, ge=0, le=1000)
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_serializer(mode="wrap")
    def _dumped(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        # Runs that were trained before there was a choice keep their keys.
        for name in ("precision", "schedule", "warmup", "stop_after", "snapshots"):
            if values[name] == Recipe.model_fields[name].default:
                del values[name]
        return values

    @property
    def trained(self) -> int:
        """Epochs that are made."""
        return self.stop_after or self.epochs

    def snapshot_after(self, step: int, steps: int) -> bool:
        """Whether members are kept after ``step`` (from 1) of the ``steps`` of an epoch, of which the last is one."""
        return self.snapshots > 0 and step * self.snapshots // steps > (step - 1) * self.snapshots // steps

    def rate(self, position: float) -> float:
        """The learning rate at ``position``, in epochs from 0, in which 1.5 is the middle of the second epoch."""
        warm = self.warmup * self.epochs
        if position < warm:
            return self.lr * position / warm
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (position - warm) / (self.epochs - warm))) / 2
        return float(self.lr * self.gamma ** sum(position >= round(part * self.epochs) for part in self.milestones))


class _Size(_Table):
    up_to: int
    fields: dict[str, Any]


class _ForDefense(_Table):
    train: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    sizes: tuple[_Size, ...] = ()


class UsualRadii(_Table):
    """A data set's radii: of the curves, of the transferability matrix, and of the diversity (eq. 2)."""

    eps: tuple[float, ...]
    transfer_eps: tuple[float, ...]
    diversity_eps: float

    def radii(self, threat: str) -> tuple[float, ...]:
        """Those of ``threat`` where nobody names any; the threats of growing effort are at the smallest."""
        special = {"transfer": self.transfer_eps, "diversity": (self.diversity_eps,), "convergence": self.eps[:1]}
        special["queries"] = special["convergence"]
        return special.get(threat, self.eps)


class RecipeFile(_Table):
    """One file of `robench/recipes`."""

    model: str
    train: dict[str, Any]
    evaluation: UsualRadii
    defenses: dict[str, _ForDefense] = {}

    def resolve(self, defense: str, n: int, overrides: Mapping[str, Any]) -> tuple[Recipe, Defense]:
        """The recipe and the defense, after the file's own values for this defense and size and the user's.

        Args:
            overrides: by name, of fields of the recipe or of the defense; strings are converted.

        Raises:
            RobenchError: unknown defense, unknown name, or a value out of range.
        """
        cls = DEFENSES.get(defense)
        special = self.defenses.get(defense, _ForDefense())
        values = dict(special.fields)
        for size in sorted(special.sizes, key=lambda size: -size.up_to):
            if n <= size.up_to:
                values.update(size.fields)
        train = {**self.train, **special.train}
        own = {field.name for field in fields(cls)}
        for name, value in overrides.items():
            # A defense's field wins over a recipe's of the same name: it is the nearer one.
            if name in own:
                values[name] = value
            elif name in Recipe.model_fields:
                train[name] = value
            else:
                raise unknown(f"setting of defense {defense!r}", name, own | Recipe.model_fields.keys())
        try:
            recipe = Recipe.model_validate(train)
        except ValidationError as error:
            raise explained(error, "the recipe", Recipe) from error
        if recipe.stop_after > recipe.epochs:
            raise RobenchError(
                f"expected `stop_after` of the recipe to be at most its {recipe.epochs} epochs, got "
                f"{recipe.stop_after}; raise `epochs`, of which the schedule is"
            )
        for name in ("stop_after", "snapshots"):
            if cls.in_turn and getattr(recipe, name):
                raise RobenchError(
                    f"`{name}` of the recipe is not for defense {defense!r}, whose members are trained one after the "
                    f"other; omit it, or choose a defense that trains them together, such as baseline"
                )
        without_effect = {
            "momentum": recipe.optimizer == "adam" and "optimizer 'adam'",
            "adam_eps": recipe.optimizer == "sgd" and "optimizer 'sgd'",
            "noise_probability": recipe.noise == 0 and "`noise` 0",
            "milestones": recipe.schedule == "cosine" and "schedule 'cosine'",
            "gamma": recipe.schedule == "cosine" and "schedule 'cosine'",
        }
        for name, reason in without_effect.items():
            if reason and name in overrides and name not in own:
                raise RobenchError(f"`{name}` of the recipe has no effect with {reason}; omit it")
        return recipe, construct(cls, values, f"defense {defense!r}")


def names() -> list[str]:
    """The files of `robench/recipes`, sorted."""
    entries = (entry.name for entry in files("robench.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))


@cache
def recipe_file(name: str) -> RecipeFile:
    """A file of `robench/recipes`, by name, or one's own by its path, which ends in ``.toml``.

    Raises:
        RobenchError: there is none, or it is no recipe.
    """
    if name.endswith(".toml"):
        return _own(Path(name))
    if name not in names():
        raise unknown("recipe", name, names())
    text = files("robench.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return RecipeFile.model_validate(tomllib.loads(text))


def _own(path: Path) -> RecipeFile:
    """A recipe file of the user's."""
    try:
        return RecipeFile.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise RobenchError(f"recipe {path} cannot be read ({error.strerror}); name a file, or a recipe") from error
    except ValidationError as error:
        raise explained(error, f"recipe {path}, which begins best with a copy of generic.toml", RecipeFile) from error
    except ValueError as error:  # of TOML, or of its letters
        raise RobenchError(f"recipe {path} is no TOML ({error}); robench/recipes/*.toml are examples") from error
