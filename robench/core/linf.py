"""The ℓ∞ ball around an image, cut with the box [0, 1]: the only projection in robench."""

from __future__ import annotations

import torch
from torch import Tensor

from robench.core.errors import RobenchError


def as_eps(eps: float | Tensor, images: Tensor) -> Tensor:
    """ε as one value per image, shape (B,), in the images' dtype and on their device.

    Raises:
        RobenchError: ε outside [0, 1], NaN, or of a shape other than () and (B,); images that are not floating point.
    """
    if not images.is_floating_point():
        raise RobenchError(f"expected `images` as float in [0, 1], got {images.dtype}; divide uint8 by 255")
    if isinstance(eps, float) and 0 <= eps <= 1:
        return images.new_full((len(images),), eps)  # a copy to a GPU would wait for it
    try:
        values = eps if isinstance(eps, Tensor) else torch.as_tensor(eps, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RobenchError(f"expected `eps` to be a number or of shape ({len(images)},), got {eps!r}") from error
    if values.shape not in ((), (len(images),)):
        raise RobenchError(f"expected `eps` to be a number or of shape ({len(images)},), got {tuple(values.shape)}")
    if values.is_complex() or not bool(((values >= 0) & (values <= 1)).all()):
        got = eps if values.ndim == 0 else values.tolist()
        raise RobenchError(f"expected `eps` in [0, 1], in units of a pixel in [0, 1], got {got}; 8/255 is 0.03137")
    return values.to(images).expand(len(images)).clone()


def bounds(images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner, each (B,C,H,W), of the ε-ball within the box. One clamp to them is the projection."""
    radius = eps.view(-1, 1, 1, 1)
    return (images - radius).clamp_(min=0), (images + radius).clamp_(max=1)


def distance(adversarial: Tensor, images: Tensor) -> Tensor:
    """ℓ∞ distance per image, shape (B,)."""
    return (adversarial - images).abs().flatten(1).amax(dim=1)
