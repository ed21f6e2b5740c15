"""Losses that are a sum over members, each of its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.streams import recording, side_by_side
from robench.defenses.base import Terms


def by_member(losses: Sequence[Callable[[], Terms]], device: torch.device) -> Iterator[Terms]:
    """Each member's terms, one member after another, so that memory is needed for one; while a CUDA graph is recorded
    their sums over members, made side by side.

    Args:
        losses: one for each member, with the same names; none needs what another one writes.
    """
    if not recording(device):
        yield from (loss() for loss in losses)
        return
    names: list[str] = []

    def vector(loss: Callable[[], Terms]) -> Tensor:
        terms = loss()
        names[:] = terms
        return torch.stack(list(terms.values()))

    sums = torch.stack(side_by_side([partial(vector, loss) for loss in losses], device)).sum(dim=0)
    yield dict(zip(names, sums, strict=True))


def cross_entropy(member: nn.Module, images: Tensor, labels: Tensor) -> Terms:
    """A member's mean cross-entropy, as the term ``ce``."""
    return {"ce": F.cross_entropy(member(images), labels)}
