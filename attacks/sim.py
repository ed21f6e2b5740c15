"""Momentum ascent through darker copies of the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.copies import losses, mean_slopes
from robench.attacks.iterative import Iterative
from robench.core.losses import LOSSES
from robench.core.rng import Draws


@ATTACKS.register("sim")
@dataclass(frozen=True, kw_only=True)
class SIM(Iterative):
    """SI-MI-FGSM: the scale-invariant method (Lin et al. 2020, section 3.3, https://arxiv.org/abs/1908.06281).

    The gradient is that of (1/m) Σ_{i<m} J(x/2^i) with respect to x. The paper's strongest attack adds Nesterov's look
    ahead (NI); this is the one that others build on, and the authors' code has it too.

    Attributes:
        scales: m, copies of the image.
    """

    scales: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("scales", self.scales >= 1, "to be at least 1, which is the image alone")

    @property
    def stochastic(self) -> bool:
        return False

    @property
    def passes(self) -> int:
        return self.steps * self.scales

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        objective = losses(model, LOSSES.get(self.loss), labels)
        return self.follow(
            lambda z, _: mean_slopes(objective, lambda point, copy: point * 0.5**copy, self.scales, z), images, eps
        )
