"""Threats: who attacks what, how. A threat unfolds into crafting jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from robench.attacks import ATTACKS, Attack
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.evaluation.subjects import Subject, kinship

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
    """

    threat: str
    source: Ensemble
    source_name: str
    source_key: str
    attack: Attack
    restarts: tuple[int, ...]
    pooled: bool
    members_too: bool = False


@dataclass(frozen=True, kw_only=True)
class Threat(ABC):
    """What an attacker knows, and tries.

    Attributes:
        eps: radii in [0, 1], ascending.
        attacks: tried one after the other; by default the protocol's, see `default_attacks`.
        restarts: random starts of each attack that has any.
    """

    name: ClassVar[str]
    #: Whether clean accuracy belongs beside the result; not where samples are chosen by being right.
    clean: ClassVar[bool] = True

    eps: tuple[float, ...]
    attacks: tuple[Attack, ...] = ()
    restarts: int

    def __post_init__(self) -> None:
        if not self.attacks:
            object.__setattr__(self, "attacks", default_attacks(self.name))
        if not isinstance(self.eps, (tuple, list)):
            raise RobenchError(
                f"expected `eps` of threat {self.name!r} to be a tuple of radii, got {self.eps!r}; "
                f"write eps=({self.eps},)"
            )
        for value in self.eps:
            if not 0 < value <= 1:
                raise RobenchError(
                    f"expected `eps` of threat {self.name!r} in (0, 1], in units of a pixel in [0, 1], got {value:g}; "
                    f"8/255 is 0.03137, and clean accuracy is always reported"
                )
        if not self.eps:
            raise RobenchError(f"expected at least one `eps` in threat {self.name!r}")
        if self.restarts < 1:
            raise RobenchError(f"expected `restarts` of threat {self.name!r} to be at least 1, got {self.restarts}")
        object.__setattr__(self, "eps", tuple(sorted(set(self.eps))))

    @abstractmethod
    def jobs(self, target: Subject) -> Iterator[Job]:
        """What has to be crafted to judge ``target``."""


def starts(attack: Attack, restarts: int) -> tuple[int, ...]:
    """The restarts that are worth making: one of an attack that draws nothing."""
    return tuple(range(restarts if attack.stochastic else 1))


def versions(attack: Attack, restarts: int) -> tuple[int, ...]:
    """The restarts that are black-box versions of an image, each of which must be survived."""
    return tuple(range(restarts if attack.restarts_are_versions else 1))


@dataclass(frozen=True, kw_only=True)
class Whitebox(Threat):
    """The attacker has the target: by default PGD, CE, 50 steps, 5 random starts, no momentum (protocol §3)."""

    name: ClassVar[str] = "whitebox"

    restarts: int = 5

    def jobs(self, target: Subject) -> Iterator[Job]:
        for attack in self.attacks:
            restarts = starts(attack, self.restarts)
            yield Job(self.name, target.ensemble, "", target.identity, attack, restarts, pooled=True)


@dataclass(frozen=True, kw_only=True)
class Convergence(Whitebox):
    """White-box attacks of growing effort, each judged by itself: FGSM, then PGD with 50, 500 and 1000 steps and one
    start (DVERGE paper, appendix D). Where more steps still lower the accuracy, the white-box number is too high."""

    name: ClassVar[str] = "convergence"

    restarts: int = 1


@dataclass(frozen=True, kw_only=True)
class Queries(Whitebox):
    """The attacker sees outputs alone, and asks: Square with 100, 1,000 and 10,000 queries, each judged by itself. A
    model that gives no gradient can be judged so, and under `Blackbox`."""

    name: ClassVar[str] = "queries"

    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if followers := [attack.label for attack in self.attacks if not attack.gradient_free]:
            raise RobenchError(
                f"attack {followers[0]!r} follows gradients, and threat 'queries' gives outputs alone; choose one such "
                f"as square:queries=1000"
            )


@dataclass(frozen=True, kw_only=True)
class Transfer(Threat):
    """Within the ensemble: crafted on each member, tested on each and on the ensemble; any start counts."""

    name: ClassVar[str] = "transfer"
    clean: ClassVar[bool] = False

    restarts: int = 5

    def jobs(self, target: Subject) -> Iterator[Job]:
        for number, member in enumerate(target.ensemble.members, 1):
            for attack in self.attacks:
                yield Job(
                    self.name,
                    Ensemble([member]),
                    str(number),
                    f"{target.identity}/{number}",
                    attack,
                    starts(attack, self.restarts),
                    pooled=True,
                    members_too=True,
                )


@dataclass(frozen=True, kw_only=True)
class Blackbox(Threat):
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

    surrogates: tuple[Subject, ...]
    restarts: int = 3
    allow_related: bool = False

    def __post_init__(self) -> None:
        if not self.surrogates:
            raise RobenchError("expected at least one surrogate in threat 'blackbox'; try --surrogates 3,5,8")
        super().__post_init__()

    def jobs(self, target: Subject) -> Iterator[Job]:
        for surrogate in self.surrogates:
            reason = kinship(surrogate, target)
            if reason and not self.allow_related:
                raise RobenchError(
                    f"{reason}: not a hold-out surrogate, so the result would not be a black-box one; choose another "
                    f"surrogate, or pass --allow-related to measure it and have it labelled"
                )
            own = surrogate.defense == target.defense and target.defense not in ("baseline", "unknown")
            threat = "blackbox-related" if reason else "blackbox-own" if own else "blackbox"
            for attack in self.attacks:
                for restart in versions(attack, self.restarts):
                    yield Job(threat, surrogate.ensemble, surrogate.name, surrogate.identity, attack, (restart,), False)


#: Threats of growing effort: every attack is judged by itself.
ATTACK_BY_ATTACK = ("convergence", "queries")

#: By name, as rows and studies have it.
THREATS: dict[str, type[Threat]] = {each.name: each for each in (Whitebox, Convergence, Queries, Transfer, Blackbox)}
#: Starts of each where nobody says how many.
RESTARTS: dict[str, int] = {name: vars(each)["restarts"] for name, each in THREATS.items()}

#: Per threat: the attacks that are tried, with the fields that differ from the attacks' own defaults, and the losses.
PROTOCOL: dict[str, tuple[tuple[tuple[str, dict[str, Any]], ...], tuple[str, ...]]] = {
    "whitebox": ((("pgd", {}),), ("ce",)),
    "transfer": ((("pgd", {}),), ("ce",)),
    "blackbox": ((("pgd", {"momentum": 1.0, "steps": 100}), ("mdi2", {}), ("sgm", {})), ("ce", "cw")),
    "convergence": ((("fgsm", {}), *(("pgd", {"steps": steps}) for steps in (50, 500, 1000))), ("ce",)),
    "queries": (tuple(("square", {"queries": count}) for count in (100, 1000, 10_000)), ("cw",)),
}


def default_attacks(threat: str) -> tuple[Attack, ...]:
    """The protocol's attacks for a threat, each with each loss."""
    attacks, losses = PROTOCOL[threat]
    return tuple(ATTACKS.get(name)(loss=loss, **values) for name, values in attacks for loss in losses)
