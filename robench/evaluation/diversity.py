"""Diversity of an ensemble (eq. 2 of the DVERGE paper), and what is tracked along training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks._distill import distill
from robench.attacks.pgd import PGD
from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.features import depth
from robench.core.frozen import frozen
from robench.core.rng import Draws, Stream

#: Images that share a feature layer.
GROUP = 10


def diversity(
    ensemble: Ensemble, images: Tensor, labels: Tensor, *, eps: float = 0.07, steps: int = 10, seed: int = 0
) -> Tensor:
    """Mean over i ≠ j of CE(z_j(x'_i(x, x_s)), y) per image, (B,): how little member j sees of what was distilled on i.

    x' is distilled from a source x_s towards x, and y is the label of x, the target. Members run in eval mode; the
    layer is drawn uniformly for every 10 images. Sources are the same images in a keyed order without fixed points.

    Args:
        images: float in [0, 1], (B,C,H,W), that all members classify correctly, on the ensemble's device.

    Raises:
        RobenchError: fewer than two members or two images.
    """
    if len(ensemble) < 2 or len(images) < 2:
        raise RobenchError(
            f"expected at least 2 members and 2 images for the diversity, got {len(ensemble)} and {len(images)}"
        )
    stream = Stream(("diversity", seed))
    order = stream.permutation(len(images))
    sources = images[order[(order.argsort() + 1) % len(order)].to(images.device)]
    values = []
    with frozen(ensemble):
        layers = [depth(member, images[:1]) for member in ensemble.members]
        for start in range(0, len(images), GROUP):
            at = slice(start, start + GROUP)
            position = float(stream.uniform((1,), "layer", start))
            losses = torch.zeros(len(images[at]), device=images.device)
            for i, member in enumerate(ensemble.members):
                layer = 1 + math.floor(position * layers[i])
                crafted = distill(member, sources[at], images[at], layer, eps=eps, steps=steps, step_ratio=1 / steps)
                with torch.no_grad():
                    for j, other in enumerate(ensemble.members):
                        if j != i:
                            losses += F.cross_entropy(other(crafted), labels[at], reduction="none")
            values.append(losses / (len(ensemble) * (len(ensemble) - 1)))
    return torch.cat(values)


def transfer_rate(
    ensemble: Ensemble, images: Tensor, labels: Tensor, *, eps: float, steps: int, restarts: int, seed: int = 0
) -> float:
    """Mean off-diagonal success of PGD between members, in [0, 1]; images as for `diversity`."""
    attack = PGD(steps=steps)
    count = len(ensemble)
    fooled = torch.zeros(count, count, len(images), dtype=torch.bool, device=images.device)
    for i, member in enumerate(ensemble.members):
        for restart in range(restarts):
            draws = Draws.of(range(len(images)), seed=seed, restart=restart)
            crafted = attack(member, images, labels, eps, draws).images
            with frozen(ensemble), torch.no_grad():
                fooled[i] |= ensemble.logits(crafted).argmax(dim=2) != labels
    off = ~torch.eye(count, dtype=torch.bool, device=images.device)
    return float(fooled[off].float().mean())


@dataclass(frozen=True)
class Tracking:
    """What is measured along training: images, attack steps and starts, and the radii.

    ``full()`` is the paper's protocol (Fig. 2); the default is small, and the training loop spaces it so that it takes
    less than 15 % of the time.
    """

    transfer_eps: float
    diversity_eps: float = 0.07
    images: int = 100
    steps: int = 10
    restarts: int = 1

    @classmethod
    def full(cls, transfer_eps: float, diversity_eps: float = 0.07) -> Tracking:
        return cls(transfer_eps, diversity_eps, images=1000, steps=50, restarts=5)

    def on(self, data: Data, device: torch.device) -> Callable[[Ensemble], dict[str, float]]:
        """A function that measures an ensemble on the first test images that all its members classify correctly."""
        pixels = data.test.images[: 2 * self.images].to(device)
        truth = data.test.labels[: 2 * self.images].to(device)

        def measure(ensemble: Ensemble) -> dict[str, float]:
            images = to_images(pixels)
            with frozen(ensemble), torch.no_grad():
                right = (ensemble.logits(images).argmax(dim=2) == truth).all(dim=0)
            images, labels = images[right][: self.images], truth[right][: self.images]
            if len(images) < 2:
                return {"images": float(len(images))}
            return {
                "diversity": float(diversity(ensemble, images, labels, eps=self.diversity_eps).mean()),
                "transferability": transfer_rate(
                    ensemble, images, labels, eps=self.transfer_eps, steps=self.steps, restarts=self.restarts
                ),
                "images": float(len(images)),
                "diversity_eps": self.diversity_eps,
                "transferability_eps": self.transfer_eps,
            }

        return measure
