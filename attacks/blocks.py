"""Where the pixels of an image lie that is cut into strips, along one axis."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Strips(NamedTuple):
    """Per image and position along an axis, int64, (B,size) each.

    Attributes:
        number: of the strip, from 0.
        start: first position of that strip.
        length: of that strip.
        local: position within it, from 0.
    """

    number: Tensor
    start: Tensor
    length: Tensor
    local: Tensor


def strips(cuts: Tensor, size: int) -> Strips:
    """The strips between ``cuts`` (B,n−1), int64 in 0..size and ascending: n of them; some may be empty."""
    position = torch.arange(size, device=cuts.device)
    number = (position >= cuts[:, :, None]).sum(dim=1)
    edges = torch.cat([cuts.new_zeros(len(cuts), 1), cuts, cuts.new_full((len(cuts), 1), size)], dim=1)
    start = edges.gather(1, number)
    return Strips(number, start, edges.gather(1, number + 1) - start, position - start)


def per_pixel(values: Tensor, row: Strips, column: Strips) -> Tensor:
    """Of values per block (B,n·n), row after row of blocks, those at every pixel, (B,H,W)."""
    blocks = round(values.shape[1] ** 0.5)
    index = row.number[:, :, None] * blocks + column.number[:, None, :]
    return values.gather(1, index.flatten(1)).view(index.shape)


def read(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The pixels of ``images`` (B,C,H,W) at (row, column), int64 (B,H,W) each, differentiable in the images."""
    flat = images.flatten(2)
    source = (row * images.shape[3] + column).flatten(1)
    return flat.gather(2, source[:, None].expand_as(flat)).view(images.shape)
