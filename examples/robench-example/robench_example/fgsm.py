"""One step along the sign of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """x + ε·sign ∇loss (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572): quick, and weaker than PGD."""

    @property
    def stochastic(self) -> bool:
        return False

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        z = images.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(LOSSES.get(self.loss)(model(z), labels).sum(), z)
        return (images + eps.view(-1, 1, 1, 1) * slope.sign()).clamp(0, 1)
