"""ADP+AdvT: ADP on clean images, and adversarial training of the ensemble as one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.defenses.adp import Adp
from robench.defenses.adversarial import AdversarialTraining
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("adp-advt")
@dataclass(frozen=True, kw_only=True)
class AdpAdvT(AdversarialTraining, Adp):
    """L_ADP(x) + Σ_i CE(z_i(x_adv), y), x_adv = PGD on the ensemble's loss −log p̄_y: ADP with the adversarial training
    of the DVERGE authors' code, option ``--plus-adv`` (https://github.com/zjysteven/DVERGE, ``train/train_adp.py``).

    FASTEN reports it as FAT-ADP, with an attack of its own (Huang et al. 2023, table VII). L_ADP as in `Adp`: every
    member sees clean images first, then adversarial ones.
    """

    title: ClassVar[str] = "ADP+AdvT"

    def passes(self, members: int) -> float:
        return super().passes(members) + 1

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        images = self.attacked(ensemble, batch)
        yield from super().loss(ensemble, batch)
        for member in ensemble.members:
            yield {"adversarial": F.cross_entropy(member(images), batch.labels)}
