"""DVERGE+AdvT: DVERGE, with each member also trained against attacks on itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.core.streams import side_by_side
from robench.defenses._members import by_member
from robench.defenses.adversarial import AddedAttack
from robench.defenses.base import DEFENSES, Batch, Terms
from robench.defenses.dverge import Dverge, resistance


@DEFENSES.register("dverge-advt")
@dataclass(frozen=True, kw_only=True)
class DvergeAdvT(AddedAttack, Dverge):
    """Σ_i [λ Σ_{j≠i} CE(z_i(x'_j), y_s) + CE(z_i(x_adv,i), y_s)] (Yang et al. 2020,
    https://arxiv.org/abs/2009.14720).

    x'_j as in DVERGE; x_adv,i = PGD on member i alone from x_s.

    Attributes:
        weight: λ.
        advt_eps: radius of the PGD; ``eps`` is the distillation's.
        advt_steps: its steps, of size ``advt_step_ratio``·ε, from a random start; ``steps`` are the distillation's.
        craft_bn: of both.
    """

    title: ClassVar[str] = "DVERGE+AdvT"
    color: ClassVar[str] = "#D55E00"
    marker: ClassVar[str] = "P"

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "weight")

    def passes(self, members: int) -> float:
        return super().passes(members) + self.advt_steps + 1

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        distilled = self.distilled(ensemble, batch)
        calls = [
            partial(self.craft, member, batch.images, batch.labels, batch.draws.within("advt", i))
            for i, member in enumerate(ensemble.members)
        ]
        adversarial = side_by_side(calls, batch.images.device)

        def of(i: int) -> Terms:
            member, others = ensemble.members[i], [images for j, images in enumerate(distilled) if j != i]
            return {
                "distilled": self.weight * resistance(member, others, batch.labels),
                "adversarial": F.cross_entropy(member(adversarial[i]), batch.labels),
            }

        yield from by_member([partial(of, i) for i in range(len(ensemble))], batch.images.device)
