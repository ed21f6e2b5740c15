"""Images that leave the features of a member, made in few steps and blended with what is remembered of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robench.attacks.departure import depart
from robench.attacks.training import check
from robench.core import linf
from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.defenses._layers import drawn_layer
from robench.defenses._memory import recall, remember
from robench.defenses.base import Batch, Defense


@dataclass(frozen=True, kw_only=True)
class Departing(Defense):
    """Of two members a and b, drawn per batch, δ_j = Π(ρ·(x'_j − x) + (1 − ρ)·δ_mem): x'_j leaves f_j^l(x) by sign
    steps from x + r_0 + r_1, where r_0 is common to both, and δ_mem is what b had for the image when it was last seen,
    in its own crop and flip (Huang et al. 2023, IEEE TIFS). l is drawn as in DVERGE.

    The memory takes a byte a pixel, in checkpoints too: 154 MB for CIFAR-10. δ_mem is exact to ε/254.

    Attributes:
        eps: radius of δ; ``steps`` of ``step_ratio``·ε.
        start_eps: of r_0; r_1 is within ε. project_start: whether the start is projected onto the ball.
        blend: whether ρ ~ U(0, 1) is drawn for each image or batch; where there is no memory yet, ρ = 1.
        chained: whether b blends with δ_a instead of the memory.
        layer_per: how often l is drawn.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    eps: float = 0.06
    steps: int = 1
    step_ratio: float = 1.0
    start_eps: float = 0.06
    project_start: bool = True
    blend: Literal["image", "batch"] = "image"
    chained: bool = False
    layer_per: Literal["epoch", "batch"] = "epoch"
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        check(self.name, "", self.eps, self.steps, self.step_ratio)
        self.at_least(0, "start_eps")

    def departed(self, ensemble: Ensemble, batch: Batch) -> tuple[list[int], list[Tensor]]:
        """The members a and b, and x + δ_a and x + δ_b (B,C,H,W); the memory moves on."""
        images, name = batch.images, "perturbation"
        first, second = int(draw(batch, "first") * len(ensemble)), int(draw(batch, "second") * (len(ensemble) - 1))
        chosen, perturbed = [first, second + (second >= first)], []
        memory, seen = recall(batch, name, self.eps)
        lower, upper = linf.bounds(images, linf.as_eps(self.eps, images))
        common = images + self.start_eps * _noise(batch, "start")
        for which, member in enumerate(ensemble.members[i] for i in chosen):
            made = depart(
                member,
                images,
                common + self.eps * _noise(batch, "noise", which),
                drawn_layer(member, batch, self.layer_per),
                eps=self.eps,
                steps=self.steps,
                step_ratio=self.step_ratio,
                project_start=self.project_start,
                craft_bn=self.craft_bn,
            )
            count = len(images) if self.blend == "image" else 1
            share = batch.draws.uniform((count, 1, 1, 1), "fasten", "share", which).to(images)
            share = torch.where(seen, share, 1.0)
            perturbed.append((images + share * (made - images) + (1 - share) * memory).clamp(lower, upper))
            memory = perturbed[-1] - images if self.chained else memory
        remember(batch, name, self.eps, perturbed[1] - images)
        return chosen, perturbed


def draw(batch: Batch, *purpose: str | int) -> float:
    """Uniform in (0, 1), the same for the whole batch."""
    return float(batch.draws.uniform((1,), "fasten", *purpose))


def _noise(batch: Batch, *purpose: str | int) -> Tensor:
    """Uniform in (−1, 1), (B,C,H,W)."""
    return 2 * batch.draws.uniform(batch.images.shape, "fasten", *purpose).to(batch.images) - 1
