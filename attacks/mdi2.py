"""Momentum ascent through random resizing and padding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.ascent import drawn_start
from robench.attacks.base import ATTACKS
from robench.attacks.iterative import Iterative
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("mdi2")
@dataclass(frozen=True, kw_only=True)
class MDI2(Iterative):
    """M-DI²-FGSM (Xie et al. 2019, https://arxiv.org/abs/1803.06978, eq. 4–6).

    At each step each image is, with probability p, resized (nearest neighbour) to r ~ U{⌈smallest·S⌉..S} and padded
    with zeros at a random offset, back to S. The paper resizes 299 pixels to 299..330 and pads to 330; networks for
    small images take one size, so that here S stays and the content shrinks by up to 1/8, about as much.

    Attributes:
        probability: p, drawn per image and step.
        smallest: least side of the content over that of the image. The sides of an image that is not square shrink
            together.
        random_start: start from x + U(−ε, ε) instead of x; the paper does not.
    """

    steps: int = 100
    step_ratio: float = 0.2
    probability: float = 0.5
    smallest: float = 0.875
    random_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("probability", 0 <= self.probability <= 1, "in [0, 1]")
        self.require("smallest", 0 < self.smallest <= 1, "in (0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.random_start or (self.probability > 0 and self.smallest < 1)

    @property
    def restarts_are_versions(self) -> bool:
        # The study's three starts are of PGD: M-DI² draws its views, and starts at the image.
        return self.random_start

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss = LOSSES.get(self.loss)
        start = drawn_start(images, eps, draws) if self.random_start else None
        # In float32 whatever the images are in, so that every dtype sees the same geometry.
        unit = draws.uniform("diversity", (self.steps, 4), images.new_empty(0, dtype=torch.float32))
        return self.ascend(
            lambda z, step: loss(model(diversify(z, unit[:, step], self.probability, self.smallest)), labels),
            images,
            eps,
            start,
        )


def diversify(images: Tensor, unit: Tensor, probability: float, smallest: float) -> Tensor:
    """D(x; p): each image resized and padded, or not, (B,C,H,W); differentiable in the images.

    One gather: every pixel reads at most one source pixel, and none is read twice, so that the gradient is exact and
    does not depend on the order of atomic additions.

    Args:
        unit: uniform in (0, 1), (B, 4): whether, how small, from the top, from the left.
    """
    applied = unit[:, 0] < probability
    row, inside_rows = _axis(images.shape[2], smallest, applied, unit[:, 1], unit[:, 2])
    column, inside_columns = _axis(images.shape[3], smallest, applied, unit[:, 1], unit[:, 3])
    source = (row[:, :, None] * images.shape[3] + column[:, None, :]).flatten(1)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    flat = images.flatten(2)
    return flat.gather(2, source[:, None].expand_as(flat)).view(images.shape) * inside


def _axis(size: int, smallest: float, applied: Tensor, shrink: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Per position of the output the source position, int64, and whether it lies in the content, both (B, size)."""
    least = math.ceil(smallest * size - 1e-9)  # .7 * 10 is a little more than 7 in floats
    side = torch.where(applied, least + (shrink * (size - least + 1)).long(), size)[:, None]
    position = torch.arange(size, device=shrink.device) - (shift[:, None] * (size - side + 1)).long()
    # In integers: interpolate's "nearest" rounds the scale first and is off by one at some sizes.
    source = (position * size // side).clamp(0, size - 1)
    return source, (position >= 0) & (position < side)
