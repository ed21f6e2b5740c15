"""What defenses share that train on the images of PGD: its fields, and the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robench.attacks.training import check, craft
from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.core.rng import Stream
from robench.defenses.base import Batch, Defense


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """PGD whose fields are the defense's own, as a base class: alone, or before that of a defense that it is added to.

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

    def craft(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        draws: Stream | Tensor,
        objective: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`robench.attacks.training.craft` with these fields."""
        return craft(
            model, images, labels, draws, eps=self.eps, steps=self.steps, step_ratio=self.step_ratio,
            craft_bn=self.craft_bn, objective=objective,
        )  # fmt: skip

    def attacked(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        """x_adv of PGD on the ensemble's loss −log p̄_y, the images (B,C,H,W) that every member is trained on; no graph
        attached."""
        return self.craft(ensemble, batch.images, batch.labels, batch.draws.within("advt"))


@dataclass(frozen=True, kw_only=True)
class AddedAttack(Defense):
    """PGD beside a defense whose own fields are called ``eps`` and ``steps``, as a base class before that defense.

    Attributes:
        advt_eps: radius of the PGD; ``advt_steps`` of ``advt_step_ratio``·ε, from a random start.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    adversarial_training: ClassVar[bool] = True

    advt_eps: float = 8 / 255
    advt_steps: int = 10
    advt_step_ratio: float = 0.25
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.name, "advt_", self.advt_eps, self.advt_steps, self.advt_step_ratio)

    def craft(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Stream | Tensor) -> Tensor:
        """`robench.attacks.training.craft` with these fields."""
        return craft(
            model, images, labels, draws, eps=self.advt_eps, steps=self.advt_steps, step_ratio=self.advt_step_ratio,
            craft_bn=self.craft_bn,
        )  # fmt: skip
