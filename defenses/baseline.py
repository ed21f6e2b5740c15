"""Members trained alone, on clean images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from robench.core.ensemble import Ensemble
from robench.defenses._members import by_member, cross_entropy
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("baseline")
@dataclass(frozen=True, kw_only=True)
class Baseline(Defense):
    """Σ_i CE(z_i(x), y): no defense, and the surrogates of the black-box threat."""

    title: ClassVar[str] = "Baseline"
    color: ClassVar[str] = "#555555"
    marker: ClassVar[str] = "o"

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        losses = [partial(cross_entropy, member, batch.images, batch.labels) for member in ensemble.members]
        yield from by_member(losses, batch.images.device)
