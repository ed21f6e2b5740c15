"""Threats: who attacks what, how. A threat unfolds into crafting jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, ValidationError, field_validator, model_validator

from robench.attacks import Attack
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.plugins import explained
from robench.core.registry import UNDEFENDED
from robench.evaluation import words
from robench.evaluation.evaluated import EvaluatedModel, kinship
from robench.evaluation.schema import PROTOCOL, Count, Effort, Radii, Relation

#: What the column ``threat`` says of surrogates that are Baselines, or any other defense, of the target's own kind, and
#: of those that are no hold-outs.
BLACKBOX = ("blackbox", "blackbox-own", "blackbox-related")


@dataclass(frozen=True)
class Job:
    """One attack on one source, and who is judged on what it crafts.

    Attributes:
        source: whose gradients are followed; source_name: what the column ``surrogate`` says.
        source_key: hash of the source's architecture and weights.
        restarts: made in this order; where ``pooled``, on survivors only, and one row says whether any succeeded.
        judged: ``ensemble``, or also ``members`` one by one.
        draws: of models that draw at inference, over how many gradients are means and verdicts are taken.
    """

    threat: str
    source: Ensemble
    source_name: str
    source_key: str
    attack: Attack
    restarts: tuple[int, ...]
    pooled: bool
    members_too: bool = False
    draws: int = 1

    @classmethod
    def on_target(
        cls, threat: str, target: EvaluatedModel, attack: Attack, restarts: tuple[int, ...], draws: int
    ) -> Job:
        """On the ensemble that is judged."""
        return cls(threat, target.ensemble, "", target.identity, attack, restarts, pooled=True, draws=draws)

    @classmethod
    def on_member(
        cls, threat: str, target: EvaluatedModel, number: int, attack: Attack, restarts: tuple[int, ...], draws: int
    ) -> Job:
        """On one member, counted from 1, of the ensemble that is judged."""
        member, key = Ensemble([target.ensemble.members[number - 1]]), f"{target.identity}/{number}"
        return cls(threat, member, str(number), key, attack, restarts, pooled=True, members_too=True, draws=draws)

    @classmethod
    def on_surrogate(
        cls, threat: str, surrogate: EvaluatedModel, attack: Attack, restarts: tuple[int, ...], draws: int
    ) -> Job:
        """On another ensemble than the one that is judged."""
        source = surrogate.ensemble, surrogate.name, surrogate.identity
        return cls(threat, *source, attack, restarts, pooled=False, draws=draws)


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))


class Threat(Effort, ABC):
    """What an attacker knows, and tries. Fields, ranges and defaults are those of `robench.evaluation.schema`.

    Attributes:
        eps: radii in (0, 1], in units of a pixel in [0, 1]; ascending.
        attacks: tried one after the other; by default the protocol's, see `robench.evaluation.words.attacks`.
        restarts: random starts of each attack that has any.

    Raises:
        RobenchError: an unknown field, or a value out of range.
    """

    model_config = ConfigDict(strict=False)

    name: ClassVar[str]
    #: Whether clean accuracy belongs beside the result; not where samples are chosen by being right.
    clean: ClassVar[bool] = True

    eps: Annotated[Radii, AfterValidator(_ascending)] = Field(
        description="radii in units of a pixel in [0, 1], such as (8 / 255,); clean accuracy is always reported"
    )
    attacks: tuple[InstanceOf[Attack], ...] = Field(
        default=(), description="objects, such as (robench.attacks.pgd.PGD(steps=20),)"
    )
    restarts: Count

    if not TYPE_CHECKING:  # which sees the fields

        def __init__(self, **values: Any) -> None:
            if not values.get("attacks"):
                values["attacks"] = words.attacks(self.name)
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise explained(error, f"threat {self.name!r}", type(self)) from error

    @abstractmethod
    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        """What has to be crafted to judge ``target``."""


def starts(attack: Attack, restarts: int) -> tuple[int, ...]:
    """The restarts that are worth making: one of an attack that draws nothing."""
    return tuple(range(restarts if attack.stochastic else 1))


def versions(attack: Attack, restarts: int) -> tuple[int, ...]:
    """The restarts that are black-box versions of an image, each of which must be survived."""
    return tuple(range(restarts if attack.restarts_are_versions else 1))


class Whitebox(Threat):
    """The attacker has the target: by default PGD, CE, 50 steps, 5 random starts, no momentum (protocol §3)."""

    name: ClassVar[str] = "whitebox"

    restarts: Count = PROTOCOL["whitebox"].restarts

    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        for attack in self.attacks:
            yield Job.on_target(self.name, target, attack, starts(attack, self.restarts), self.draws)


class Convergence(Whitebox):
    """White-box attacks of growing effort, each judged by itself: FGSM, then PGD with 50, 500 and 1000 steps and one
    start (DVERGE paper, appendix D). Where more steps still lower the accuracy, the white-box number is too high."""

    name: ClassVar[str] = "convergence"

    restarts: Count = PROTOCOL["convergence"].restarts


class Queries(Whitebox):
    """The attacker sees outputs alone, and asks: Square with 100, 1,000 and 10,000 queries, each judged by itself. A
    model that gives no gradient can be judged so, and under `Blackbox`."""

    name: ClassVar[str] = "queries"

    restarts: Count = PROTOCOL["queries"].restarts

    @model_validator(mode="after")
    def _outputs_alone(self) -> Self:
        if followers := [attack.label for attack in self.attacks if not attack.gradient_free]:
            raise RobenchError(
                f"attack {followers[0]!r} follows gradients, and threat 'queries' gives outputs alone; choose one such "
                f"as square:queries=1000"
            )
        return self


class Transfer(Threat):
    """Within the ensemble: crafted on each member, tested on each and on the ensemble; any start counts."""

    name: ClassVar[str] = "transfer"
    clean: ClassVar[bool] = False

    restarts: Count = PROTOCOL["transfer"].restarts

    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        if target.n < 2:
            raise RobenchError(f"threat 'transfer' is among members, and {target.name!r} has one; leave it out")
        for number in range(1, target.n + 1):
            for attack in self.attacks:
                yield Job.on_member(self.name, target, number, attack, starts(attack, self.restarts), self.draws)


class Blackbox(Threat, Relation):
    """The attacker has hold-out surrogates: by default momentum PGD with 3 starts, M-DI² and SGM, each with CE and CW,
    100 steps (protocol §3). Every start is a version of its own; accurate means right on all versions.

    Surrogates that were trained with the target's own technique are a harder threat, and a column of their own:
    ``blackbox-own``. A Baseline target has no such setting. Surrogates that are no hold-outs are ``blackbox-related``:
    what they give is no black-box result, and is never shown as one.

    Attributes:
        surrogates: ensembles that share no weights and no ancestor with the targets.
        allow_related: judge all the same where they do.
    """

    name: ClassVar[str] = "blackbox"

    surrogates: tuple[InstanceOf[EvaluatedModel], ...] = Field(
        description="of models of yours robench.EvaluatedModel.of_model(MODEL, DEVICE, name=NAME)"
    )
    restarts: Count = PROTOCOL["blackbox"].restarts

    @field_validator("surrogates")
    @classmethod
    def _some(cls, values: tuple[EvaluatedModel, ...]) -> tuple[EvaluatedModel, ...]:
        if not values:
            raise RobenchError("expected at least one surrogate in threat 'blackbox'; try --surrogates 3,5,8")
        return values

    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        for surrogate in self.surrogates:
            reason = kinship(surrogate, target)
            if reason and not self.allow_related:
                raise RobenchError(
                    f"{reason}: not a hold-out surrogate, so the result would not be a black-box one; choose another "
                    f"surrogate, or pass --allow-related to measure it and have it labelled"
                )
            own = surrogate.defense == target.defense and target.defense not in (UNDEFENDED, "unknown")
            threat = "blackbox-related" if reason else "blackbox-own" if own else "blackbox"
            for attack in self.attacks:
                for restart in versions(attack, self.restarts):
                    yield Job.on_surrogate(threat, surrogate, attack, (restart,), self.draws)


#: Threats of growing effort: every attack is judged by itself.
ATTACK_BY_ATTACK = ("convergence", "queries")

#: By name, as rows and studies have it.
THREATS: dict[str, type[Threat]] = {each.name: each for each in (Whitebox, Convergence, Queries, Transfer, Blackbox)}


def surrogates_of(threat: Threat) -> tuple[EvaluatedModel, ...]:
    """The surrogates of a black-box threat; none of any other."""
    return threat.surrogates if isinstance(threat, Blackbox) else ()
