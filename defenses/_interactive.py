"""What iGAT adds to the loss of another defense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble, followed
from robench.core.errors import RobenchError
from robench.core.rules import USUAL, Rule
from robench.defenses.adversarial import AddedAttack
from robench.defenses.base import Batch, Terms


@dataclass(frozen=True, kw_only=True)
class Interactive(AddedAttack):
    """a·(1/B)·Σ_W CE(z_s(x), y) − b·(1/B)·Σ_W Σ_i log(1 − max_{c≠y} p_ic), W the images that the ensemble gets wrong
    (Deng & Mu 2023, NeurIPS, interactive global adversarial training, https://arxiv.org/abs/2310.18477).

    Member s is drawn for each image, P(s = i) ∝ 2^r_i, with r_i the rank of p_iy among the members, from 0: the one
    that is nearest to right is the likeliest.

    Attributes:
        distributed: a; bounded: b.
        cap: of a probability in the second term, which has no gradient beyond; the code's is .99.
        largest: twice the largest probability of all members in place of the sum over members; the code's ``reg_type``.
        attacked: whether x are images of even places in the batch, and attacked ones of odd places, or attacked ones
            alone, of all; by PGD on the ensemble's loss −log p̄_y.
    """

    distributed: float = 5.0
    bounded: float = 10.0
    cap: float = 1.0
    largest: bool = False
    attacked: Literal["half", "all"] = "half"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "distributed", "bounded")
        if not 0 < self.cap <= 1:
            raise RobenchError(f"expected `cap` of defense {self.name!r} in (0, 1], got {self.cap}")

    def points(self, ensemble: Ensemble, batch: Batch) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W) and their labels."""
        noise = batch.draws.uniform(batch.images.shape, "igat", "start").to(batch.images)
        if self.attacked == "all":
            return self.craft(ensemble, batch.images, batch.labels, noise), batch.labels
        crafted = self.craft(ensemble, batch.images[1::2], batch.labels[1::2], noise[1::2])
        return torch.cat([batch.images[::2], crafted]), torch.cat([batch.labels[::2], batch.labels[1::2]])

    def interaction(self, logits: Tensor, labels: Tensor, batch: Batch, rule: Rule = USUAL) -> Terms:
        """Both terms of the members' logits (N,B,K) of `points`; rule: how the ensemble decides."""
        count, each = len(logits), torch.arange(len(labels), device=labels.device)
        true = logits.detach().log_softmax(dim=2)[:, each, labels]
        weight = 2.0 ** true.argsort(dim=0).argsort(dim=0)
        unit = batch.draws.uniform((len(labels),), "igat", "member").to(weight)
        drawn = (unit * (2**count - 1) >= weight.cumsum(dim=0)).sum(dim=0)
        wrong = (followed(logits, rule).argmax(dim=1) != labels).to(logits)
        own = F.cross_entropy(logits[drawn, each], labels, reduction="none")
        right = F.one_hot(labels, logits.shape[2]).bool()
        rival = logits.detach().masked_fill(right, -float("inf")).argmax(dim=2, keepdim=True)
        # log(1 − p) as the others' share, finite where p rounds to 1.
        rest = logits.scatter(2, rival, -float("inf")).logsumexp(dim=2) - logits.logsumexp(dim=2)
        rest = rest.clamp(min=math.log1p(-self.cap)) if self.cap < 1 else rest
        bounded = 2 * rest.amin(dim=0) if self.largest else rest.sum(dim=0)
        return {
            "distributed": self.distributed * (wrong * own).mean(),
            "bounded": -self.bounded * (wrong * bounded).mean(),
        }
