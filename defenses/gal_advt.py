"""GAL+AdvT: GAL on clean images, and adversarial training of the ensemble as one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.defenses.adversarial import AdversarialTraining
from robench.defenses.base import DEFENSES, Batch, Terms
from robench.defenses.gal import Gal


@DEFENSES.register("gal-advt")
@dataclass(frozen=True, kw_only=True)
class GalAdvT(AdversarialTraining, Gal):
    """L_GAL(x) + (1/N) Σ_i CE(z_i(x_adv), y), x_adv = PGD on the ensemble's loss −log p̄_y: GAL with the adversarial
    training of the DVERGE authors' code, option ``--plus-adv`` (https://github.com/zjysteven/DVERGE,
    ``train/train_gal.py``).

    FASTEN reports it as FAT-GAL, with an attack of its own (Huang et al. 2023, table VII). L_GAL as in `Gal`: every
    member sees clean images first, then adversarial ones. Deviations from the code: it passes clean images twice, so
    that running statistics move once more; it clips a pixel that the recipe's noise took out of [0, 1] back into the
    box, where ours stays within ε of the noisy pixel.
    """

    title: ClassVar[str] = "GAL+AdvT"

    def passes(self, members: int) -> float:
        return super().passes(members) + 1

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        images = self.attacked(ensemble, batch)
        yield from super().loss(ensemble, batch)
        for member in ensemble.members:
            yield {"adversarial": F.cross_entropy(member(images), batch.labels) / len(ensemble)}
