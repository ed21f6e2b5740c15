"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robench.attacks.ascent import ascend
from robench.attacks.base import ATTACKS, Attack
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One sign step of size ε from the image itself (Goodfellow et al. 2015, §4, https://arxiv.org/abs/1412.6572).

    Too weak to measure robustness by: the convergence check sets stronger attacks beside it.
    """

    @property
    def stochastic(self) -> bool:
        return False

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss = LOSSES.get(self.loss)
        return ascend(lambda z, _: loss(model(z), labels), images, eps, steps=1, step_ratio=1.0)
