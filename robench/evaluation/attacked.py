"""Whom an attack follows: a faster copy of the original model, for as long as it is the same function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks import Attack, Crafted
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.fast import ROUNDING, Precision, disagreement
from robench.core.frozen import frozen
from robench.core.losses import margin
from robench.evaluation.soundness import input_gradient, keyed_torch

log = logging.getLogger(__name__)

#: Images on which the gradient of the copy that is attacked is held against the original's; the mean cosine that is the
#: same gradient but for rounding (measured on three ResNet-20: .9999, in bfloat16 .98).
GRADIENTS = 8
SAME_GRADIENT: dict[Precision, float] = {"float32": 0.95, "bfloat16": 0.8, "float64": 0.95}


@dataclass
class AttackedModel:
    """The model that is attacked.

    Attributes:
        original: as it is judged; copied: makes a copy to attack, a plain one where it is called with True.
        draws: whether the original draws at inference, so that no copy can be held against it.
    """

    name: str
    original: Ensemble
    copied: Callable[[bool], nn.Module]
    precision: Precision
    draws: bool
    _plain: bool = False
    _model: nn.Module | None = None
    _followed: bool = False

    @property
    def model(self) -> nn.Module:
        """What is attacked; made when the first image is crafted: where the cache has them all, never."""
        if self._model is None:
            self._model = self.copied(self._plain)
        return self._model

    def proves(self, attack: Attack, crafted: Crafted, labels: Tensor) -> bool:
        """Whether the copy returned what the original returns for the images that were crafted on it, up to rounding,
        and on the first few of them has its gradient. If not, `model` is a plain copy from now on.

        Raises:
            RobenchError: a plain copy is another function too.
        """
        if self.draws:
            return True
        images = crafted.images
        weight = next((each for each in self.original.parameters() if each.is_floating_point()), None)
        given = images if weight is None else images.to(weight.dtype)
        with keyed_torch(images.device, "prove"), frozen(self.original):
            with torch.no_grad():
                apart = disagreement(crafted.outputs, self.original(given))
            why = ""
            if not apart <= ROUNDING[self.precision]:
                why = f"outputs differ by {apart:.2g} of their scale"
            elif not self._followed and not self._plain and not attack.gradient_free:
                alike = self._alike(images[:GRADIENTS], given[:GRADIENTS], labels[:GRADIENTS])
                if alike < SAME_GRADIENT[self.precision]:
                    why = f"gradients have a cosine of {alike:.2f}"
        self._followed |= not attack.gradient_free
        if not why:
            return True
        if self._plain:
            raise RobenchError(
                f"{self.name} is another function where it is attacked than where it is judged: {why}; its output must "
                f"depend on its weights and the image alone, and --precision float32 rounds least"
            )
        log.warning(f"the faster copy of {self.name} is another function ({why}): attacking a plain copy instead")
        self._plain, self._model = True, None
        return False

    def _alike(self, images: Tensor, given: Tensor, labels: Tensor) -> float:
        """Mean cosine of the gradients of the margin, over images that have one; 1 where none has."""
        with frozen(self.model):
            mine = input_gradient(self.model, margin, images, labels).flatten(1)
        theirs = input_gradient(self.original, margin, given, labels).flatten(1).to(mine.dtype)
        usable = (
            (mine.isfinite() & theirs.isfinite()).all(dim=1) & (mine.abs().amax(1) > 0) & (theirs.abs().amax(1) > 0)
        )
        if not bool(usable.any()):
            return 1.0
        return float(torch.cosine_similarity(mine[usable], theirs[usable]).mean())
