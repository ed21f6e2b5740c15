"""LOTOS: what one member's layer amplifies most, the same layer of the others does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.spectral import Layer, convolutions
from robench.defenses.base import DEFENSES, Batch, Defense, Terms

#: Of the power iteration before the first step; later ones go on from the vectors of the last step.
_FIRST = 20


@DEFENSES.register("lotos")
@dataclass(frozen=True, kw_only=True)
class Lotos(Defense):
    """Σ_i CE(z_i(x), y) + λ·Σ_l Σ_{j≠k} relu(‖f_l^j(v_l^k)‖ − mal), and a spectral norm of every f_l^j of at most C
    (Ebrahimpour-Boroojeny et al. 2025, ICLR, layer-wise orthogonalization, https://arxiv.org/abs/2410.05136).

    f_l^j is convolution l of member j, in the order of the forward pass and without its bias; v_l^k, of length 1, is
    the right singular vector of member k's convolution with the largest singular value, constant for the gradient.
    Members of other architectures are compared where these take inputs of one shape.

    The published numbers are the code's (https://github.com/Ali-E/LOTOS, ``train/Empirical/trainer.py``), hence
    ``normalised`` and ``composition`` are off: it sets the normaliser to 1 (l. 287–291), and its condition for adding
    the term of compositions never holds (l. 299). Other differences: its ``bottom_clip``, here ``mal``, is 1 unless
    set, also in its README's command for λ = .05; norms are clipped at every step, where it clips every 50 to 100 with
    FastClip; with BatchNorm it may clip compositions, here convolutions alone are.

    Attributes:
        weight: λ; the paper has .01 for networks with BatchNorm and .05 without.
        mal: what a layer may amplify another member's vector by.
        normalised: divide the sum by M·N(N−1), with M layers, as in the paper.
        composition: the same term for each convolution followed by BatchNorm, with its running variance, too.
        clip: C; 0 leaves spectral norms alone.
        iterations: of the power iteration, per step.
    """

    title: ClassVar[str] = "LOTOS"
    min_members: ClassVar[int] = 2

    weight: float = 0.01
    mal: float = 0.8
    normalised: bool = False
    composition: bool = False
    clip: float = 1.0
    iterations: int = 1

    def __post_init__(self) -> None:
        self.at_least(0, "weight", "mal", "clip")
        self.at_least(1, "iterations")

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        yield {"orthogonality": self.weight * self._overlap(ensemble, batch)}
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(batch.images), batch.labels)}

    def finish(self, ensemble: Ensemble, batch: Batch) -> None:
        for i, member in enumerate(ensemble.members) if self.clip else ():
            for number, layer in enumerate(convolutions(member, batch.images)):
                layer.clip(self._top(layer, f"convolution.{i}.{number}", batch), self.clip)

    def _overlap(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        every = [convolutions(member, batch.images) for member in ensemble.members]
        if not all(every):
            raise RobenchError(f"defense {self.name!r} needs nn.Conv2d modules, and found none; choose another --model")
        total, depth = batch.images.new_zeros(()), max(map(len, every))
        kinds = (("convolution", False), ("composition", True))[: 1 + self.composition]
        for (name, composed), number in product(kinds, range(depth)):
            same = [(i, layers[number]) for i, layers in enumerate(every) if number < len(layers)]
            same = [(i, layer) for i, layer in same if layer.norm is not None or not composed]
            vectors = [self._top(layer, f"{name}.{i}.{number}", batch, composed) for i, layer in same]
            for j, (_, layer) in enumerate(same):
                for vector in [v for k, v in enumerate(vectors) if k != j and v.shape == layer.shape]:
                    total = total + F.relu(layer(vector, composed).norm() - self.mal)
        return total / (depth * len(every) * (len(every) - 1)) if self.normalised else total

    def _top(self, layer: Layer, name: str, batch: Batch, composed: bool = False) -> Tensor:
        """The layer's top right singular vector, from where the last step left it."""
        new = name not in batch.state
        if new:
            start = batch.epoch_draws.uniform((1, math.prod(layer.shape)), "lotos", name) - 0.5
            batch.state[name] = start.view(layer.shape).to(layer.convolution.weight)
        batch.state[name] = layer.top(batch.state[name], self.iterations + _FIRST * new, composed)
        return batch.state[name]
