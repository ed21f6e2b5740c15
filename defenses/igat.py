"""iGAT over ADP: what the ensemble gets wrong goes to the member nearest to right, and no member is sure of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.defenses._interactive import Interactive
from robench.defenses.adp import Adp
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("igat")
@dataclass(frozen=True, kw_only=True)
class Igat(Interactive, Adp):
    """L_ADP(x) + the two terms of `Interactive` (Deng & Mu 2023, https://arxiv.org/abs/2310.18477), all of images of
    which half are attacked by PGD on the ensemble's loss −log p̄_y. It starts from a trained Baseline; the authors go on
    from a trained ADP, as ``--init RUN`` does.

    The released code (https://github.com/xqsi/iGAT, ``train/train_igat_adp_cifar10_1.py``) has ``cap`` .99 and no
    ``base_ce``, and an epoch of 51 batches; its second variant has ``cap`` .99 and ``attacked`` "all": L_ADP of the
    images, and Σ_i CE(z_i(x_adv), y) and both terms of all of them attacked.

    Attributes:
        base_ce: whether L_ADP has its cross-entropy.
    """

    title: ClassVar[str] = "iGAT(ADP)"
    start: ClassVar[Literal["scratch", "baseline"]] = "baseline"

    base_ce: bool = True

    def passes(self, members: int) -> float:
        return self.advt_steps + 2 if self.attacked == "all" else self.advt_steps / 2 + 1

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        points, labels = self.points(ensemble, batch)
        if self.attacked == "all":
            terms = dict(self.terms(ensemble.logits(batch.images), labels))
            logits = ensemble.logits(points)
            terms["adversarial"] = torch.stack([F.cross_entropy(each, labels) for each in logits]).sum()
        else:
            logits = ensemble.logits(points)
            terms = dict(self.terms(logits, labels))
        if not self.base_ce:
            del terms["ce"]
        yield {**terms, **self.interaction(logits, labels, batch, ensemble.rule)}
