"""Attacks in parts, each on the images that the parts before it left standing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robench.core.drawn import mixed_over_draws, part_of_draws
from robench.core.losses import margin
from robench.core.rng import Draws


class Standing(NamedTuple):
    """The images that still stand; ``rows`` are their places in the batch."""

    rows: Tensor
    images: Tensor
    labels: Tensor
    eps: Tensor
    draws: Draws


Part = Callable[[Standing], Tensor]


class Least:
    """Per sample, of the images that it was shown, that with the least margin z_y − max_{c≠y} z_c: a wrong one, if any
    was.

    Attributes:
        images: (B,C,H,W).
        margin: (B,), infinite where nothing was shown.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.margin = images.new_full((len(images),), float("inf"))

    def see(self, images: Tensor, outputs: Tensor) -> None:
        """Takes note of images (B,C,H,W), and of what the model returns for them, (B,K)."""
        found = margin(outputs, self.labels).to(self.margin)
        closer = found < self.margin
        self.images = torch.where(closer.view(-1, 1, 1, 1), images, self.images)
        self.margin = torch.where(closer, found, self.margin)


def in_turn(
    parts: Iterable[Part], model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Runs the parts one after the other, each on what ``model`` still gets right; all images are given to the first.

    The host waits for the verdicts after each part, and nowhere else.

    Returns:
        Images (B,C,H,W): that of the part that took the sample, or of all parts that with the least margin. And the
        number of the part that took the sample, int64 (B,), −1 where it stands.
    """
    best, lowest = images.clone(), images.new_full((len(images),), float("inf"))
    taken = torch.full_like(labels, -1)
    for number, part in enumerate(parts):
        rows, places = _standing(taken)
        count = len(rows)
        if not count:
            break
        if count == 1:  # kernels for a batch of one round differently
            rows, places = rows.repeat(2), places.repeat(2)
        own = draws.only(places)
        with part_of_draws(number, own.samples):
            found = part(Standing(rows, images[rows], labels[rows], eps[rows], own))
            with torch.no_grad():
                outputs = mixed_over_draws(partial(model, found))
        rows, found, outputs = rows[:count], found[:count], outputs[:count]
        gap, wrong = margin(outputs, labels[rows]).to(lowest), outputs.argmax(dim=1) != labels[rows]
        closer = wrong | (gap < lowest[rows])
        best[rows] = torch.where(closer.view(-1, 1, 1, 1), found, best[rows])
        lowest[rows] = torch.where(closer, gap, lowest[rows])
        taken[rows] = torch.where(wrong, number, taken[rows])
    return best, taken


def _standing(taken: Tensor) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """The rows that no part took yet, on the device and on the host."""
    rows = (taken < 0).nonzero()[:, 0]
    return rows, rows.cpu().numpy()
