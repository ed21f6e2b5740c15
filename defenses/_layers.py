"""The feature layer that a defense works at, drawn for members of any depth."""

from __future__ import annotations

from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from robench.core.features import depth
from robench.defenses.base import Batch

#: Found once per network, as it costs a forward pass and is not a matter of weights; forgotten with the network.
_DEPTHS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def layers_of(member: nn.Module, images: Tensor) -> int:
    """The member's feature layers, see `robench.core.features.depth`."""
    if member not in _DEPTHS:
        _DEPTHS[member] = depth(member, images[:1])
    return _DEPTHS[member]


def drawn_layer(member: nn.Module, batch: Batch, per: Literal["epoch", "batch"]) -> int:
    """l = 1 + ⌊u·L⌋, with u ~ U(0, 1) drawn for the epoch or the batch and shared by members of different depth L."""
    draws = batch.epoch_draws if per == "epoch" else batch.draws
    return 1 + draws.below(layers_of(member, batch.images), "layer")
