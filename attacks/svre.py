"""Momentum ascent on an ensemble whose direction is found by steps on one member at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robench.attacks.ascent import follow
from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromImages, slopes
from robench.core.fast import members
from robench.core.losses import LOSSES
from robench.core.rng import Draws, key


@ATTACKS.register("svre")
@dataclass(frozen=True, kw_only=True)
class SVRE(FromImages):
    """Stochastic Variance Reduced Ensemble attack (Xiong et al. 2022, algorithm 1, https://arxiv.org/abs/2111.10752),
    with momentum and the authors' settings.

    Of K members, from x̃ = x, M times: one member k is drawn, G̃ ← μ·G̃ + g/‖g‖₁ with
    g = ∇J_k(x̃) − ∇J_k(x) + (1/K) Σ_j ∇J_j(x), and x̃ ← Π(x̃ + β·sign G̃). The momentum of the attack takes the last G̃.
    Members are drawn by seed, restart and step, the same ones for all images. The first of the M directions is the mean
    gradient whatever the draw, so that no pass is made for it.

    The mean is that of the members' losses, of which k's is an unbiased estimate; the authors' code has the loss of
    their mean logits there. A model without members is an ensemble of one, for which nothing is drawn.

    Attributes:
        momentum: μ, of the attack and of the steps on members.
        inner_steps: steps on members, M, over K; the authors take M = 16 of K = 4.
        inner_ratio: β over ε.
    """

    by_member: ClassVar[bool] = True

    inner_steps: int = 4
    inner_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("inner_steps", self.inner_steps >= 1, "to be at least 1, of every member")
        self.require("inner_ratio", self.inner_ratio > 0, "to be above 0, as a part of ε")

    @property
    def passes(self) -> int:
        # Of the whole ensemble: a step on one member is 1/K of one.
        return self.steps * (1 + self.inner_steps)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss, each = LOSSES.get(self.loss), members(model)

        def slope_of(number: int, z: Tensor) -> Tensor:
            return slopes(lambda point: loss(each[number](point), labels), z)

        def rule(z: Tensor, step: int) -> Tensor:
            whole = [slope_of(number, z) for number in range(len(each))]
            mean = torch.stack(whole).mean(dim=0)

            def reduced(point: Tensor, turn: int) -> Tensor:
                if turn == 0:
                    return mean.clone()
                number = key("attack", draws.seed, draws.restart, "members", step, turn) % len(each)
                return slope_of(number, point) - whole[number] + mean

            return follow(
                reduced,
                images,
                eps,
                steps=self.inner_steps * len(each),
                step_ratio=self.inner_ratio,
                momentum=self.momentum,
                start=z,
            )[1]

        return self.follow(rule, images, eps)
