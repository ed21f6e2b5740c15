"""Projected gradient descent, with and without momentum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robench.attacks.ascent import ascend, drawn_start
from robench.attacks.base import ATTACKS, Attack
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """PGD (Madry et al. 2018, https://arxiv.org/abs/1706.06083), or, with μ > 0, MI-FGSM (Dong et al. 2018,
    https://arxiv.org/abs/1710.06081) from a random start.

    Attributes:
        steps: gradient steps.
        step_ratio: step size over ε; the DVERGE study uses 1/5.
        momentum: μ; the study uses 0 white-box and 1 black-box.
        random_start: start from x + U(−ε, ε) instead of x.
    """

    steps: int = 50
    step_ratio: float = 0.2
    momentum: float = 0.0
    random_start: bool = True

    @property
    def stochastic(self) -> bool:
        return self.random_start

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss = LOSSES.get(self.loss)
        start = drawn_start(images, eps, draws) if self.random_start else None
        return ascend(
            lambda z, _: loss(model(z), labels),
            images,
            eps,
            steps=self.steps,
            step_ratio=self.step_ratio,
            momentum=self.momentum,
            start=start,
        )
