"""What a number is of: the fields of a cell, its key, and its manifest on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from robench.core.files import Damaged, checked_name, content_key, read_record, write_record

#: Raise it when the meaning of rows changes; cells of the old version are not reused.
ROWS_VERSION = 1


@dataclass(frozen=True)
class Craft:
    """What adversarial images of one ε are made of: the same of two targets are the same images.

    Attributes:
        data: identity of the data set; source: identity of the model whose gradients are followed.
        attack: `Attack.manifest`.
        restarts: of the attack's draws, whose seed is ``seed``.
        batch: images per pass where the attack's images depend on their batch, else None.
        draws: of a source that draws at inference, over how many gradients are means; 0 where it draws nothing.
    """

    data: str
    source: str
    attack: Mapping[str, Any]
    restarts: tuple[int, ...]
    seed: int
    precision: str
    eps: float
    batch: int | None = None
    rows: int = ROWS_VERSION
    draws: int = 0

    def recipe(self) -> dict[str, Any]:
        found = {**asdict(self), "restarts": list(self.restarts)}
        if not self.draws:  # what draws nothing has the key that it had before there was a choice
            del found["draws"]
        # They were bfloat16 too at first: those cells are others.
        return {**found, "logits": "float32"} if self.precision == "bfloat16" else found

    @cached_property
    def key(self) -> str:
        return content_key(self.recipe())

    @cached_property
    def at_any_eps(self) -> str:
        """The same for images that differ in ε alone."""
        return content_key({name: value for name, value in self.recipe().items() if name != "eps"})


@dataclass(frozen=True)
class Cell:
    """What the rows of one target at one ε are of, with its name in the store, ``key``.

    Attributes:
        target, defense, n, seed: of whom is judged; identity: hash of its architecture and weights.
        threat, surrogate, attack, loss, eps: as the columns of `Outcomes.frame` say.
        data: identity of the data set.
        craft: what the images are made of; None for clean ones.
        double: of clean images: whether verdicts are in float64.
        draws: of a target that draws at inference, over how many it is judged; 0 where there is nothing to draw.
    """

    target: str
    defense: str
    n: int
    seed: int
    threat: str
    identity: str
    data: str
    surrogate: str = ""
    attack: str = ""
    loss: str = ""
    eps: float = 0.0
    craft: Craft | None = None
    double: bool = False
    draws: int = 0

    @property
    def attacked(self) -> Craft:
        """`craft`, of a cell that is not of clean images."""
        assert self.craft is not None
        return self.craft

    def recipe(self) -> dict[str, Any]:
        """Everything that its rows depend on; names do not."""
        drawn = {"draws": self.draws} if self.draws else {}
        if self.craft is None:
            about = {"threat": self.threat, "data": self.data, "target": self.identity, "double": self.double}
            return {**about, "rows": ROWS_VERSION, **drawn}
        return {"craft": self.craft.recipe(), "threat": self.threat, "target": self.identity, **drawn}

    @cached_property
    def key(self) -> str:
        return content_key(self.recipe())

    @cached_property
    def version(self) -> str:
        """The key of what was done to the images, ε aside: verdicts of two targets may be paired where it is the same.

        Of black-box cells it holds data, surrogate weights, attack with its version, restart, seed and precision; of
        those that are crafted on the target itself, as white-box ones are, all of these but the weights.
        """
        own = {name: value for name, value in self.recipe().items() if name not in ("target", "craft")}
        craft = {} if self.craft is None else self.craft.recipe()
        without = {"eps", "source"} if craft.get("source") == self.identity else {"eps"}
        return content_key({**own, "craft": {name: value for name, value in craft.items() if name not in without}})

    def manifest(self) -> dict[str, Any]:
        """As JSON."""
        columns = ("target", "defense", "n", "seed", "threat", "surrogate", "attack", "loss", "eps")
        craft = {} if self.craft is None else {"craft": self.craft.key}
        return {**{name: getattr(self, name) for name in columns}, **craft, "recipe": self.recipe()}

    def write(self, folder: Path) -> None:
        """Into the folder of the rows."""
        write_record(folder / "cells" / f"{self.key}.json", self.manifest())

    @classmethod
    def read(cls, folder: Path, key: str) -> Cell:
        """The cell of that key whose rows are in ``folder``.

        Raises:
            Damaged: its manifest is gone, was changed, is of another cell, or contradicts itself.
        """
        again = f"restore it, or remove {folder} and evaluate again"
        path = folder / "cells" / f"{checked_name(key, 'cell')}.json"
        if not path.exists():
            raise Damaged(f"{path} is gone, so its rows mean nothing", again)
        found = read_record(path)
        try:
            cell = cls._of(_Manifest.model_validate(found))
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise Damaged(f"{path} is damaged: {field}", again) from error
        told = cell.manifest()
        wrong = [name for name in told if found.get(name) != told[name]]
        if cell.key != key or wrong:
            what = f"its {wrong[0]} is not its recipe's" if wrong else "its recipe is of another cell"
            raise Damaged(f"{path} was changed after it was written: {what}", again)
        return cell

    @classmethod
    def _of(cls, told: _Manifest) -> Cell:
        who = {name: getattr(told, name) for name in ("target", "defense", "n", "seed")}
        if told.recipe.get("craft") is None:
            clean = _Clean.model_validate(told.recipe)
            target, draws = clean.target, clean.draws
            return cls(**who, threat=clean.threat, identity=target, data=clean.data, double=clean.double, draws=draws)
        recipe = _Attacked.model_validate(told.recipe)
        fields = {**recipe.craft.model_dump(exclude={"logits"}), "restarts": tuple(recipe.craft.restarts)}
        craft = Craft(**fields)
        return cls(
            **who,
            threat=recipe.threat,
            identity=recipe.target,
            data=craft.data,
            surrogate=told.surrogate,
            attack=told.attack,
            loss=str(craft.attack.get("loss")),
            eps=craft.eps,
            craft=craft,
            draws=recipe.draws,
        )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Manifest(_Strict):
    target: str
    defense: str
    n: int
    seed: int
    threat: str
    surrogate: str
    attack: str
    loss: str
    eps: float
    craft: str = ""
    recipe: dict[str, Any]


class _Clean(_Strict):
    rows: int
    threat: str
    data: str
    target: str
    double: bool
    draws: int = 0


class _Craft(_Strict):
    data: str
    source: str
    attack: dict[str, Any]
    restarts: list[int]
    seed: int
    precision: str
    eps: float
    batch: int | None
    rows: int
    draws: int = 0
    logits: str = "float32"


class _Attacked(_Strict):
    craft: _Craft
    threat: str
    target: str
    draws: int = 0
