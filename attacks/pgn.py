"""Momentum ascent that seeks places where the gradient is small around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromNeighbours, losses, neighbour, parts, slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Length = Literal["mean", "l1"]


@ATTACKS.register("pgn")
@dataclass(frozen=True, kw_only=True)
class PGN(FromNeighbours):
    """Penalizing Gradient Norm (Ge et al. 2023, algorithm 1, https://arxiv.org/abs/2306.05225), with the authors'
    settings.

    The momentum takes (1/N) Σ_i [(1−γ)·∇J(x_i) + γ·∇J(x_i − α·∇J(x_i)/‖∇J(x_i)‖)], x_i = x + U(−ζ, ζ): the second term
    stands for the gradient of a penalty on the gradient's norm, so that no second derivative is taken. The paper writes
    the norm ‖·‖₁; the authors' code has the mean of the absolute values, which makes this step as large as one of the
    attack, C·H·W times that of the paper. Neighbours are not cut to the box, as in the authors' code.

    Attributes:
        step_ratio: α, the step size over ε.
        radius: ζ, half the side of the neighbourhood, over ε.
        balance: γ, δ in the paper's section 3.3; 0 leaves the mean gradient of neighbours.
        length: ``mean`` as in the code, ``l1`` as in the paper.
    """

    balance: float = 0.5
    length: Length = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("balance", 0 <= self.balance <= 1, "in [0, 1]")
        self.require("length", self.length in get_args(Length), f"to be one of {', '.join(get_args(Length))}")

    @property
    def passes(self) -> int:
        return 2 * self.steps * self.neighbours

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        alpha = (self.step_ratio * eps).view(-1, 1, 1, 1)

        def rule(z: Tensor, step: int) -> Tensor:
            total = torch.zeros_like(z)
            for part in parts(self.neighbours, z):
                points = torch.cat([neighbour(z, self.radius * eps, draws, step, copy) for copy in part])
                near = slopes(objective, points)
                size = near.abs().sum(dim=(1, 2, 3), keepdim=True)
                if self.length == "mean":
                    size = size / near[0].numel()
                down = alpha.repeat(len(part), 1, 1, 1) * near / size.clamp(min=1e-30)
                mixed = near.lerp(slopes(objective, points - down), self.balance)
                total += mixed.view(len(part), *z.shape).sum(dim=0)
            return total / self.neighbours

        return self.follow(rule, images, eps)
