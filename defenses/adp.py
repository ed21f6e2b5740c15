"""ADP: members that agree on the right class and differ on the wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble, mixture
from robench.core.errors import RobenchError
from robench.defenses.base import DEFENSES, Batch, Defense, Terms

#: Added to the diagonal, so that members that agree have a finite log-determinant (the authors' constant).
_JITTER = 1e-6


@DEFENSES.register("adp")
@dataclass(frozen=True, kw_only=True)
class Adp(Defense):
    """Σ_i CE(z_i(x), y) − α·H(p̄) − β·log det(M̃M̃ᵀ + 1e-6·I), each a mean over the batch (Pang et al. 2019, adaptive
    diversity promoting, https://arxiv.org/abs/1901.08846).

    Row i of M̃ (N, K−1) is p_i without class y, at ℓ2 length 1; as rows in K−1 dimensions, at most K−1 members can
    differ. Deviation from their code: M̃ is taken from the softmax over the wrong classes alone, which has the same
    direction, and the determinant is computed in float64: finite, with a gradient, where p_{i,y} rounds to 1.

    Attributes:
        alpha: α, weight of the ensemble's entropy.
        beta: β, weight of the members' diversity.
    """

    title: ClassVar[str] = "ADP"
    color: ClassVar[str] = "#E69F00"
    marker: ClassVar[str] = "s"
    min_members: ClassVar[int] = 2

    alpha: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise RobenchError(
                f"expected `alpha` and `beta` of defense {self.name!r} to be at least 0, "
                f"got {self.alpha} and {self.beta}"
            )

    def check(self, *, members: int, classes: int) -> None:
        super().check(members=members, classes=classes)
        if members > classes - 1:
            hint = f"try --n {classes - 1}" if classes > self.min_members else "it needs at least 3 classes"
            raise RobenchError(
                f"expected `n` of defense {self.name!r} to be at most {classes - 1}, one less than the classes, "
                f"got {members}; {hint}"
            )

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        yield self.terms(ensemble.logits(batch.images), batch.labels)

    def terms(self, logits: Tensor, labels: Tensor) -> Terms:
        """The three terms of the members' logits (N,B,K)."""
        log_mean = mixture(logits)
        entropy = -(log_mean.exp() * log_mean).sum(dim=1).mean()
        return {
            "ce": torch.stack([F.cross_entropy(member, labels) for member in logits]).sum(),
            "entropy": -self.alpha * entropy,
            "logdet": -self.beta * _log_diversity(logits, labels).mean(),
        }


def _log_diversity(logits: Tensor, labels: Tensor) -> Tensor:
    """log det(M̃M̃ᵀ + 1e-6·I), (B,), of the members' logits (N,B,K)."""
    true = F.one_hot(labels, logits.shape[2]).bool()
    wrong = logits.masked_fill(true, -float("inf")).softmax(dim=-1)
    return log_det(F.normalize(wrong.double(), dim=-1)).to(logits.dtype)


def log_det(rows: Tensor) -> Tensor:
    """log det(RRᵀ + 1e-6·I), (B,), of rows R of the members (N,B,M)."""
    each = rows.transpose(0, 1)
    gram = each @ each.mT + _JITTER * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    value: Tensor = torch.linalg.slogdet(gram).logabsdet
    return value
