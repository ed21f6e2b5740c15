"""PGD on what the members of an ensemble say, one by one, instead of on their average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from robench.attacks.ascent import drawn_start
from robench.attacks.base import ATTACKS
from robench.attacks.iterative import Iterative
from robench.core.fast import members
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Combine = Literal["logits", "losses", "normalised", "minmax"]


@ATTACKS.register("members")
@dataclass(frozen=True, kw_only=True)
class Members(Iterative):
    """PGD (Madry et al. 2018, https://arxiv.org/abs/1706.06083) whose gradient is put together from the members'.

    On log p̄ a member that is nearly certain hides the others' gradients. Here each has its say, by ``combine``:

    * ``logits``: the loss of the mean of the members' logits (Dong et al. 2018, §3.4,
      https://arxiv.org/abs/1710.06081).
    * ``losses``: the mean of the members' losses (ibid.).
    * ``normalised``: the mean of the gradients of the members' losses, each of length 1 in ℓ1.
    * ``minmax``: Σ w_i ℓ_i, with weights that fall on the members that are fooled least (Wang et al. 2021, algorithm 1,
      https://arxiv.org/abs/1906.03563): w ← Π_simplex(w − β·(ℓ + γ·(w − 1/N))) after every step, per sample. The
      paper's ℓ is a CW loss; here it is ``loss``.

    A model without members is an ensemble of one, on which all four are PGD.

    Attributes:
        random_start: start from x + U(−ε, ε) instead of x.
        combine: see above.
        gamma: γ of ``minmax``, how much equal weights are preferred.
        beta: β of ``minmax``, the step size of the weights.
    """

    by_member: ClassVar[bool] = True

    steps: int = 50
    step_ratio: float = 0.2
    momentum: float = 0.0
    random_start: bool = True
    combine: Combine = "normalised"
    gamma: float = 3.0
    beta: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("combine", self.combine in get_args(Combine), f"to be one of {', '.join(get_args(Combine))}")
        self.require("gamma", self.gamma >= 0, "to be at least 0")
        self.require("beta", self.beta >= 0, "to be at least 0")

    @property
    def stochastic(self) -> bool:
        return self.random_start

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss = LOSSES.get(self.loss)
        start = drawn_start(images, eps, draws) if self.random_start else None
        weights: Tensor | None = None
        weighed = -1

        def objective(z: Tensor, step: int) -> Tensor:
            nonlocal weights, weighed
            logits = [member(z) for member in members(model)]
            if self.combine == "logits":
                return loss(torch.stack(logits).mean(dim=0), labels)
            losses = [loss(each, labels) for each in logits]
            if self.combine == "losses" or not any(each.requires_grad for each in losses):
                return torch.stack(losses).mean(dim=0)
            if self.combine == "normalised":
                # Its gradient is the direction.
                return (_normalised(losses, z) * z).flatten(1).sum(dim=1)
            found = torch.stack(losses)
            # At the point that the step before led to, and once where several draws of the model are asked for.
            if weights is None:
                weights = torch.full_like(found.detach(), 1 / len(found))
            elif step > weighed:
                descent = found.detach() + self.gamma * (weights - 1 / len(found))
                weights = onto_simplex(weights - self.beta * descent)
            weighed = step
            return (weights * found).sum(dim=0)

        return self.ascend(objective, images, eps, start)


def _normalised(losses: list[Tensor], z: Tensor) -> Tensor:
    """(1/N) Σ_i g_i/max(‖g_i‖₁, 1e-12), (B,C,H,W), g_i the gradient of a member's loss, 0 where not finite."""
    total = torch.zeros_like(z)
    for loss in losses:
        if not loss.requires_grad:  # a member that is not differentiable
            continue
        (slope,) = torch.autograd.grad(loss.sum(), z)
        slope = slope.nan_to_num_(0.0, 0.0, 0.0)
        length = torch.linalg.vector_norm(slope, 1, dim=(1, 2, 3), keepdim=True).clamp_(min=1e-12)
        total.addcdiv_(slope, length)
    return total / len(losses)


def onto_simplex(points: Tensor) -> Tensor:
    """The nearest points whose coordinates are at least 0 and add up to 1, per column of (N,B): max(p − τ, 0) (Duchi et
    al. 2008, figure 1)."""
    ordered = points.sort(dim=0, descending=True).values
    numbers = torch.arange(1, len(points) + 1, dtype=points.dtype, device=points.device)[:, None]
    levels = (ordered.cumsum(dim=0) - 1) / numbers
    # The coordinates that stay above 0 come first.
    kept = (ordered > levels).sum(dim=0, keepdim=True)
    return (points - levels.gather(0, kept - 1)).clamp(min=0)
