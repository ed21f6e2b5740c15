"""AdvOAP: members trained against attacks on themselves, whose wrong predictions are orthogonal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.training import check, craft
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import BatchNormMode
from robench.defenses.base import DEFENSES, Batch, Defense, Terms

#: Added to the diagonal, so that members that agree have a finite log-determinant (the authors' constant).
_JITTER = 1e-6


@DEFENSES.register("advoap")
@dataclass(frozen=True, kw_only=True)
class AdvOAP(Defense):
    """Σ_i CE(z_i(x_i), y) − α·log det(ÃÃᵀ + 1e-6·I) − β·H(mean_i ã_i), each a mean over the batch, with x_i = PGD on
    member i alone (Guo et al. 2025, ICML, orthogonal adversarial predictions,
    https://proceedings.mlr.press/v267/guo25g.html).

    Row ã_i of Ã (N, K−1) is p_i(x_i) without class y, divided by its sum; at most K−1 rows can differ. The paper
    decides by the mean of logits; here, as for every defense, the mean of the softmax decides.

    The released code (https://github.com/GuoJQ42/AdvOAP, ``loss/adv_oap_loss.py``) differs in two fields, off by
    default. Its ``main.py`` trains with the attack that its command names for tests, 20 steps of ε/8: ``steps`` 20 and
    ``step_ratio`` 0.126. Deviation from both: the determinant is computed in float64 and predictions in logarithms,
    finite where a probability rounds to 0.

    Attributes:
        alpha: α, weight of the determinant; beta: β, weight of the entropy.
        eps: radius of the attack.
        steps: its steps, of size ``step_ratio``·ε, from a random start.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`; the code's is ``eval``.
        entropy_offset: o of H = −Σ_c (a_c + o)·log a_c; the code has 1e-6.
        clean_statistics: pass clean images after the adversarial ones, for BatchNorm's running statistics alone; the
            code does, to report its clean loss.
    """

    min_members: ClassVar[int] = 2

    alpha: float = 0.2
    beta: float = 10.0
    eps: float = 0.031
    steps: int = 10
    step_ratio: float = 0.25
    craft_bn: BatchNormMode = "eval"
    entropy_offset: float = 0.0
    clean_statistics: bool = False

    def __post_init__(self) -> None:
        check(self.name, "", self.eps, self.steps, self.step_ratio)
        for field in ("alpha", "beta", "entropy_offset"):
            if getattr(self, field) < 0:
                raise RobenchError(
                    f"expected `{field}` of defense {self.name!r} to be at least 0, got {getattr(self, field)}"
                )

    def check(self, *, members: int, classes: int) -> None:
        super().check(members=members, classes=classes)
        if members > classes - 1:
            hint = f"try --n {classes - 1}" if classes > self.min_members else "it needs at least 3 classes"
            raise RobenchError(
                f"expected `n` of defense {self.name!r} to be at most {classes - 1}, one less than the classes, "
                f"got {members}; {hint}"
            )

    def passes(self, members: int) -> float:
        return super().passes(members) + (0.5 if self.clean_statistics else 0.0)  # forward alone

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        adversarial = [
            craft(
                member,
                batch.images,
                batch.labels,
                batch.draws.within("advoap", i),
                eps=self.eps,
                steps=self.steps,
                step_ratio=self.step_ratio,
                craft_bn=self.craft_bn,
            )
            for i, member in enumerate(ensemble.members)
        ]
        outputs = []
        for member, images in zip(ensemble.members, adversarial, strict=True):
            outputs.append(member(images))
            if self.clean_statistics:
                with torch.no_grad():
                    member(batch.images)
        logits = torch.stack(outputs)
        rows = _log_wrong(logits, batch.labels)
        yield {
            "adversarial": torch.stack([F.cross_entropy(each, batch.labels) for each in logits]).sum(),
            "logdet": -self.alpha * _log_determinant(rows).mean().to(logits.dtype),
            "entropy": -self.beta * self._entropy(rows).mean().to(logits.dtype),
        }

    def _entropy(self, rows: Tensor) -> Tensor:
        """H of the members' mean, (B,), of log ã_i (N,B,K−1)."""
        log_mean = rows.logsumexp(dim=0) - math.log(len(rows))
        return -((log_mean.exp() + self.entropy_offset) * log_mean).sum(dim=1)


def _log_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """log ã_i in float64, (N,B,K−1), of the members' logits (N,B,K): the softmax over wrong classes alone."""
    count, images, classes = logits.shape
    wrong = torch.arange(classes - 1, device=logits.device).expand(images, -1)
    wrong = wrong + (wrong >= labels[:, None])
    return logits.double().gather(2, wrong.expand(count, -1, -1)).log_softmax(dim=2)


def _log_determinant(rows: Tensor) -> Tensor:
    """log det(ÃÃᵀ + 1e-6·I), (B,), of log ã_i (N,B,K−1)."""
    each = rows.exp().transpose(0, 1)
    gram = each @ each.mT + _JITTER * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    value: Tensor = torch.linalg.slogdet(gram).logabsdet
    return value
