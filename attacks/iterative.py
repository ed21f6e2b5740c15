"""Attacks that take sign steps along a velocity: their fields, handed to the one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robench.attacks import ascent
from robench.attacks.ascent import Objective, Rule
from robench.attacks.base import Attack


@dataclass(frozen=True, kw_only=True)
class Iterative(Attack):
    """A base class of attacks whose loop is `robench.attacks.ascent.follow`.

    Attributes:
        steps: gradient steps.
        step_ratio: step size over ε; in most papers 1/steps.
        momentum: μ.
    """

    steps: int = 10
    step_ratio: float = 0.1
    momentum: float = 1.0

    def ascend(self, objective: Objective, images: Tensor, eps: Tensor, start: Tensor | None = None) -> Tensor:
        """`robench.attacks.ascent.ascend` with these fields."""
        return ascent.ascend(
            objective, images, eps, steps=self.steps, step_ratio=self.step_ratio, momentum=self.momentum, start=start
        )

    def follow(
        self, rule: Rule, images: Tensor, eps: Tensor, scale: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The last iterate of `robench.attacks.ascent.follow` with these fields, (B,C,H,W)."""
        return ascent.follow(
            rule, images, eps, steps=self.steps, step_ratio=self.step_ratio, momentum=self.momentum, scale=scale
        )[0]
