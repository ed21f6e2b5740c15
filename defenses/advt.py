"""AdvT: adversarial training of the ensemble as one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from robench.core.ensemble import Ensemble
from robench.defenses._members import by_member, cross_entropy
from robench.defenses.adversarial import AdversarialTraining
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("advt")
@dataclass(frozen=True, kw_only=True)
class AdvT(AdversarialTraining):
    """Σ_i CE(z_i(x_adv), y), x_adv = PGD on the ensemble's loss −log p̄_y (Madry et al. 2018,
    https://arxiv.org/abs/1706.06083; as the ensemble defense of Yang et al. 2020, https://arxiv.org/abs/2009.14720).

    Every member trains on the same images: those that fool the average, where DVERGE+AdvT attacks each one alone.
    """

    title: ClassVar[str] = "AdvT"
    color: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "v"

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        images = self.attacked(ensemble, batch)
        yield from by_member(
            [partial(cross_entropy, member, images, batch.labels) for member in ensemble.members], images.device
        )
