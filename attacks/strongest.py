"""The strongest that robench has against an ensemble whose weights it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robench.attacks.apgd import APGD
from robench.attacks.base import ATTACKS, Attack, Taken, images_of
from robench.attacks.members import Members
from robench.attacks.mora import MORA
from robench.attacks.square import Square
from robench.attacks.survivors import Standing, in_turn
from robench.core.rng import Draws

#: Of APGD-T, as in AutoAttack.
TARGETS = 9


@ATTACKS.register("strongest")
@dataclass(frozen=True, kw_only=True)
class Strongest(Attack):
    """APGD-CE, the four ways of `Members`, MORA without targets, APGD-T and Square, in the order of their cost, each on
    what stands.

    APGD-CE, APGD-T and Square are three of the four attacks of AutoAttack (Croce & Hein 2020,
    https://arxiv.org/abs/2003.01690), which also has FAB-T; the others look at members, as AutoAttack does not. A model
    of fewer than 4 classes has no targeted DLR: APGD with the CW loss takes the place of APGD-T.

    A sample that stands keeps the image of the least margin.

    Attributes:
        steps: gradient steps of each attack, and of each of their targets and runs.
        queries: of Square.
    """

    by_member: ClassVar[bool] = True

    steps: int = 100
    queries: int = 1000

    def parts(self, classes: int) -> tuple[Attack, ...]:
        loss, steps = self.loss, self.steps
        return (
            APGD(loss=loss, steps=steps),
            Members(combine="normalised", loss=loss, steps=steps),
            Members(combine="minmax", loss=loss, steps=steps),
            Members(combine="losses", loss=loss, steps=steps),
            Members(combine="logits", loss=loss, steps=steps),
            MORA(targets=0, loss=loss, steps=steps),
            APGD(objective="dlr", targets=min(TARGETS, classes - 1), loss=loss, steps=steps)
            if classes >= 4
            else APGD(loss="cw", steps=steps),
            Square(queries=self.queries),
        )

    @property
    def passes(self) -> int:
        """At most: each attack is on survivors alone."""
        return sum(part.passes for part in self.parts(TARGETS + 1))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Taken:
        with torch.no_grad():
            classes = model(images[:1]).shape[1]

        def run(attack: Attack) -> Callable[[Standing], Tensor]:
            return lambda here: images_of(attack.perturb(model, here.images, here.labels, here.eps, here.draws))

        return Taken(*in_turn(map(run, self.parts(classes)), model, images, labels, eps, draws))
