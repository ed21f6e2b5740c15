"""The ℓ∞ ball around an image, cut with the box [0, 1]: the only projection in robench."""

from __future__ import annotations

import torch
from torch import Tensor

from robench.core.errors import RobenchError


def as_eps(eps: float | Tensor, images: Tensor) -> Tensor:
    """ε as one value per image, shape (B,), in the images' dtype and on their device.

    Raises:
        RobenchError: ε outside [0, 1] or of a shape other than () and (B,).
    """
    if isinstance(eps, Tensor):
        if eps.shape != (len(images),):
            raise RobenchError(f"expected `eps` to be a number or of shape ({len(images)},), got {tuple(eps.shape)}")
        return eps.to(images)
    if not 0 <= eps <= 1:
        raise RobenchError(f"expected `eps` in [0, 1], in units of a pixel in [0, 1], got {eps}; 8/255 is 0.03137")
    return torch.full((len(images),), eps, dtype=images.dtype, device=images.device)


def bounds(images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner, each (B,C,H,W), of the ε-ball within the box. One clamp to them is the projection."""
    radius = eps.view(-1, 1, 1, 1)
    return (images - radius).clamp_(min=0), (images + radius).clamp_(max=1)


def distance(adversarial: Tensor, images: Tensor) -> Tensor:
    """ℓ∞ distance per image, shape (B,)."""
    return (adversarial - images).abs().flatten(1).amax(dim=1)
