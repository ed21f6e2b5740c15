"""How far predictions of several views of an image, and of several members, are from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def from_mean(views: Tensor, constant: bool) -> Tensor:
    """(1/V)·Σ_v KL(p̄ ‖ p_v), a mean over the batch, of log p_v (V,B,K); p̄ is their mean, ``constant`` or not."""
    mean = views.exp().mean(dim=0)
    target = mean.detach() if constant else mean
    return torch.stack([F.kl_div(view, target, reduction="batchmean") for view in views]).mean()


def from_others(members: Sequence[Tensor]) -> Tensor:
    """Σ_i mean_{j≠i} KL(p̄_j ‖ p̄_i), a mean over the batch, of the members' log p_v (V,B,K).

    In the first place p̄ is the mean of the views, constant; in the second the mean of their logarithms.
    """
    means, logs = [each.exp().mean(dim=0).detach() for each in members], [each.mean(dim=0) for each in members]
    pairs = [(mean, log) for i, log in enumerate(logs) for j, mean in enumerate(means) if j != i]
    return torch.stack([F.kl_div(log, mean, reduction="batchmean") for mean, log in pairs]).mean() * len(members)
