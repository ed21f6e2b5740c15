"""Published numbers, as data: a ``.toml`` for each paper, which says everything, and a ``.csv`` for each of its tables.

A table has accuracies in percent: ``method``, ``n_models``, ``clean`` where it is known, and an ``eps0.01`` column for
ε = 0.01; an empty place is a number that was not published.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robench.core.errors import RobenchError, unknown


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Data):
    """One table.

    Attributes:
        file: its numbers; threat: ours; name: what the table is called, where a threat has several.
        attack, loss: of which rows of ours it is; all of the threat by default.
        steps, tries: gradient steps of its attacks, and how many an image had to survive: black-box versions,
            white-box starts.
    """

    file: str
    threat: Literal["blackbox", "whitebox"]
    name: str = ""
    attack: str = ""
    loss: str = ""
    steps: int = 0
    tries: int = 1

    @property
    def title(self) -> str:
        return self.name or self.threat


class Claim(_Data):
    """What a reproduction must show, on whatever data.

    Attributes:
        kind: ``rises`` or ``falls`` with N; ``fallen``, to about 0; ``above`` the defense ``over``.
        threat: ``clean``, or the title of a table.
        eps: the radius; eps_from: instead, all radii from this one, for N of at least the key.
    """

    claim: str
    kind: Literal["rises", "falls", "fallen", "above"]
    threat: str
    defense: str
    over: str = ""
    eps: float = 0.0
    eps_from: dict[int, float] = {}


class Paper(_Data):
    """A source of published numbers.

    Attributes:
        title: authors, year, table; source: where it is to be read, and what else the numbers depend on.
        data: its test images; images: how many each number rests on, None where that is not said.
        model: its members; defenses: our name for each of its methods.
    """

    title: str
    source: str
    data: str
    model: str
    images: int | None = None
    defenses: dict[str, str]
    tables: tuple[Published, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()


@cache
def names() -> tuple[str, ...]:
    """The papers there are, sorted; a name ends with the year."""
    entries = (entry.name for entry in files("robench.reports.published").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml")))


@cache
def read(paper: str) -> Paper:
    """One of `names`.

    Raises:
        RobenchError: unknown paper, or a file that says something else.
    """
    if paper not in names():
        raise unknown("paper", paper, names())
    text = (files("robench.reports.published") / f"{paper}.toml").read_text(encoding="utf-8")
    try:
        return Paper.model_validate(tomllib.loads(text))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise RobenchError(f"{paper}.toml: {field}: {problem['msg'].lower()}, got {problem['input']!r}") from error


@cache
def order() -> tuple[str, ...]:
    """Our names of all defenses in the papers, the oldest paper first, each paper's as it lists them."""
    papers = sorted(names(), key=lambda name: (name[-4:], name))
    return tuple(dict.fromkeys(defense for name in papers for defense in read(name).defenses.values()))
