"""FASTEN's crafting: sign steps away from an image's own features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robench.attacks.ascent import gradient
from robench.core import linf
from robench.core.features import features
from robench.core.frozen import BatchNormMode, batchnorm


def depart(
    model: nn.Module,
    images: Tensor,
    start: Tensor,
    layer: int,
    *,
    eps: float,
    steps: int,
    step_ratio: float,
    project_start: bool = True,
    craft_bn: BatchNormMode = "train",
) -> Tensor:
    """x' within ε of x with features f^l far from those of x (Huang et al. 2023, IEEE TIFS), (B,C,H,W).

    Sign ascent on ‖f^l(z) − f^l(x)‖²; the forward pass ends at layer l, and f^l(x) is computed once.

    Args:
        start: the first z, (B,C,H,W); at the images themselves the gradient is zero.
        layer: l, see `robench.core.features`.
        craft_bn: see `robench.core.frozen.batchnorm`.
        project_start: whether the start is projected onto the ball, or only onto the box.

    Returns:
        (B,C,H,W) in the ball and in the box; no graph attached.
    """
    lower, upper = linf.bounds(images, linf.as_eps(eps, images))
    z = start.clamp(lower, upper) if project_start else start.clamp(0, 1)
    with batchnorm(model, craft_bn):
        with torch.no_grad():
            wanted = features(model, images, layer)
        for _ in range(steps):
            slope = gradient(lambda x: (features(model, x, layer) - wanted).square().flatten(1).mean(dim=1), z)
            z = (z + step_ratio * eps * slope.nan_to_num_(0.0, 0.0, 0.0).sign()).clamp(lower, upper)
    return z
