"""TRS: members with orthogonal loss gradients that are short wherever an attack makes them long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.training import check, craft
from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.defenses._slopes import loss_and_slope
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("trs")
@dataclass(frozen=True, kw_only=True)
class Trs(Defense):
    """Σ_i CE(z_i(x), y) + λ_a·mean_{i<j} |cos(g_i, g_j)| + λ_b·mean_i 2‖g_i(x̂)‖², g_i = ∇_x CE(z_i(x), y), each a mean
    over the batch (Yang et al. 2021, transferability reduced smooth ensemble, https://arxiv.org/abs/2104.00671).

    Half of the points x̂ are images, half come from PGD that maximises Σ_i ‖g_i‖² within an ε that grows linearly over
    training. Gradients are differentiated again.

    λ_a and λ_b are CIFAR-10's (an issue of the repository; its script has 2 and 2, times 5). They and the published
    numbers belong to the code (https://github.com/AI-secure/Transferability-Reduced-Smooth-Ensemble,
    ``train/Empirical/trainer.py``), so ``slope_of`` is its. Other differences from it: any number of members, where it
    has three; x̂ alternates within the batch, where it halves it; ε grows at every step, not every epoch.

    Attributes:
        similarity: λ_a; smoothness: λ_b.
        slope_of: what g_i(x̂) is the gradient of: the batch's ``mean`` loss, as in the code, which divides λ_b by B², or
            each ``image``'s own, as in the paper.
        adversarial: whether half of x̂ is attacked; the code does so with ``--plus-adv`` alone.
        first_eps: ε at the start of training; last_eps: at its end; ``steps`` of ``step_ratio``·ε, randomly started.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    title: ClassVar[str] = "TRS"
    min_members: ClassVar[int] = 2

    similarity: float = 40.0
    smoothness: float = 2.5
    slope_of: Literal["mean", "image"] = "mean"
    adversarial: bool = True
    first_eps: float = 0.01
    last_eps: float = 0.03
    steps: int = 6
    step_ratio: float = 1 / 3
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        check(self.name, "first_", self.first_eps, 1, 1.0)
        check(self.name, "last_", self.last_eps, 1, 1.0)
        check(self.name, "", self.last_eps, self.steps, self.step_ratio)
        self.at_least(0, "similarity", "smoothness")

    def passes(self, members: int) -> float:
        # A gradient of a gradient takes about three: of the images, of x̂, and in every step for half of the batch.
        return 6.0 + (1.5 * self.steps if self.adversarial else 0.0)

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        pairs = [loss_and_slope(member, batch.images, batch.labels, "sum") for member in ensemble.members]
        sums, slopes = zip(*pairs, strict=True)
        short = 1e-8 * batch.parts * len(batch.images)  # of a slope of the batch's mean loss, 1e-8, as in the code
        cosines = [F.cosine_similarity(one, other, eps=short) for one, other in combinations(slopes, 2)]
        losses = torch.stack(sums) / len(batch.images)
        yield {"ce": losses.sum(), "similarity": self.similarity * torch.stack(cosines).abs().mean()}
        points, labels = self._points(ensemble, batch) if self.adversarial else (batch.images, batch.labels)
        scale = 1.0 if self.slope_of == "image" else (batch.parts * len(points)) ** -2
        for member in ensemble.members:
            _, slope = loss_and_slope(member, points, labels, "sum")
            yield {"smoothness": 2 * self.smoothness * scale / len(ensemble) * slope.square().sum(dim=1).mean()}

    def _points(self, ensemble: Ensemble, batch: Batch) -> tuple[Tensor, Tensor]:
        """x̂ (B,C,H,W) and its labels: images of even places in the batch, then attacked ones of odd places."""
        images, labels = batch.images[1::2], batch.labels[1::2]
        noise = batch.draws.uniform(batch.images.shape, "trs", "start").to(batch.images)[1::2]

        def length(z: Tensor) -> Tensor:
            slopes = [loss_and_slope(each, z, labels, "sum")[1] for each in ensemble.members]
            return torch.stack(slopes).square().sum((0, 2))

        crafted = craft(
            ensemble,
            images,
            labels,
            noise,
            eps=self.first_eps + (self.last_eps - self.first_eps) * batch.progress,
            steps=self.steps,
            step_ratio=self.step_ratio,
            craft_bn=self.craft_bn,
            objective=length,
        )
        return torch.cat([batch.images[::2], crafted]), torch.cat([batch.labels[::2], labels])
