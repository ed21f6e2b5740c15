"""Momentum ascent through copies of the image whose blocks are shuffled and turned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.blocks import Strips, per_pixel, read, strips
from robench.attacks.copies import FromImages, losses, mean_slopes
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("bsr")
@dataclass(frozen=True, kw_only=True)
class BSR(FromImages):
    """Block Shuffle and Rotation (Wang et al. 2024, algorithm 1, https://arxiv.org/abs/2308.10299), with the authors'
    settings.

    The gradient is the mean of those through N copies. Each is cut into n strips of rows and n of columns, of random
    lengths; the strips of either kind change places; and every block turns about its centre by U(−τ, τ), bilinear,
    zeros where nothing turns in. The authors' code draws once for the whole batch but for the angles, and those from
    a normal distribution of .2 radians, cut at .4 = 23°; TransferAttack cuts every strip of one axis by itself, turns
    whole strips, and takes n = 3.

    Attributes:
        copies: N, drawn anew for every image and step.
        blocks: n, along either axis.
        degrees: τ.
    """

    copies: int = 20
    blocks: int = 2
    degrees: float = 24.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("copies", self.copies >= 1, "to be at least 1")
        self.require("blocks", self.blocks >= 1, "to be at least 1, which turns the whole image")
        self.require("degrees", 0 <= self.degrees <= 180, "in [0, 180]")

    @property
    def stochastic(self) -> bool:
        return self.blocks > 1 or self.degrees > 0

    @property
    def passes(self) -> int:
        return self.steps * self.copies

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        count = 4 * self.blocks + self.blocks**2
        unit = draws.uniform("blocks", (self.steps, self.copies, count), images.new_empty(0, dtype=torch.float32))

        def rule(z: Tensor, step: int) -> Tensor:
            def view(point: Tensor, copy: int) -> Tensor:
                return shuffled(point, unit[:, step, copy], self.blocks, self.degrees)

            return mean_slopes(objective, view, self.copies, z)

        return self.follow(rule, images, eps)


def shuffled(images: Tensor, unit: Tensor, blocks: int, degrees: float) -> Tensor:
    """Each image with its blocks shuffled and turned, (B,C,H,W); differentiable in the images.

    Four gathers, one for each corner of the bilinear interpolation. A grid that is turned has two of its points at most
    in a square as large as one of its own, so that no pixel gets more than two terms that are not zero from a gather:
    its gradient does not depend on the order of atomic additions.

    Args:
        unit: uniform in (0, 1), (B, 4·blocks + blocks²): lengths and order of the rows, of the columns, the angles.
    """
    row_lengths, row_order, column_lengths, column_order, turns = torch.split(
        unit.double(), [blocks, blocks, blocks, blocks, blocks**2], dim=1
    )
    # In float64 whatever the images are in, so that every dtype and device sees the same geometry.
    row, row_start = _shuffled_axis(row_lengths, row_order, images.shape[2])
    column, column_start = _shuffled_axis(column_lengths, column_order, images.shape[3])
    angle = per_pixel((2 * turns - 1) * math.radians(degrees), row, column)
    down, right = ((each.local - (each.length - 1) / 2) for each in (row, column))
    cos, sin = angle.cos(), angle.sin()
    y = cos * down[:, :, None] + sin * right[:, None, :] + ((row.length - 1) / 2)[:, :, None]
    x = cos * right[:, None, :] - sin * down[:, :, None] + ((column.length - 1) / 2)[:, None, :]
    result = torch.zeros_like(images)
    for corner in range(4):
        at_y, at_x = y.floor() + corner // 2, x.floor() + corner % 2
        weight = (1 - (y - at_y).abs()) * (1 - (x - at_x).abs())
        height, width = row.length[:, :, None], column.length[:, None, :]
        weight = weight * ((at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width))
        at_y, at_x = (
            torch.minimum(at_y.long().clamp(min=0), height - 1),
            torch.minimum(at_x.long().clamp(min=0), width - 1),
        )
        result = result + weight.to(images)[:, None] * read(
            images, row_start[:, :, None] + at_y, column_start[:, None, :] + at_x
        )
    return result


def _shuffled_axis(lengths: Tensor, order: Tensor, size: int) -> tuple[Strips, Tensor]:
    """The strips as they lie afterwards, and where the strip at every position began before, (B,size)."""
    order = order.argsort(dim=1, stable=True)
    ends = (lengths.cumsum(dim=1) / lengths.sum(dim=1, keepdim=True) * size).round().long()
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1)
    after = strips((ends - starts).gather(1, order).cumsum(dim=1)[:, :-1], size)
    return after, starts.gather(1, order).gather(1, after.number)
