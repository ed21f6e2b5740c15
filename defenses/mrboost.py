"""MRBoost: members trained one after another, each where those before it are fooled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import BatchNormMode, batchnorm
from robench.core.rules import Rule
from robench.defenses.adversarial import AdversarialTraining
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("mrboost")
@dataclass(frozen=True, kw_only=True)
class MRBoost(AdversarialTraining):
    """Member t, after the others: MCE(z_t(x'), y), x' from PGD on MCE of the mean of the logits of members 1 … t, with
    MCE(z, y) = −log softmax(z)_y − w/(K−1)·Σ_{c≠y} log softmax(−z)_c (Zhang et al. 2022, ICML, margin boosting,
    https://arxiv.org/abs/2206.03362).

    Each member has all of the recipe's epochs and its schedule; those before it stay as they are. The mean of logits
    decides.

    The released code (https://github.com/zdhNarsil/Margin-Boosting, ``experiments/ladder_mce_main.py``) starts PGD
    within ε/2, ``start_ratio`` .5, and has ``weight`` 0 unless told.

    Attributes:
        weight: w.
        learns: whether the loss is of the member ``alone``, as the code's option ``individual``, which is on, or of the
            mean of logits, ``joint``.
        eps: radius of PGD; ``steps`` of ``step_ratio``·ε, from x + U(−ε, ε)·``start_ratio``.
        craft_bn: BatchNorm of member t while crafting, see `robench.core.frozen.batchnorm`; the code's is ``eval``.
    """

    title: ClassVar[str] = "MRBoost"
    in_turn: ClassVar[bool] = True
    rule: ClassVar[Rule] = "logits"

    weight: float = 1.0
    learns: Literal["alone", "joint"] = "alone"
    start_ratio: float = 1.0
    craft_bn: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "weight", "start_ratio")
        if self.start_ratio > 1:
            raise RobenchError(
                f"expected `start_ratio` of defense {self.name!r} to be at most 1, got {self.start_ratio}"
            )

    def passes(self, members: int) -> float:
        """Of the mean over turns: t members craft, and one learns."""
        return (self.steps * (members + 1) / 2 + 1) / members

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        member, before = ensemble.members[batch.turn], ensemble.members[: batch.turn]
        images, labels = batch.images, batch.labels

        def mean(x: Tensor, learning: bool = False) -> Tensor:
            with torch.set_grad_enabled(not learning):
                theirs = [each(x) for each in before]
            return torch.stack([*theirs, member(x)]).mean(dim=0)

        noise = 0.5 + self.start_ratio * (batch.draws.uniform(images.shape, "mrboost").to(images) - 0.5)
        with batchnorm(before, "eval"):
            crafted = self.craft(
                member, images, labels, noise, lambda x: torch.stack(self._parts(mean(x), labels)).sum(dim=0)
            )
            logits = mean(crafted, learning=True) if self.learns == "joint" else member(crafted)
        right, wrong = self._parts(logits, labels)
        yield {"adversarial": right.mean(), "margin": wrong.mean()}

    def _parts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of MCE, (B,) each, of logits (B,K)."""
        others = F.one_hot(labels, logits.shape[1]).bool()
        away = (-logits).log_softmax(dim=1).masked_fill(others, 0.0).sum(dim=1)
        return F.cross_entropy(logits, labels, reduction="none"), -self.weight / (logits.shape[1] - 1) * away
