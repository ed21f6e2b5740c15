"""An ensemble: members of any architecture, averaged in probability."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.errors import RobenchError


class Ensemble(nn.Module):
    """N classifiers whose softmax outputs are averaged.

    Calling it returns log p̄, shape (B,K), with p̄ = (1/N) Σ softmax(z_i): computed as a log-sum-exp, so it needs no
    clamp (the DVERGE authors clamp p̄ at 1e-40). Cross-entropy on it is −log p̄_y.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise RobenchError("expected at least one member in an ensemble, got none")

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, images: Tensor) -> Tensor:
        """Every member's logits, shape (N,B,K)."""
        return torch.stack([logits_of(member, images) for member in self.members])

    def forward(self, images: Tensor) -> Tensor:
        return mixture(self.logits(images))


def logits_of(member: nn.Module, images: Tensor) -> Tensor:
    """A member's logits (B,K), also of images (B,C,H,W) in channels-last where its code has a `view`."""
    try:
        logits: Tensor = member(images)
    except RuntimeError as error:
        if images.is_contiguous() or "view size is not compatible" not in str(error):
            raise
        logits = member(images.contiguous())
    return logits


def mixture(logits: Tensor) -> Tensor:
    """log p̄ (B,K) of the members' logits (N,B,K)."""
    return F.log_softmax(logits, dim=-1).logsumexp(dim=0) - math.log(len(logits))
