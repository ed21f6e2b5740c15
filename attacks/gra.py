"""Momentum ascent along the gradient and its neighbours', weighed by how much they agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromNeighbours, losses, mean_slopes, neighbour, slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("gra")
@dataclass(frozen=True, kw_only=True)
class GRA(FromNeighbours):
    """Gradient Relevance Attack (Zhu et al., ICCV 2023,
    https://openaccess.thecvf.com/content/ICCV2023/html/Zhu_Boosting_Adversarial_Transferability_via_Gradient_Relevance_Attack_ICCV_2023_paper.html),
    with the authors' settings.

    The momentum takes s·G + (1−s)·Ḡ: G = ∇J(x), Ḡ = (1/N) Σ_i ∇J(x + r_i), r_i ~ U(−β·ε, β·ε), and s their cosine,
    per image. A pixel's step is α times η to the number of times that the sign of its momentum has changed; the first
    step, before which the momentum is zero, is no change (the authors' code starts at 1/η). Neighbours are not cut to
    the box, as in the authors' code.

    Attributes:
        radius: β, half the side of the neighbourhood over ε.
        decay: η.
    """

    radius: float = 3.5
    decay: float = 0.94

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("decay", 0 < self.decay <= 1, "in (0, 1]; 1 keeps every step")

    @property
    def passes(self) -> int:
        return self.steps * (1 + self.neighbours)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        last, factor = torch.zeros_like(images), torch.full_like(images, 1 / self.decay)

        def rule(z: Tensor, step: int) -> Tensor:
            slope = slopes(objective, z)
            around = mean_slopes(
                objective,
                lambda point, copy: neighbour(point, self.radius * eps, draws, step, copy),
                self.neighbours,
                z,
            )
            # Gradients of confident networks are far below the default of 1e-12.
            one, other = (F.normalize(each.flatten(1), eps=1e-20) for each in (slope, around))
            return around.lerp(slope, (one * other).sum(dim=1).view(-1, 1, 1, 1))

        def scale(velocity: Tensor) -> Tensor:
            nonlocal last, factor
            sign = velocity.sign()
            factor = torch.where(sign == last, factor, self.decay * factor)
            last = sign
            return factor

        return self.follow(rule, images, eps, scale)
