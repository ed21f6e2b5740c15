"""DVERGE: each member learns to resist the distilled features of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.distill import distill
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import BatchNormMode, batchnorm
from robench.core.streams import side_by_side
from robench.defenses._layers import drawn_layer, layers_of
from robench.defenses._members import by_member
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("dverge")
@dataclass(frozen=True, kw_only=True)
class Dverge(Defense):
    """Σ_i Σ_{j≠i} CE(z_i(x'_j), y_s) (Yang et al. 2020, eq. 5, https://arxiv.org/abs/2009.14720).

    x'_j is distilled on member j from a source (x_s, y_s) towards a second image x; both come from independent
    shuffles and are augmented; pairs of the same class are kept. The sum over j is not divided by N − 1, as in the
    authors' code, so the effective rate grows with N. Deviation from their code: f^l(x) is computed once per batch
    instead of at every step, so that with ``craft_bn="train"`` running statistics move 11 times per distillation, not
    20.

    Attributes:
        eps: radius of the distillation.
        steps: its steps, of size ε/steps.
        layer: a fixed feature layer, 1 .. depth; 0 draws one for every ``layer_per``. Members of different depth L_i
            share the draw u ~ U(0, 1): l_i = 1 + ⌊u·L_i⌋.
        layer_per: how often the layer is drawn.
        craft_bn: BatchNorm while distilling, see `robench.core.frozen.batchnorm`.
    """

    title: ClassVar[str] = "DVERGE"
    color: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "D"
    paired: ClassVar[bool] = True
    start: ClassVar[Literal["scratch", "baseline"]] = "baseline"
    min_members: ClassVar[int] = 2

    eps: float = 0.07
    steps: int = 10
    layer: int = 0
    layer_per: Literal["epoch", "batch"] = "epoch"
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise RobenchError(f"expected `eps` of defense {self.name!r} in (0, 1], got {self.eps}; 8/255 is 0.03137")
        if self.steps < 1 or self.layer < 0:
            raise RobenchError(
                f"expected `steps` >= 1 and `layer` >= 0 of defense {self.name!r}, got {self.steps} and {self.layer}"
            )
        if self.layer and self.layer_per != "epoch":
            raise RobenchError(
                f"`layer_per` {self.layer_per!r} of defense {self.name!r}, which may be the recipe's, has no effect "
                f"with a fixed `layer` {self.layer}; set `layer_per` to 'epoch', or `layer` to 0"
            )

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        distilled = self.distilled(ensemble, batch)

        def of(i: int) -> Terms:
            others = [images for j, images in enumerate(distilled) if j != i]
            return {"distilled": resistance(ensemble.members[i], others, batch.labels)}

        yield from by_member([partial(of, i) for i in range(len(ensemble))], batch.images.device)

    def distilled(self, ensemble: Ensemble, batch: Batch) -> list[Tensor]:
        """x'_j (B,C,H,W) of every member j, all made before any update."""
        calls = [partial(self._of_member, member, batch) for member in ensemble.members]
        return side_by_side(calls, batch.images.device)

    def _of_member(self, member: nn.Module, batch: Batch) -> Tensor:
        assert batch.paired is not None
        layers = layers_of(member, batch.images)
        if self.layer > layers:
            raise RobenchError(
                f"expected `layer` of defense {self.name!r} in 0..{layers} for this model, got {self.layer}"
            )
        layer, ratio = self.layer or drawn_layer(member, batch, self.layer_per), 1 / self.steps
        with batchnorm(member, self.craft_bn):
            return distill(member, batch.images, batch.paired, layer, eps=self.eps, steps=self.steps, step_ratio=ratio)


def resistance(member: nn.Module, distilled: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Σ_j CE(z(x'_j), y_s) of one member, in ascending j: a concatenation would change the batch statistics."""
    return torch.stack([F.cross_entropy(member(images), labels) for images in distilled]).sum()
