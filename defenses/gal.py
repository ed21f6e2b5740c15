"""GAL: members whose loss gradients point in different directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
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
    min_members: ClassVar[int] = 2

    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise RobenchError(f"expected `weight` of defense {self.name!r} to be at least 0, got {self.weight}")

    def passes(self, members: int) -> float:
        return super().passes(members) + 3  # a gradient of a gradient takes about three more

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        images = batch.images.detach().requires_grad_(True)
        losses, slopes = [], []
        for member in ensemble.members:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                loss = F.cross_entropy(member(images), batch.labels)
            (slope,) = torch.autograd.grad(loss, images, create_graph=True)
            losses.append(loss)
            slopes.append(slope.flatten(1))
        short = 1e-8 * batch.parts
        cosines = torch.stack([F.cosine_similarity(one, other, eps=short) for one, other in combinations(slopes, 2)])
        yield {
            "ce": torch.stack(losses).mean(),
            "coherence": self.weight * cosines.logsumexp(dim=0).mean(),
        }
