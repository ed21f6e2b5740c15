"""Momentum ascent through copies of the image whose blocks are each transformed in a way of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.blocks import Strips, per_pixel, read, strips
from robench.attacks.copies import FromImages, losses, mean_slopes
from robench.core.errors import RobenchError
from robench.core.losses import LOSSES
from robench.core.rng import Draws

#: What may happen to a block, each as likely.
OPERATIONS = (
    "shift down",
    "shift right",
    "flip down",
    "flip right",
    "turn",
    "scale",
    "noise",
    "resize",
    "low frequencies",
    "dropout",
)
#: Probability that dropout zeroes a channel of a block.
DROPPED = 0.1


@ATTACKS.register("sia")
@dataclass(frozen=True, kw_only=True)
class SIA(FromImages):
    """Structure Invariant Attack (Wang et al. 2023, algorithm 1, https://arxiv.org/abs/2309.14700), with the authors'
    settings.

    The gradient is the mean of those through N copies. Each is cut into s·s blocks at random lines, s−1 different
    ones along either axis, and each block is, by its own draw: shifted in a circle, downwards or to the right;
    mirrored, either way; turned by 180°; multiplied by U(0, 1); given noise U(±16/255) and cut to the box; resized to
    .8 and back, bilinear; freed of the upper 40 % of its frequencies (DCT) along either axis; or a tenth of its
    channels is dropped and the others divided by .9. TransferAttack leaves the last three out.

    The authors' code draws once for the whole batch; of a block of one or two pixels its DCT drops all frequencies,
    where it means to drop none; and it takes the resized number of rows from that of columns.

    Attributes:
        copies: N, drawn anew for every image and step.
        blocks: s, along either axis.
        noise: greatest noise on a pixel, whatever ε, as in the authors' code.
    """

    copies: int = 20
    blocks: int = 3
    noise: float = 16 / 255

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("copies", self.copies >= 1, "to be at least 1")
        self.require("blocks", self.blocks >= 1, "to be at least 1, which is the whole image")
        self.require("noise", 0 <= self.noise <= 1, "in [0, 1], in units of a pixel in [0, 1]")

    @property
    def passes(self) -> int:
        return self.steps * self.copies

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        if self.blocks > min(images.shape[2:]):
            raise RobenchError(
                f"`blocks={self.blocks}` of attack {self.name!r} cuts an image of {images.shape[2]}x{images.shape[3]} "
                f"pixels into strips of less than one; take {min(images.shape[2:])} at most"
            )
        objective = losses(model, LOSSES.get(self.loss), labels)
        count = numbers(images, self.blocks)

        def rule(z: Tensor, step: int) -> Tensor:
            unit = draws.uniform(f"blocks/{step}", (self.copies, count), images.new_empty(0, dtype=torch.float32))

            def view(point: Tensor, copy: int) -> Tensor:
                noise = draws.uniform(f"neighbour/{step}/{copy}", images.shape[1:], images)
                return transformed(point, unit[:, copy], self.noise * (2 * noise - 1), self.blocks)

            return mean_slopes(objective, view, self.copies, z)

        return self.follow(rule, images, eps)


def numbers(images: Tensor, blocks: int) -> int:
    """How many draws `transformed` takes per image."""
    _, channels, height, width = images.shape
    return height - 1 + width - 1 + (2 + channels) * blocks**2


def transformed(images: Tensor, unit: Tensor, noise: Tensor, blocks: int) -> Tensor:
    """Each image with its blocks transformed, (B,C,H,W); differentiable in the images.

    What moves pixels is one gather that reads each of them once, and what blends them two matrix products, so that the
    gradient does not depend on the order of atomic additions. All of it is computed for all blocks.

    Args:
        unit: uniform in (0, 1), (B, `numbers`): the lines between rows, between columns, per block the operation and
            how much of it, per block and channel whether it is dropped.
        noise: (B,C,H,W).
    """
    channels, height, width = images.shape[1:]
    rows, columns, kinds, amounts, kept = torch.split(
        unit, [height - 1, width - 1, blocks**2, blocks**2, channels * blocks**2], dim=1
    )
    row, column = (
        strips(keys.argsort(dim=1, stable=True)[:, : blocks - 1].sort(dim=1).values + 1, size)
        for keys, size in ((rows, height), (columns, width))
    )
    kind = per_pixel((kinds * len(OPERATIONS)).long(), row, column)
    amount = per_pixel(amounts, row, column)

    def doing(*names: str) -> Tensor:
        """Where the block is treated so, (B,H,W)."""
        return torch.stack([kind == OPERATIONS.index(name) for name in names]).any(dim=0)

    tall, wide = row.length[:, :, None], column.length[:, None, :]
    y, x = row.local[:, :, None], column.local[:, None, :]
    y = torch.where(doing("flip down", "turn"), tall - 1 - y, y)
    x = torch.where(doing("flip right", "turn"), wide - 1 - x, x)
    # In float32 whatever the images are in, so that every dtype sees the same geometry.
    y = (y - (amount * tall).long() * doing("shift down")) % tall
    x = (x - (amount * wide).long() * doing("shift right")) % wide
    moved = read(images, row.start[:, :, None] + y, column.start[:, None, :] + x)
    dropped = torch.stack([per_pixel(each, row, column) < DROPPED for each in kept.chunk(channels, dim=1)], dim=1)
    factor = torch.where(doing("scale"), amount, 1.0).to(images)[:, None]
    factor = torch.where(doing("dropout")[:, None], (~dropped).to(images) / (1 - DROPPED), factor)
    result = moved * factor
    result = torch.where(doing("noise")[:, None], (images + noise).clamp(0, 1), result)
    for name, operator in (("resize", resizing), ("low frequencies", low_frequencies)):
        down, right = (operator(each).to(images)[:, None] for each in (row, column))
        result = torch.where(doing(name)[:, None], down @ images @ right.mT, result)
    return result


def resizing(axis: Strips) -> Tensor:
    """The matrix (B,size,size) that shrinks every strip to ⌊.8·L⌋+1 pixels and stretches it to L again, bilinear."""
    same = axis.number[:, :, None] == axis.number[:, None, :]
    local, length = axis.local.double(), axis.length.double()
    small = axis.length * 4 // 5 + 1
    inside = same & (axis.local < small)[:, None, :]  # column: a pixel of the small strip
    down = ((local + 0.5) * length / small - 0.5).clamp(min=0).minimum(length - 1)
    up = ((local + 0.5) * small / length - 0.5).clamp(min=0).minimum(small - 1.0)
    shrink = (1 - (down[:, :, None] - local[:, None, :]).abs()).clamp(min=0) * inside.mT
    stretch = (1 - (up[:, :, None] - local[:, None, :]).abs()).clamp(min=0) * inside
    return stretch @ shrink


def low_frequencies(axis: Strips) -> Tensor:
    """The matrix (B,size,size) that keeps of every strip all but its ⌊.4·L⌋ highest frequencies of the DCT-II."""
    same = axis.number[:, :, None] == axis.number[:, None, :]
    local, length = axis.local.double(), axis.length[:, :, None].double()
    frequency = local[:, :, None]
    wave = (math.pi * (2 * local[:, None, :] + 1) * frequency / (2 * length)).cos()
    basis = wave * ((2 - (frequency == 0).double()) / length).sqrt() * same
    kept = (axis.local < axis.length - axis.length * 2 // 5)[:, :, None]
    return (basis * kept).mT @ basis
