"""Momentum ascent along a blurred gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import losses, slopes
from robench.attacks.iterative import Iterative
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("tim")
@dataclass(frozen=True, kw_only=True)
class TIM(Iterative):
    """TI-MI-FGSM: the translation-invariant method (Dong et al. 2019, eq. 7–9, https://arxiv.org/abs/1904.02884).

    The gradient is convolved with a Gaussian kernel whose edge lies at 3σ, beyond the image with zeros. The authors
    take 15x15 on 299 pixels, against networks that were adversarially trained. As large a part of 32 pixels is less
    than 3x3, which at 3σ is nearly the identity, so that 5x5 (σ = 2/3 of a pixel) is the default here.

    Attributes:
        kernel: side of the kernel in pixels, odd; 1 is momentum PGD.
    """

    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("kernel", self.kernel >= 1 and self.kernel % 2 == 1, "to be odd and at least 1, in pixels")

    @property
    def stochastic(self) -> bool:
        return False

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        weights = gaussian(self.kernel, images)
        return self.follow(lambda z, _: blurred(slopes(objective, z), weights), images, eps)


def gaussian(size: int, like: Tensor) -> Tensor:
    """A Gaussian kernel of sum 1 whose edge lies at 3σ, (size,size), in the dtype and on the device of ``like``."""
    line = torch.linspace(-3, 3, size, dtype=like.dtype, device=like.device).square().mul(-0.5).exp()
    line = line / line.sum()
    return line[:, None] * line


def blurred(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of ``images`` (B,C,H,W) convolved with ``kernel`` (k,k), zeros beyond the edge."""
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, -1, -1), padding=len(kernel) // 2, groups=channels)
