"""Training on noisy images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.defenses import Batch, Defense, Terms


@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    """Σ_i CE(z_i(x + σ·n_i), y), n_i ~ N(0, 1) per member: helps against noise, hardly against a gradient.

    Attributes:
        sigma: σ, of pixels in [0, 1]; the noisy image is clipped to the box.
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise RobenchError(f"expected `sigma` of defense {self.name!r} in (0, 1], got {self.sigma}")

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        for number, member in enumerate(ensemble.members):
            uniform = batch.draws.uniform(batch.images.shape, "noise", number).to(batch.images)
            normal = 2**0.5 * torch.erfinv(2 * uniform - 1)
            yield {"noisy": F.cross_entropy(member((batch.images + self.sigma * normal).clamp(0, 1)), batch.labels)}
