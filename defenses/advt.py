"""AdvT: adversarial training of the ensemble as one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from robench.attacks.training import check, craft
from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.defenses._members import by_member, cross_entropy
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("advt")
@dataclass(frozen=True, kw_only=True)
class AdvT(Defense):
    """Σ_i CE(z_i(x_adv), y), x_adv = PGD on the ensemble's loss −log p̄_y (Madry et al. 2018,
    https://arxiv.org/abs/1706.06083; as the ensemble defense of Yang et al. 2020, https://arxiv.org/abs/2009.14720).

    Every member trains on the same images: those that fool the average, where DVERGE+AdvT attacks each one alone.

    Attributes:
        eps: radius of the attack.
        steps: its steps, of size ``step_ratio``·ε, from a random start.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    title: ClassVar[str] = "AdvT"
    color: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "v"
    adversarial_training: ClassVar[bool] = True

    eps: float = 8 / 255
    steps: int = 10
    step_ratio: float = 0.25
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        check(self.name, "", self.eps, self.steps, self.step_ratio)

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        images = craft(
            ensemble,
            batch.images,
            batch.labels,
            batch.draws.within("advt"),
            eps=self.eps,
            steps=self.steps,
            step_ratio=self.step_ratio,
            craft_bn=self.craft_bn,
        )
        yield from by_member(
            [partial(cross_entropy, member, images, batch.labels) for member in ensemble.members], images.device
        )
