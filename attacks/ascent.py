"""The one momentum-sign loop: PGD, M-DI², SGM, adversarial training and DVERGE's distillation all run it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robench.core import linf
from robench.core.errors import RobenchError

Objective = Callable[[Tensor, int], Tensor]


def gradient(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of Σ_b objective(images)_b with respect to the images alone, (B,C,H,W): no parameter gradients."""
    images = images.detach().requires_grad_(True)
    # A caller's no_grad is meant for its own code.
    with torch.enable_grad():
        value = objective(images).sum()
    if not value.requires_grad:
        raise RobenchError(
            "the model's output does not depend differentiably on its input; remove `no_grad`, `detach` and argmax "
            "from its forward pass"
        )
    (slope,) = torch.autograd.grad(value, images)
    return slope


def ascend(
    objective: Objective,
    images: Tensor,
    eps: Tensor,
    *,
    steps: int,
    step_ratio: float,
    momentum: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """The last iterate of z ← Π(z + α·sign g), g ← μ·g + ∇/max(‖∇‖₁, 1e-12) per sample (Dong et al. 2018, eq. 6–7).

    With μ = 0 this is PGD (Madry et al. 2018): the sign makes the normalisation void, so it is skipped. A gradient
    that is zero leaves a sample where it is for that step only; a part that is not finite counts as zero, as with
    momentum it would stay (sign(NaN) is 0).

    Args:
        objective: (z, step) -> what to raise, one value per sample (B,).
        images: centre of the ball, (B,C,H,W); eps: its radius, (B,).
        step_ratio: α/ε.
        start: the first iterate (clipped here); the images themselves by default.

    Returns:
        (B,C,H,W) in the ball and in the box; no graph attached.
    """
    lower, upper = linf.bounds(images, eps)
    alpha = (step_ratio * eps).view(-1, 1, 1, 1)
    z = (images if start is None else start).detach().clone().clamp_(lower, upper)
    velocity = torch.zeros_like(z) if momentum else None
    for step in range(steps):
        slope = gradient(lambda point, step=step: objective(point, step), z)  # type: ignore[misc]
        slope = slope.nan_to_num_(0.0, 0.0, 0.0)
        if velocity is not None:
            length = torch.linalg.vector_norm(slope, 1, dim=(1, 2, 3), keepdim=True).clamp_(min=1e-12)
            slope = velocity.mul_(momentum).addcdiv_(slope, length)
        z = torch.addcmul(z, alpha, slope.sign()).clamp_(lower, upper)
    return z


def uniform_start(images: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    """x + U(−ε, ε), (B,C,H,W), from noise uniform in (0, 1): one draw serves every ε."""
    return images + (2 * noise - 1) * eps.view(-1, 1, 1, 1)
