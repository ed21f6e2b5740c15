"""Momentum ascent, corrected by how the gradient varied around the last iterate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromNeighbours, losses, mean_slopes, neighbour, slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("vmi")
@dataclass(frozen=True, kw_only=True)
class VMI(FromNeighbours):
    """VMI-FGSM (Wang & He 2021, algorithm 1, https://arxiv.org/abs/2103.15571), with the authors' settings.

    The momentum takes ∇J(x_t) + v_t, where v_t = (1/N) Σ_i ∇J(x_{t−1} + r_i) − ∇J(x_{t−1}), r_i ~ U(−β·ε, β·ε), v_0 =
    0: the variance is that of the step before. Neighbours are not cut to the box, as in the authors' code. Nothing
    would use the variance of the last step: it is not computed.

    Attributes:
        radius: β, half the side of the neighbourhood over ε.
    """

    radius: float = 1.5

    @property
    def stochastic(self) -> bool:
        return self.radius > 0 and self.steps > 1

    @property
    def passes(self) -> int:
        return self.steps + (self.steps - 1) * self.neighbours

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        variance = torch.zeros_like(images)

        def rule(z: Tensor, step: int) -> Tensor:
            nonlocal variance
            slope = slopes(objective, z)
            tuned = slope + variance
            if step + 1 < self.steps:
                around = mean_slopes(
                    objective,
                    lambda point, copy: neighbour(point, self.radius * eps, draws, step, copy),
                    self.neighbours,
                    z,
                )
                variance = around - slope
            return tuned

        return self.follow(rule, images, eps)
