"""The momentum-sign loop written once more, plainly, for one image: what other attacks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.base import Attack
from robench.core.rng import Draws

#: Of several samples of a data set, with ε of their own.
SAMPLES = (3, 1, 20, 8)
RADII = (0.1, 0.03, 0.2, 0.06)


def slope(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> Tensor:
    """∇ of the cross-entropy at one image (C,H,W)."""
    point = image.clone().requires_grad_(True)
    F.cross_entropy(model(point[None]), label[None]).backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None
    return point.grad


def climb(
    image: Tensor,
    eps: float,
    attack: Attack,
    rule: Callable[[Tensor, int], Tensor],
    pixels: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Tensor:
    """The last iterate for one image; ``pixels`` says of the momentum what each pixel's step is multiplied by."""
    steps, ratio, momentum = (getattr(attack, name) for name in ("steps", "step_ratio", "momentum"))
    adversarial, velocity = image.clone(), torch.zeros_like(image)
    for step in range(steps):
        direction = rule(adversarial, step)
        velocity = momentum * velocity + direction / direction.abs().sum()
        adversarial = adversarial + ratio * eps * pixels(velocity) * velocity.sign()
        adversarial = torch.min(torch.max(adversarial, image - eps), image + eps).clamp(0, 1)
    return adversarial


def noises(draws: Draws, image: Tensor, radius: float, step: int, copies: int) -> list[Tensor]:
    """U(−radius, radius) for every copy of one image, as the attacks draw it."""
    return [
        radius * (2 * draws.uniform(f"neighbour/{step}/{copy}", image.shape, image)[0] - 1) for copy in range(copies)
    ]


def compare(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    one: Callable[[Tensor, Tensor, float, Draws], Tensor],
) -> None:
    """That ``attack`` on a batch is ``one`` (image, label, ε, draws) on each of its images, in float64."""
    count = len(SAMPLES)
    eps = torch.tensor(RADII, dtype=torch.float64)
    found = attack(model, images[:count], labels[:count], eps, Draws.of(SAMPLES)).images
    wanted = [
        one(image, label, radius, Draws.of([sample]))
        for image, label, radius, sample in zip(images, labels, RADII, SAMPLES, strict=False)
    ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-12)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many images each forward pass through ``model`` differentiates, within."""
    counts: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            counts.append(len(args[0]))

    handle = model.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()
