"""What is asked of a threat: every field with its type, range, default and meaning, declared once. Imports no torch.

The tables ``[threats.x]`` of a study, the options of `robench eval` and the threats of `robench.evaluation.threats` are
made of these classes: a field that is added to one of them is read, checked and explained by all three.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from robench.core.registry import UNDEFENDED


class Protocol(NamedTuple):
    """What a threat tries where nobody says otherwise (protocol §3).

    Attributes:
        attacks: names, with the fields that differ from the attacks' own defaults; each is tried with each loss.
        restarts: random starts of each attack that has any.
    """

    attacks: tuple[tuple[str, dict[str, Any]], ...]
    losses: tuple[str, ...]
    restarts: int


PROTOCOL = {
    "whitebox": Protocol((("pgd", {}),), ("ce",), 5),
    "blackbox": Protocol((("pgd", {"momentum": 1.0, "steps": 100}), ("mdi2", {}), ("sgm", {})), ("ce", "cw"), 3),
    "transfer": Protocol((("pgd", {}),), ("ce",), 5),
    "convergence": Protocol((("fgsm", {}), *(("pgd", {"steps": steps}) for steps in (50, 500, 1000))), ("ce",), 1),
    "queries": Protocol(tuple(("square", {"queries": count}) for count in (100, 1000, 10_000)), ("cw",), 1),
}

#: Threats under which something is attacked, and all that can be asked for.
ATTACKED = tuple(PROTOCOL)
NAMES = (*ATTACKED, "diversity")

#: Test images that are judged where nobody says how many; steps with which diversity is measured.
SAMPLES = 1000
DIVERSITY_STEPS = 10


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("values should differ")
    return values


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, no truth value")
    return value


def _several(value: Any) -> Any:
    """One number, or a list of JSON, as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Distinct = AfterValidator(_distinct)
Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
#: Draws of a model.
Draws = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_number)]
Radius = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Radii = Annotated[tuple[Radius, ...], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1), Distinct]
Sizes = Annotated[tuple[Count, ...], Field(min_length=1), Distinct]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Distinct]
Subset = Literal["auto", "first", "random", "paper"]


class Validated(BaseModel):
    """Validated data. Unknown keys, wrong types and impossible values are errors.

    Attributes:
        group: what its fields are about; under: the threats that take them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    group: ClassVar[str] = ""
    under: ClassVar[tuple[str, ...]] = NAMES


class Effort(Validated):
    """How hard every attack tries."""

    group: ClassVar[str] = "Attacks"
    under: ClassVar[tuple[str, ...]] = ATTACKED

    restarts: Count | None = Field(
        None,
        description="Random starts of each attack that has any. By default the protocol's: "
        f"{', '.join(f'{name} {usual.restarts}' for name, usual in PROTOCOL.items())}.",
    )
    draws: Draws = Field(
        default=1,
        description="Of models that draw at inference: gradients are means over so many draws, and verdicts are over "
        "as many.",
    )


class Strength(Validated):
    """How far a threat goes; what is absent is the data set's, or the protocol's."""

    group: ClassVar[str] = "Strength"

    eps: Annotated[Annotated[Radii, Distinct] | str | None, BeforeValidator(_several)] = Field(
        None, description="0.01:0.07:0.01, 8/255, or several with commas. By default the data set's."
    )
    steps: Count | None = Field(
        None, description=f"Gradient steps. By default the protocol's: 50, black-box 100, diversity {DIVERSITY_STEPS}."
    )


class Attacks(Effort):
    """Which attacks are tried; what is absent is the protocol's."""

    attacks: Names | None = Field(None, description="With commas; fields as pgd:momentum=1. By default the protocol's.")
    losses: Names | None = Field(None, description="ce, cw. By default the protocol's.")


class Asked(Strength, Attacks):
    """What is asked of a threat under which something is attacked."""


class Diversity(Validated):
    """What is asked of the diversity (eq. 2 of the DVERGE paper); ε is the recipe's where there is none."""

    eps: Radius | None = None
    steps: Count = DIVERSITY_STEPS


class Surrogates(Validated):
    """Which hold-out ensembles are attacked in the target's place."""

    group: ClassVar[str] = "Surrogates"
    under: ClassVar[tuple[str, ...]] = ("blackbox",)

    surrogates: Annotated[tuple[Count | str, ...], Field(min_length=1), Distinct] = Field(
        (3, 5, 8), description="Sizes to make or reuse, or names of runs."
    )


class SurrogateDefense(Validated):
    """How surrogates that are given by size are trained, whoever is judged."""

    group: ClassVar[str] = "Surrogates"
    under: ClassVar[tuple[str, ...]] = ("blackbox",)

    surrogate_defense: str = Field(UNDEFENDED, description="`same`: each target's own.")


class Relation(Validated):
    """Whether surrogates that are no hold-outs may be attacked."""

    group: ClassVar[str] = "Surrogates"
    under: ClassVar[tuple[str, ...]] = ("blackbox",)

    allow_related: bool = Field(False, description="Judge on surrogates that are no hold-outs; labelled.")


class HoldOuts(Relation, SurrogateDefense, Surrogates):
    """What is asked of surrogates on the command line."""


class Samples(Validated):
    """Which test images are judged."""

    group: ClassVar[str] = "Images"

    samples: Count = Field(SAMPLES, description="Test images.")
    subset: Subset = Field(
        "auto", description="Test images: the first, or, of data that are ordered by class, random ones."
    )
