"""Momentum ascent through darker copies of the image with a little of others mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import FromImages, losses, mean_slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("admix")
@dataclass(frozen=True, kw_only=True)
class Admix(FromImages):
    """Admix (Wang et al. 2021, algorithm 1, https://arxiv.org/abs/2102.00436), with the authors' settings.

    The gradient is that of (1/(m₁·m₂)) Σ_{x'} Σ_i J((x + η·x')/2^i) with respect to x, with m₂ images x' of other
    classes, drawn anew for every image and step, and i < m₁.

    **An image depends on its batch**: an attack knows no other images than those beside it, so that x' is one of them,
    clean, by a keyed draw. Where all of a batch are of one class it is any other of them; a batch of one image is not
    mixed, which is `sim` m₂ times. The authors' code takes a permutation of the batch as it is by now, whatever the
    classes, the image itself included.

    Attributes:
        scales: m₁, copies of every mixture.
        mixtures: m₂.
        strength: η.
    """

    batch_dependent: ClassVar[bool] = True

    scales: int = 5
    mixtures: int = 3
    strength: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("scales", self.scales >= 1, "to be at least 1, which is the mixture alone")
        self.require("mixtures", self.mixtures >= 1, "to be at least 1; without any it is sim")
        self.require("strength", self.strength >= 0, "to be at least 0, which is sim")

    @property
    def stochastic(self) -> bool:
        return self.strength > 0

    @property
    def passes(self) -> int:
        return self.steps * self.scales * self.mixtures

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        unit = draws.uniform("partners", (self.steps, self.mixtures), images.new_empty(0, dtype=torch.float32))

        def rule(z: Tensor, step: int) -> Tensor:
            others = [self.strength * partners(images, labels, unit[:, step, mix]) for mix in range(self.mixtures)]
            return mean_slopes(
                objective,
                lambda point, copy: (point + others[copy // self.scales]) * 0.5 ** (copy % self.scales),
                self.scales * self.mixtures,
                z,
            )

        return self.follow(rule, images, eps)


def partners(images: Tensor, labels: Tensor, unit: Tensor) -> Tensor:
    """For each image one of those in ``images`` with another label, else any other, as ``unit`` (B,) in (0, 1) has it,
    each as likely; zeros for an image alone, (B,C,H,W)."""
    other = labels[:, None] != labels
    position = torch.arange(len(labels), device=labels.device)
    other = other | (~other.any(dim=1, keepdim=True) & (position[:, None] != position))
    rank = other.cumsum(dim=1)
    count = rank[:, -1:]
    # The first position by which as many as wanted were counted.
    chosen = (rank <= (unit[:, None] * count).long()).sum(dim=1)
    return images[chosen.clamp(max=len(images) - 1)] * (count > 0).view(-1, 1, 1, 1)
