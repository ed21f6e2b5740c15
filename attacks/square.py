"""Square: random search, without a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS, Attack
from robench.core import linf
from robench.core.drawn import mixed_over_draws
from robench.core.losses import margin
from robench.core.rng import Draws

#: Of 10,000 queries, those after which the squares' area is halved (section 4.1 of the paper).
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@ATTACKS.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square for ℓ∞ (Andriushchenko et al. 2020, algorithms 1 and 2, https://arxiv.org/abs/1912.00049), untargeted.

    From vertical stripes of ±ε, every query writes a square of ±ε, one sign per channel, at a random place, and keeps
    it where the margin gets smaller. The margin decides, as in the paper, whatever ``loss`` says. Unlike in the paper's
    code, a query whose square changes nothing is made all the same.

    Attributes:
        queries: forward passes per image and restart.
        area: share of the image that the first squares cover, p in the paper.
    """

    gradient_free: ClassVar[bool] = True

    loss: str = "cw"
    queries: int = 1000
    area: float = 0.8

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        batch, channels, height, width = images.shape
        lower, upper = linf.bounds(images, eps)
        radius = eps.view(-1, 1, 1, 1)
        stripes = (draws.uniform("stripes", (channels, 1, width), images) - 0.5).sign()
        best = (images + radius * stripes).clamp(lower, upper)
        # Per query and image: row, column, and a sign per channel.
        numbers = draws.uniform("squares", (self.queries, 2 + channels), images)
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        with torch.no_grad():
            lowest = margin(mixed_over_draws(partial(model, best)), labels)
            for query in range(self.queries - 1):
                side = self.side(query, height, width)
                top = (numbers[:, query, 0] * (height - side + 1)).floor().view(-1, 1, 1, 1)
                left = (numbers[:, query, 1] * (width - side + 1)).floor().view(-1, 1, 1, 1)
                signs = (numbers[:, query, 2:] - 0.5).sign().view(batch, channels, 1, 1)
                inside = ((rows.view(-1, 1) - top) * (top + side - 1 - rows.view(-1, 1)) >= 0) & (
                    (columns - left) * (left + side - 1 - columns) >= 0
                )
                tried = torch.where(inside, (images + radius * signs).clamp(lower, upper), best)
                found = margin(mixed_over_draws(partial(model, tried)), labels)
                better = found < lowest
                best = torch.where(better.view(-1, 1, 1, 1), tried, best)
                lowest = torch.where(better, found, lowest)
        return best

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the squares of a query, in pixels."""
        at = 10_000 * query / self.queries
        share: float = self.area * 0.5 ** sum(at > step for step in HALVED)
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)
