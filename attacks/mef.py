"""Momentum ascent along the gradients of neighbours that were moved down first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromNeighbours, losses, neighbour, parts, slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("mef")
@dataclass(frozen=True, kw_only=True)
class MEF(FromNeighbours):
    """Maximin Expected Flatness (Qiu et al. 2024, https://arxiv.org/abs/2405.16181), with the authors' settings.

    The momentum takes (1/N) Σ_i g_i, g_i = ∇J(x + r_i + ξ·ε·d_i), r_i ~ U(−γ·ε, γ·ε). The direction d_i of neighbour i
    is of the step before, d_i ← g_i/mean|g_i| − ν·d_i, zero at first: no pass is made for it. This is what the authors'
    code computes, its signs included. There ξ is .2; TransferAttack names .15 as the official value, the default here.
    One direction per neighbour is kept: N times the batch. Neighbours are not cut to the box, as in the authors' code.

    Attributes:
        steps: gradient steps; the code makes 20 of ε/10.
        radius: γ, half the side of the neighbourhood over ε.
        inner_ratio: ξ, the length of the move along d over ε.
        inner_momentum: ν.
    """

    steps: int = 20
    momentum: float = 0.5
    radius: float = 2.0
    inner_ratio: float = 0.15
    inner_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("inner_ratio", self.inner_ratio >= 0, "to be at least 0, as a part of ε")
        self.require("inner_momentum", self.inner_momentum >= 0, "to be at least 0")

    @property
    def passes(self) -> int:
        return self.steps * self.neighbours

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        moved = (self.inner_ratio * eps).view(-1, 1, 1, 1)
        directions = torch.zeros(self.neighbours, *images.shape, dtype=images.dtype, device=images.device)

        def rule(z: Tensor, step: int) -> Tensor:
            total = torch.zeros_like(z)
            for part in parts(self.neighbours, z):
                direction = directions[part.start : part.stop]
                points = [
                    neighbour(z, self.radius * eps, draws, step, copy) + moved * each
                    for copy, each in zip(part, direction, strict=True)
                ]
                slope = slopes(objective, torch.cat(points)).view(direction.shape)
                size = slope.abs().mean(dim=(2, 3, 4), keepdim=True).clamp_(min=1e-30)
                direction.mul_(-self.inner_momentum).addcdiv_(slope, size)
                total += slope.sum(dim=0)
            return total / self.neighbours

        return self.follow(rule, images, eps)
