"""FASTEN: each member learns from images that leave the features of another, made in one step and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from robench.core.ensemble import Ensemble
from robench.defenses._departing import Departing, draw
from robench.defenses._views import from_mean, from_others
from robench.defenses.base import DEFENSES, Batch, Terms


@DEFENSES.register("fasten")
@dataclass(frozen=True, kw_only=True)
class Fasten(Departing):
    """Σ_i [CE(z_i(x + δ), y) + (β/2)·Σ_v KL(p̄_i ‖ p_iv) − c·β·mean_{j≠i} KL(p̄_j ‖ p̄_i)], each a mean over the batch
    (Huang et al. 2023, IEEE TIFS, fast ensemble training).

    Views v are x, constant, and x + δ; p̄_i is their mean, constant in the last term, in its second place the mean of
    logarithms. δ_a and δ_b as `Departing` says: member a learns from δ_b, b from δ_a, any other from one of them.

    The released code (https://github.com/mesunhlf/FASTEN, ``train/train_fasten.py``), from which the published numbers
    come, has c = .05 between constants, which trains as ``repulsion`` 0; ``start_eps`` 8/255; no ``project_start``;
    ``blend`` per batch; ``chained``; no ``constant_target``.

    Attributes:
        beta: β; repulsion: c.
        constant_target: whether p̄_i is constant in the second term.
    """

    title: ClassVar[str] = "FASTEN"
    version: ClassVar[int] = 2
    start: ClassVar[Literal["scratch", "baseline"]] = "baseline"
    min_members: ClassVar[int] = 2

    beta: float = 3.0
    repulsion: float = 0.05
    constant_target: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "beta", "repulsion")

    def passes(self, members: int) -> float:
        return 1.5 + 2 * self.steps / members  # clean images forward alone; two members craft

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        chosen, perturbed = self.departed(ensemble, batch)
        losses, views = [], []
        for i, member in enumerate(ensemble.members):
            with torch.no_grad():
                clean = member(batch.images).log_softmax(dim=1)
            logits = member(perturbed[1 - chosen.index(i) if i in chosen else int(draw(batch, "other", i) * 2)])
            losses.append(F.cross_entropy(logits, batch.labels))
            views.append(torch.stack([clean, logits.log_softmax(dim=1)]))
        likeness = torch.stack([from_mean(each, self.constant_target) for each in views])
        yield {
            "ce": torch.stack(losses).sum(),
            "consistency": self.beta * likeness.sum(),
            "repulsion": -self.repulsion * self.beta * from_others(views),
        }
