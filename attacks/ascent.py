"""The one momentum-sign loop: every attack that follows gradients, adversarial training and DVERGE's distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robench.core import linf
from robench.core.drawn import over_draws
from robench.core.errors import RobenchError
from robench.core.rng import Draws

#: (z, step) -> what to raise, one value per sample (B,).
Objective = Callable[[Tensor, int], Tensor]
#: (z, step) -> the direction to follow in place of the gradient, (B,C,H,W).
Rule = Callable[[Tensor, int], Tensor]


def gradient(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of Σ_b objective(images)_b with respect to the images alone, (B,C,H,W): no parameter gradients.

    Of a model that draws at inference it is the mean over draws (Athalye et al. 2018, §2.2, expectation over
    transformation, https://arxiv.org/abs/1707.07397), within `robench.core.drawn.model_draws`; ``objective`` is called
    once for each.
    """
    return over_draws(lambda: _slope(objective, images))


def _slope(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
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
    """The last iterate of `follow` along the gradient of ``objective``: PGD, or with μ > 0 MI-FGSM.

    Args:
        objective: (z, step) -> what to raise, one value per sample (B,).
        images: centre of the ball, (B,C,H,W); eps: its radius, (B,).
        step_ratio: α/ε.
        start: the first iterate (clipped here); the images themselves by default.

    Returns:
        (B,C,H,W) in the ball and in the box; no graph attached.
    """

    def rule(z: Tensor, step: int) -> Tensor:
        return gradient(lambda point: objective(point, step), z)

    return follow(rule, images, eps, steps=steps, step_ratio=step_ratio, momentum=momentum, start=start)[0]


def follow(
    rule: Rule,
    images: Tensor,
    eps: Tensor,
    *,
    steps: int,
    step_ratio: float,
    momentum: float = 0.0,
    start: Tensor | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """z ← Π(z + α·sign g), g ← μ·g + r/max(‖r‖₁, 1e-12) per sample (Dong et al. 2018, eq. 6–7), r what the rule says.

    With μ = 0 this is PGD (Madry et al. 2018): the sign makes the normalisation void, so it is skipped. A gradient
    that is zero leaves a sample where it is for that step only; a part that is not finite counts as zero, as with
    momentum it would stay (sign(NaN) is 0).

    Args:
        rule: called once for each step, in order; what it returns may be changed.
        images: centre of the ball, (B,C,H,W); eps: its radius, (B,).
        step_ratio: α/ε.
        start: the first iterate (clipped here); the images themselves by default.
        scale: g -> what each pixel's step is multiplied by, (B,C,H,W); 1 by default.

    Returns:
        The last z, (B,C,H,W) in the ball and in the box, and the last g, (B,C,H,W); no graph attached.
    """
    lower, upper = linf.bounds(images, eps)
    alpha = (step_ratio * eps).view(-1, 1, 1, 1)
    z = (images if start is None else start).detach().clone().clamp_(lower, upper)
    velocity = torch.zeros_like(z)
    for step in range(steps):
        slope = rule(z, step).nan_to_num_(0.0, 0.0, 0.0)
        if momentum:
            length = torch.linalg.vector_norm(slope, 1, dim=(1, 2, 3), keepdim=True).clamp_(min=1e-12)
            velocity.mul_(momentum).addcdiv_(slope, length)
        else:
            velocity = slope
        size = alpha if scale is None else alpha * scale(velocity)
        z = torch.addcmul(z, size, velocity.sign()).clamp_(lower, upper)
    return z, velocity


def drawn_start(images: Tensor, eps: Tensor, draws: Draws, purpose: str = "start") -> Tensor:
    """`uniform_start` of noise that is drawn for ``purpose``."""
    return uniform_start(images, eps, draws.uniform(purpose, images.shape[1:], images))


def uniform_start(images: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    """x + U(−ε, ε), (B,C,H,W), from noise uniform in (0, 1): one draw serves every ε."""
    return images + (2 * noise - 1) * eps.view(-1, 1, 1, 1)
