"""What a defense is: one loss, and what it needs from the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.registry import Registry
from robench.core.rng import Stream
from robench.core.rules import USUAL, Rule

Terms = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One training batch, augmented, on the device.

    Attributes:
        images: (B,C,H,W) in [0, 1]; labels: int64 (B,).
        paired: images of a second, independent shuffle, (B,C,H,W), for defenses with ``paired = True``.
        parts: of how many equal parts of the whole batch this is one: a mean's gradient is as many times longer.
        draws: this step's draws; epoch_draws: the same for every step of an epoch. The only sources of randomness.
        samples: index of each image in the training set, int64 (B,); train_size: how many that set has.
        progress: the part of the training that is done, in [0, 1).
        turn: which member is being trained, for defenses with ``in_turn = True``; ``progress`` is then of its training.
        state: what the defense keeps between steps, empty before the first; the checkpoint holds it. A tensor with
            ``train_size`` rows may have one for each image, written at ``samples`` alone; any other must not depend on
            the images, as several processes each see their part of them.
    """

    images: Tensor
    labels: Tensor
    draws: Stream
    epoch_draws: Stream
    paired: Tensor | None = None
    parts: int = 1
    samples: Tensor | None = None
    train_size: int = 0
    progress: float = 0.0
    turn: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A defense: frozen, keyword-only, one method to write, `loss`. Its recipe is data, in `robench/recipes`.

    Attributes:
        title: how figures and tables call it; the registered name where it is empty.
        color: of its lines, as ``#0072B2``; marker: of its points, as matplotlib names it, to tell it in grey print.
            Not inherited; who declares none gets those that the fewest others have.
        adversarial_training: whether it trains on adversarial images of its own loss; Figure 5 shows these.
        version: raise it when training with the same fields gives other weights.
        paired: whether `Batch.paired` is filled.
        start: ``baseline``: training starts from a trained Baseline of the same size and seed, made or reused by the
            trainer. ``scratch``: from random weights.
        min_members: the smallest ensemble the objective is defined for.
        in_turn: whether members are trained one after another, each for all of the recipe's epochs; `loss` then has
            gradients for member `Batch.turn` alone.
        rule: how its authors' ensembles decide, see `robench.core.rules`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    color: ClassVar[str] = ""
    marker: ClassVar[str] = ""
    adversarial_training: ClassVar[bool] = False
    version: ClassVar[int] = 1
    paired: ClassVar[bool] = False
    start: ClassVar[Literal["scratch", "baseline"]] = "scratch"
    min_members: ClassVar[int] = 1
    in_turn: ClassVar[bool] = False
    rule: ClassVar[Rule] = USUAL

    def __post_init__(self) -> None:
        """Raises RobenchError for fields that make no sense. By default: none."""
        return

    @abstractmethod
    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        """Yields named scalar terms; their sum over all yields is the loss.

        Each yield is back-propagated at once and its graph freed, so a loss that splits by member needs the memory
        of one member. Parameters are updated only after the last yield.

        Args:
            ensemble: in train mode; ``ensemble.members[i](images)`` gives logits (B,K).
        """

    def finish(self, ensemble: Ensemble, batch: Batch) -> None:
        """Called after the optimiser's step, without gradients; it may change weights in place. By default: nothing."""
        return

    def check(self, *, members: int, classes: int) -> None:
        """Raises RobenchError where this ensemble size or data set cannot be trained."""
        if members < self.min_members:
            raise RobenchError(
                f"expected `n` of defense {self.name!r} to be at least {self.min_members}, got {members}; "
                f"try --n {max(3, self.min_members)}"
            )

    def at_least(self, least: float, *names: str) -> None:
        """Raises RobenchError where one of these fields is below ``least``."""
        for name in names:
            if getattr(self, name) < least:
                raise RobenchError(
                    f"expected `{name}` of defense {self.name!r} to be at least {least:g}, got {getattr(self, name)}"
                )

    def passes(self, members: int) -> float:
        """Forward and backward passes of one image through one member in a training step, for forecasts.

        By default those of a field ``steps``, and what is learnt from: one image, or with ``paired`` one of each other
        member.
        """
        return float(getattr(self, "steps", 0) + (members - 1 if self.paired else 1))

    def manifest(self) -> dict[str, object]:
        """Everything that determines the loss, for keys and manifests."""
        return {
            "name": self.name,
            "version": self.version,
            **{item.name: getattr(self, item.name) for item in fields(self)},
        }


DEFENSES: Registry[type[Defense]] = Registry("defense", package="robench.defenses", group="robench.defenses")
