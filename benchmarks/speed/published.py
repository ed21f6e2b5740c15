"""What robench is measured beside: the same mathematics, computed as the published code computes it.

Written from the formulas, with what costs time there: gradients of all parameters at every step, NCHW, BatchNorm by
itself, the ensemble as log(clamp(mean softmax)), target features at every step, every restart on every image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.features import ACTIVATIONS, features
from robench.core.frozen import hooked
from robench.core.rng import Draws

View = Callable[[Tensor, int], Tensor]


class Averaged(nn.Module):
    """log(clamp(p̄, 1e-40)), (B,K), of copies of an ensemble's members; eval mode, every parameter takes gradients."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.members = copy.deepcopy(ensemble.members).to(memory_format=torch.contiguous_format)
        self.eval().requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.stack([F.softmax(member(images), dim=1) for member in self.members]).mean(dim=0)
        return mean.clamp(min=1e-40).log()


def ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    step_ratio: float,
    momentum: float = 0.0,
    start: Tensor | None = None,
    view: View = lambda images, step: images,
) -> Tensor:
    """PGD, with μ > 0 momentum PGD, on CE(model(view(z, step)), y), (B,C,H,W)."""
    z = (images if start is None else start).clamp(images - eps, images + eps).clamp(0, 1)
    velocity = torch.zeros_like(z)
    for step in range(steps):
        z = z.detach().requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(view(z, step)), labels).backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        velocity = momentum * velocity + _normalised(z.grad) if momentum else z.grad
        z = (z.detach() + step_ratio * eps * velocity.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return z


def whitebox(
    model: nn.Module, images: Tensor, labels: Tensor, radii: Sequence[float], *, steps: int, restarts: int
) -> dict[float, float]:
    """By ε the share of images that stay right under PGD from every start; all starts on all images."""
    found = {}
    for eps in radii:
        right = torch.ones_like(labels, dtype=torch.bool)
        for restart in range(restarts):
            noise = Draws.of(range(len(images)), restart=restart).uniform("start", images.shape[1:], images)
            start = images + (2 * noise - 1) * eps
            crafted = ascend(model, images, labels, eps, steps=steps, step_ratio=0.2, start=start)
            with torch.no_grad():
                right &= model(crafted).argmax(dim=1) == labels
        found[eps] = float(right.float().mean())
    return found


def dverge_step(
    members: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    eps: float,
    steps: int,
    early: bool,
) -> None:
    """One round of DVERGE: distils on every member, then updates each by Σ_{j≠i} CE(z_i(x'_j), y_s).

    Args:
        early: whether the forward pass ends at ``layer``, as in the authors' code, or goes on to the logits.
    """
    reach = features if early else _features_in_passing
    distilled = []
    for member in members:
        z, velocity = source, torch.zeros_like(source)
        for _ in range(steps):
            z = z.detach().requires_grad_(True)
            with torch.no_grad():
                wanted = reach(member, target, layer)
            distance = (reach(member, z, layer) - wanted).square().flatten(1).mean(dim=1).sum()
            member.zero_grad()
            distance.backward()  # type: ignore[no-untyped-call]
            assert z.grad is not None
            velocity = velocity + _normalised(z.grad)
            z = (z.detach() - eps / steps * velocity.sign()).clamp(source - eps, source + eps).clamp(0, 1)
        distilled.append(z)
    for i, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        losses = [F.cross_entropy(member(images), labels) for j, images in enumerate(distilled) if j != i]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _normalised(slope: Tensor) -> Tensor:
    return slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)


def _features_in_passing(member: nn.Module, images: Tensor, layer: int) -> Tensor:
    """f^l(x) of a forward pass that goes on to its end."""
    inputs: list[Tensor] = []
    activations = [module for module in member.modules() if isinstance(module, ACTIVATIONS)]
    with hooked(each.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for each in activations):
        logits: Tensor = member(images)
    return [*inputs, logits][layer - 1]
