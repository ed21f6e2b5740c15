"""What defenses share that train all members on the images of one attack on the ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robench.attacks.training import check, craft
from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.defenses.base import Batch, Defense


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """PGD on the ensemble's loss −log p̄_y, as a base class: alone, or before the one of a defense that it is added to.

    Attributes:
        eps: radius of the attack.
        steps: its steps, of size ``step_ratio``·ε, from a random start.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    adversarial_training: ClassVar[bool] = True

    eps: float = 8 / 255
    steps: int = 10
    step_ratio: float = 0.25
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.name, "", self.eps, self.steps, self.step_ratio)

    def attacked(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        """x_adv, the images (B,C,H,W) that every member is trained on; no graph attached."""
        return craft(
            ensemble,
            batch.images,
            batch.labels,
            batch.draws.within("advt"),
            eps=self.eps,
            steps=self.steps,
            step_ratio=self.step_ratio,
            craft_bn=self.craft_bn,
        )
