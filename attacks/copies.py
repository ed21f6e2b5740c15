"""Gradients over copies of the images, neighbours or views, as many at once as memory is sure to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.ascent import drawn_start, gradient
from robench.attacks.iterative import Iterative
from robench.core.drawn import keyed
from robench.core.losses import Loss
from robench.core.rng import Draws

#: Values of images that are differentiated at once, unless one copy of the batch has more: 85 images of CIFAR-10. Small
#: batches get faster by it; a large one keeps the memory that its evaluator has measured.
AT_ONCE = 2**18


class FromImages(Iterative):
    """An attack that starts at the images themselves, as M-DI² does, whatever it draws on the way: its restarts
    are no versions."""

    @property
    def restarts_are_versions(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class FromNeighbours(FromImages):
    """An attack that takes gradients at neighbours of the image too, x + U(−radius·ε, radius·ε), not cut to the box.

    Attributes:
        neighbours: N, drawn anew for every image and step.
        radius: half the side of the neighbourhood over ε.
    """

    neighbours: int = 20
    radius: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        without = f"to be at least 1; without any it is pgd:momentum={self.momentum:g}"
        self.require("neighbours", self.neighbours >= 1, without)
        self.require("radius", self.radius >= 0, "to be at least 0, as a part of ε")

    @property
    def stochastic(self) -> bool:
        return self.radius > 0


def losses(model: nn.Module, loss: Loss, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Of points (N·B,C,H,W), copy after copy of the batch, the losses (N·B,) with respect to ``labels`` (B,)."""
    return lambda points: loss(model(points), labels.repeat(len(points) // len(labels)))


def slopes(objective: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Gradient of every point's own value, of the points' shape; a part that is not finite counts as zero, so that
    means and norms over it are of the others."""
    return gradient(objective, points).nan_to_num_(0.0, 0.0, 0.0)


def parts(copies: int, images: Tensor) -> Iterator[range]:
    """The numbers 0..copies−1 in parts of `AT_ONCE` values of images each, and of one copy of the batch at least; one
    by one where draws of the model are keyed by image."""
    size = 1 if keyed() else max(1, AT_ONCE // max(1, images.numel()))
    for first in range(0, copies, size):
        yield range(first, min(first + size, copies))


def mean_slopes(
    objective: Callable[[Tensor], Tensor], view: Callable[[Tensor, int], Tensor], copies: int, images: Tensor
) -> Tensor:
    """Gradient of (1/N) Σ_i objective(view(z, i)) with respect to z at ``images``, through the views, (B,C,H,W).

    Args:
        objective: points (n·B,C,H,W) -> values (n·B,), each of its own point.
        view: (z, number of the copy) -> a copy of z, (B,C,H,W).
    """
    total = torch.zeros_like(images)
    for part in parts(copies, images):

        def seen(z: Tensor, part: range = part) -> Tensor:
            return objective(torch.cat([view(z, copy) for copy in part]))

        total += slopes(seen, images)
    return total / copies


def neighbour(images: Tensor, radius: Tensor, draws: Draws, step: int, copy: int) -> Tensor:
    """x + U(−radius, radius), (B,C,H,W), not cut to the box; another draw for every step and copy.

    Args:
        radius: one per image, (B,).
    """
    return drawn_start(images, radius, draws, f"neighbour/{step}/{copy}")
