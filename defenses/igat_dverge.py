"""iGAT over DVERGE: what the ensemble gets wrong goes to the member nearest to right, and no member is sure of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from robench.core.ensemble import Ensemble
from robench.defenses._interactive import Interactive
from robench.defenses.base import DEFENSES, Batch, Terms
from robench.defenses.dverge import Dverge
from robench.defenses.dverge_advt import DvergeAdvT


@DEFENSES.register("igat-dverge")
@dataclass(frozen=True, kw_only=True)
class IgatDverge(Interactive, DvergeAdvT):
    """L_DVERGE + the two terms of `Interactive` (Deng & Mu 2023, https://arxiv.org/abs/2310.18477), these of images of
    which half are attacked by PGD on the ensemble's loss −log p̄_y. It starts from a trained Baseline; the authors go on
    from a trained DVERGE, as ``--init RUN`` does.

    The released code (https://github.com/xqsi/iGAT, ``train/train_igat_dverge_cifar10.py``) has ``cap`` .99,
    ``attacked`` "all" and ``alone``. Other differences: it distils from one half of a batch and attacks the other,
    updates once for L_DVERGE and once more for the two terms, and an epoch has two batches.

    Attributes:
        alone: train each member also against attacks on itself, L_DVERGE+AdvT in place of L_DVERGE.
        weight: λ, of L_DVERGE+AdvT.
    """

    title: ClassVar[str] = "iGAT(DVERGE)"

    alone: bool = False

    def passes(self, members: int) -> float:
        base = super().passes(members) if self.alone else Dverge.passes(self, members)
        return base + (1.0 if self.attacked == "all" else 0.5) * self.advt_steps + 1

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        points, labels = self.points(ensemble, batch)
        yield from super().loss(ensemble, batch) if self.alone else Dverge.loss(self, ensemble, batch)
        yield self.interaction(ensemble.logits(points), labels, batch, ensemble.rule)
