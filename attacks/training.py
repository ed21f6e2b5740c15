"""The attack of adversarial training: PGD on a network that is being trained."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import ascend, uniform_start
from robench.core.errors import RobenchError
from robench.core.frozen import BatchNormMode, batchnorm
from robench.core.linf import as_eps
from robench.core.rng import Stream


def craft(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    draws: Stream | Tensor,
    *,
    eps: float,
    steps: int,
    step_ratio: float,
    craft_bn: BatchNormMode,
    objective: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """PGD from x + U(−ε, ε) on CE(model(x), y) (Madry et al. 2018, https://arxiv.org/abs/1706.06083), (B,C,H,W).

    Plain sign steps of size ``step_ratio``·ε; on an ensemble, which returns log p̄, the loss is −log p̄_y.

    Args:
        model: as training has it; images -> logits (B,K) or log-probabilities.
        draws: keyed to this batch and this model; the start is the only draw. Or its noise, uniform in (0, 1), of the
            images' shape, where they are a part of the batch.
        craft_bn: see `robench.core.frozen.batchnorm`.
        objective: z -> what is raised instead of the loss, (B,).

    Returns:
        The last iterate, in the ball and in the box; no graph attached, no parameter gradient left.
    """
    radius = as_eps(eps, images)
    noise = draws if isinstance(draws, Tensor) else draws.uniform(images.shape, "start").to(images)
    raised = objective or (lambda z: F.cross_entropy(model(z), labels, reduction="none"))
    with batchnorm(model, craft_bn):
        return ascend(
            lambda z, _: raised(z),
            images,
            radius,
            steps=steps,
            step_ratio=step_ratio,
            start=uniform_start(images, radius, noise),
        )


def check(owner: str, prefix: str, eps: float, steps: int, step_ratio: float) -> None:
    """Raises RobenchError where `craft` makes no sense of the fields ``{prefix}eps`` and so on of a defense."""
    if not 0 < eps <= 1:
        raise RobenchError(f"expected `{prefix}eps` of defense {owner!r} in (0, 1], got {eps}; 8/255 is 0.03137")
    if steps < 1:
        raise RobenchError(f"expected `{prefix}steps` of defense {owner!r} to be at least 1, got {steps}")
    if not 0 < step_ratio <= 2:
        raise RobenchError(
            f"expected `{prefix}step_ratio` of defense {owner!r}, a step as a part of ε, in (0, 2], got {step_ratio}"
        )
