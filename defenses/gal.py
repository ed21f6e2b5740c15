"""GAL: members whose loss gradients point in different directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.defenses._slopes import loss_and_slope
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("gal")
@dataclass(frozen=True, kw_only=True)
class Gal(Defense):
    """(1/N) Σ_i CE(z_i(x), y) + λ·log Σ_{i<j} exp cos(g_i, g_j), g_i = ∇_x CE(z_i(x), y), each a mean over the batch
    (Kariyappa & Qureshi 2019, gradient alignment loss, https://arxiv.org/abs/1901.09981).

    The gradients are differentiated again. That needs activations that are not flat over half of their domain;
    LeakyReLU, and Gaussian noise, come from the recipe. As in the DVERGE authors' code, g_i is the gradient of the
    batch's mean loss, and one shorter than 1e-8 is divided by 1e-8 instead of its length: a sample whose gradient is
    little but float32's rounding counts for less, and a gradient of zero has cosine 0.

    Attributes:
        weight: λ.
    """

    title: ClassVar[str] = "GAL"
    color: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "^"
    min_members: ClassVar[int] = 2

    weight: float = 0.5

    def __post_init__(self) -> None:
        self.at_least(0, "weight")

    def passes(self, members: int) -> float:
        return super().passes(members) + 2  # a gradient of a gradient takes about two more

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        pairs = [loss_and_slope(member, batch.images, batch.labels, "mean") for member in ensemble.members]
        losses, slopes = zip(*pairs, strict=True)
        short = 1e-8 * batch.parts
        cosines = torch.stack([F.cosine_similarity(one, other, eps=short) for one, other in combinations(slopes, 2)])
        yield {
            "ce": torch.stack(losses).mean(),
            "coherence": self.weight * cosines.logsumexp(dim=0).mean(),
        }
