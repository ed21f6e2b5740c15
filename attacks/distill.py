"""DVERGE's feature distillation: the one loop, descending a distance between features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robench.attacks.ascent import ascend
from robench.core.features import features
from robench.core.linf import as_eps


def distill(
    model: nn.Module,
    source: Tensor,
    target: Tensor,
    layer: int,
    *,
    eps: float,
    steps: int = 10,
    step_ratio: float = 0.1,
) -> Tensor:
    """x'(x, x_s): within ε of x_s, with features f^l close to those of x (Yang et al. 2020, eq. 1), (B,C,H,W).

    Momentum-sign descent on ‖f^l(z) − f^l(x)‖² from z = x_s, without a random start. The forward pass ends at layer
    l; f^l(x) is computed once, where the authors' code repeats it at every step: the images are the same, and in
    train mode BatchNorm's running statistics move 11 times instead of 20.

    Args:
        source: x_s (B,C,H,W) in [0, 1]; target: x, the same shape.
        layer: l, see `robench.core.features`.

    Returns:
        (B,C,H,W); no graph attached. BatchNorm runs in the mode that the model is in.
    """
    with torch.no_grad():
        wanted = features(model, target, layer)

    def closeness(z: Tensor, step: int) -> Tensor:
        return -(features(model, z, layer) - wanted).square().flatten(1).mean(dim=1)

    return ascend(
        closeness,
        source,
        as_eps(eps, source),
        steps=steps,
        step_ratio=step_ratio,
        momentum=1.0,
    )
