"""Gradients of a member's loss by its images, for losses that hold them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robench.core.batchnorm import TwiceDifferentiable


def loss_and_slope(
    member: nn.Module, images: Tensor, labels: Tensor, of: Literal["mean", "sum"]
) -> tuple[Tensor, Tensor]:
    """The batch's cross-entropy, and its gradient by the images (B, pixels), which can be differentiated again."""
    images = images if images.requires_grad else images.detach().requires_grad_(True)
    # The fused kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
        loss = F.cross_entropy(member(images), labels, reduction=of)
    (slope,) = torch.autograd.grad(loss, images, create_graph=True)
    return loss, slope.flatten(1)
