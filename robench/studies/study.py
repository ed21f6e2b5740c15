"""Study files: what is trained, attacked and drawn together, as validated data. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator

from robench.core.errors import RobenchError, unknown
from robench.core.registry import UNDEFENDED
from robench.core.rules import Rule
from robench.evaluation import schema
from robench.evaluation.schema import (
    Asked,
    Count,
    Distinct,
    Names,
    Radius,
    Samples,
    Seeds,
    Sizes,
    Subset,
    SurrogateDefense,
    Surrogates,
    Validated,
)
from robench.reports.published import names

Value = bool | int | float | str
#: Fields of a defense or its recipe, and ``init``.
Fields = dict[str, Value]


def _paper(name: str) -> str:
    if name not in names():
        raise ValueError(f"should be one of {', '.join(names())}")
    return name


class _Targets(Validated):
    """Which targets are judged, by default all, and on how many images, by default the study's."""

    samples: Count | None = None
    defenses: Names | None = None
    sizes: Sizes | None = None
    seeds: Seeds | None = None


class Part(Validated):
    """Networks of a pool of surrogates, trained together.

    Attributes:
        n: members; model: of all of them, by default the study's, or the recipe's.
        fields: of the defense or its recipe, such as stop_after or snapshots, and ``init``.
    """

    defense: str = UNDEFENDED
    n: Count = 1
    model: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    fields: Fields = Field({})


class ThreatTable(_Targets, Asked):
    """One table of ``[threats]``; what is absent is the protocol's, or the study's."""

    subset: Subset | None = None


class BlackboxOwnTable(ThreatTable, Surrogates):
    """Surrogates of the target's own defense; a Baseline has no such setting."""

    @field_validator("surrogates")
    @classmethod
    def _trained_here(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if names := [value for value in values if isinstance(value, str)]:
            raise ValueError(f"should be sizes, for a study trains its surrogates, not {names[0]}")
        return values


class BlackboxTable(BlackboxOwnTable, SurrogateDefense):
    """Surrogates whoever is judged: sizes of one defense, and names of the study's pools."""

    @field_validator("surrogates")
    @classmethod
    def _trained_here(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return values


class DiversityTable(_Targets, schema.Diversity):
    """The diversity of trained runs."""


class Threats(Validated):
    """The threats, under the names that their rows have."""

    transfer: ThreatTable | None = None
    whitebox: ThreatTable | None = None
    blackbox: BlackboxTable | None = None
    blackbox_own: BlackboxOwnTable | None = Field(default=None, alias="blackbox-own")
    convergence: ThreatTable | None = None
    queries: ThreatTable | None = None
    diversity: DiversityTable | None = None

    def given(self) -> dict[str, ThreatTable | DiversityTable]:
        """By name, those that the study has."""
        named = {name.replace("_", "-"): getattr(self, name) for name in type(self).model_fields}
        return {name: threat for name, threat in named.items() if threat is not None}


class Track(Validated):
    """What is measured along training (Fig. 2), see `robench.evaluation.diversity.Tracking`.

    Attributes:
        defenses: whose trainings; by default all of the study.
        every: epochs between two measurements; by default as many as keep them within 15 % of the time.
    """

    defenses: Names | None = None
    transfer_eps: Radius
    diversity_eps: Radius | None = None
    images: Count = 100
    steps: Count = 10
    restarts: Count = 1
    every: Count | None = None


class Axis(Validated):
    """An ablation: one setting of one defense, a figure of its own.

    Attributes:
        setting: a field of the defense or its recipe, or ``init``.
        fields: other settings, for all values.
        sizes, seeds: by default the smallest size and the first seed.
        threats: which of the study's are tried.
    """

    defense: str
    setting: str
    values: Annotated[tuple[Value, ...], Field(min_length=2), Distinct]
    fields: Fields = Field({})
    sizes: Sizes | None = None
    seeds: Seeds | None = None
    threats: Annotated[tuple[Literal["whitebox", "blackbox"], ...], Field(min_length=1), Distinct] = (
        "whitebox",
        "blackbox",
    )


class Report(Validated):
    """What is drawn.

    Attributes:
        regions: points along each axis of Figure 1; extent: how far they reach.
        images: how many that fell are shown.
        like: a study of ours; the report says what is otherwise than in it.
    """

    against: Annotated[str, AfterValidator(_paper)] | None = None
    regions: Annotated[int, Field(ge=2)] | None = None
    extent: Radius | None = None
    images: Annotated[int, Field(ge=0)] = 60
    like: str | None = None


class Study(Samples):
    """A whole study. Unknown keys, wrong types and impossible values are errors.

    Attributes:
        defenses: names, or a table of names with the fields that differ from the data set's recipe.
        recipe: a file of `robench/recipes`, instead of the data set's own.
        rule: how target ensembles decide, instead of as the defenses' authors do.
        surrogates: pools of hold-out surrogates that ``threats.blackbox`` may name, each one ensemble of all its parts.
        sizes: members per ensemble; samples, subset: test images.
        seed: of the attacks' draws.
    """

    title: str
    dataset: str
    recipe: str | None = None
    model: str | None = None
    rule: Rule | None = None
    defenses: Annotated[dict[str, Fields], Field(min_length=1)]
    sizes: Sizes
    seeds: Seeds = (0,)
    batch_size: Count | None = None
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    track: Track | None = None
    threats: Threats = Threats()
    surrogates: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]*$")], Annotated[tuple[Part, ...], Field(min_length=1)]
    ] = Field({})
    axes: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")], Axis] = Field({})
    report: Report = Report()

    @property
    def tracked(self) -> Sequence[str]:
        """Defenses that are measured along training."""
        return () if self.track is None else self.track.defenses or tuple(self.defenses)


def shipped() -> list[str]:
    """Names of the studies that come with robench."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def find(name: str) -> tuple[str, str]:
    """Name and text of a study: one that ships, or a ``.toml`` file.

    Raises:
        RobenchError: neither.
    """
    try:
        if name.endswith(".toml"):
            return Path(name).stem, Path(name).read_text(encoding="utf-8")
        if name in shipped():
            return name, (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RobenchError(f"study {name!r} cannot be read ({error}); name a .toml file that is UTF-8") from error
    own = f"{name}.toml is there: type that" if Path(f"{name}.toml").is_file() else "A file of your own ends in .toml"
    raise unknown("study", name, shipped(), f"{own}.")


def parse(name: str, text: str, settings: Sequence[str] = ()) -> Study:
    """The study that ``text`` says, after ``settings`` such as ``threats.whitebox.steps=5``.

    Raises:
        RobenchError: file, key, what is allowed, what was received.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RobenchError(f"{name}: not TOML: {error}") from error
    for setting in settings:
        _set(raw, setting)
    if isinstance(raw.get("defenses"), list):
        names = raw["defenses"]
        if not all(isinstance(each, str) for each in names) or len(set(map(str, names))) < len(names):
            raise RobenchError(f"{name}: defenses: expected names that differ, got {names}")
        raw["defenses"] = {each: {} for each in names}
    try:
        # By way of JSON: strict, and a list may still be a tuple.
        study = Study.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        # Of a key that is misspelt, its right name is missing too.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise _explained(name, problems[0], Study) from error
    wanted = study.threats.blackbox.surrogates if study.threats.blackbox else ()
    if unknown_pools := [each for each in wanted if isinstance(each, str) and each not in study.surrogates]:
        there = (
            f"pools of [surrogates] ({', '.join(study.surrogates)})" if study.surrogates else "pools of [surrogates]"
        )
        raise RobenchError(
            f"{name}: threats.blackbox.surrogates: should be sizes, for a study trains its surrogates, or {there}, "
            f"not {unknown_pools[0]}"
        )
    return study


#: Branches of a union that hold one value.
_SCALARS = ("str", "bool", "int", "float")


def _folder() -> Any:
    return files("robench.studies")


def _set(raw: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    *path, last = key.split(".")
    if not equals or not all([*path, last]):
        raise RobenchError(f"expected --set KEY=VALUE, with tables as threats.whitebox.steps=5, got {setting!r}")
    table: Any = raw
    for part in path:
        if isinstance(table.get(part), list):  # `defenses = [names]`
            table[part] = {name: {} for name in table[part]}
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RobenchError(f"--set {setting}: {part!r} is no table")
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value


def _explained(name: str, problem: Mapping[str, Any], model: type[BaseModel]) -> RobenchError:
    """One line for the first problem that pydantic found."""
    where, owner = [], model
    for part in problem["loc"]:
        # A union's branches are named like functions: "tuple[...]", "constrained-str".
        if isinstance(part, str) and ("[" in part or part.removeprefix("constrained-") in _SCALARS):
            continue
        where.append(f"{part + 1}" if isinstance(part, int) else str(part))
        owner = _below(owner, str(part))
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = [field.alias or each for each, field in owner.model_fields.items()]
        return RobenchError(f"{name}: {unknown('key', where[-1], known)} (in {'.'.join(where[:-1]) or 'the study'})")
    if problem["type"] == "missing":
        return RobenchError(f"{name}: {key} is missing, and has no default")
    if problem["loc"][-1] == "bool":  # the first branch of `Value`
        return RobenchError(
            f"{name}: {key}: should be a number, text, true or false, got {json.dumps(problem['input'])}"
        )
    if problem["type"] == "tuple_type":
        got = json.dumps(problem["input"], default=str)
        return RobenchError(f"{name}: {key}: should be a list, such as [{got}], got {got}")
    message = str(problem["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return RobenchError(f"{name}: {key}: {message}, got {json.dumps(problem['input'], default=str)}")


def _below(owner: type[BaseModel], part: str) -> type[BaseModel]:
    """The table that a key of ``owner`` holds; ``owner`` itself where it holds none."""
    for name, field in owner.model_fields.items():
        if part in (name, field.alias):
            found = [
                kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, Validated)
            ]
            return found[0] if found else owner
    return owner


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]
