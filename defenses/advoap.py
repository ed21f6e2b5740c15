"""AdvOAP: members trained against attacks on themselves, whose wrong predictions are orthogonal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.frozen import BatchNormMode
from robench.core.rules import Rule
from robench.defenses.adp import Adp, log_det
from robench.defenses.adversarial import AdversarialTraining
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("advoap")
@dataclass(frozen=True, kw_only=True)
class AdvOAP(AdversarialTraining, Adp):
    """Σ_i CE(z_i(x_i), y) − α·log det(ÃÃᵀ + 1e-6·I) − β·H(mean_i ã_i), each a mean over the batch, with x_i = PGD on
    member i alone (Guo et al. 2025, ICML, orthogonal adversarial predictions,
    https://proceedings.mlr.press/v267/guo25g.html).

    Row ã_i of Ã (N, K−1) is p_i(x_i) without class y, divided by its sum; as in ADP at most K−1 members can differ. The
    mean of logits decides.

    The released code (https://github.com/GuoJQ42/AdvOAP, ``loss/adv_oap_loss.py``) differs in two fields, off by
    default. Its ``main.py`` trains with the attack that its command names for tests, 20 steps of ε/8: ``steps`` 20 and
    ``step_ratio`` 0.126. Deviation from both: the determinant is computed in float64 and predictions in logarithms,
    finite where a probability rounds to 0.

    Attributes:
        alpha: α, weight of the determinant; beta: β, weight of the entropy.
        eps: radius of the attack; steps: its steps, of size ``step_ratio``·ε, from a random start.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`; the code's is ``eval``.
        entropy_offset: o of H = −Σ_c (a_c + o)·log a_c; the code has 1e-6.
        clean_statistics: pass clean images after the adversarial ones, for BatchNorm's running statistics alone; the
            code does, to report its clean loss.
    """

    title: ClassVar[str] = "AdvOAP"
    rule: ClassVar[Rule] = "logits"

    alpha: float = 0.2
    beta: float = 10.0
    eps: float = 0.031
    craft_bn: BatchNormMode = "eval"
    entropy_offset: float = 0.0
    clean_statistics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "entropy_offset")

    def passes(self, members: int) -> float:
        return super().passes(members) + (0.5 if self.clean_statistics else 0.0)  # forward alone

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        adversarial = [
            self.craft(member, batch.images, batch.labels, batch.draws.within("advoap", i))
            for i, member in enumerate(ensemble.members)
        ]
        outputs = []
        for member, images in zip(ensemble.members, adversarial, strict=True):
            outputs.append(member(images))
            if self.clean_statistics:
                with torch.no_grad():
                    member(batch.images)
        rows = torch.stack([_log_wrong(logits.double(), batch.labels) for logits in outputs])
        log_mean = rows.logsumexp(dim=0) - math.log(len(rows))
        entropy = -((log_mean.exp() + self.entropy_offset) * log_mean).sum(dim=1)
        yield {
            "adversarial": torch.stack([F.cross_entropy(logits, batch.labels) for logits in outputs]).sum(),
            "logdet": -self.alpha * log_det(rows.exp()).mean().to(outputs[0].dtype),
            "entropy": -self.beta * entropy.mean().to(outputs[0].dtype),
        }


def _log_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """log ã (B,K−1) of a member's logits (B,K): the softmax over wrong classes alone."""
    wrong = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, wrong + (wrong >= labels[:, None])).log_softmax(dim=1)
