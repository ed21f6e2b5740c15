"""An ensemble: members of any architecture, by default averaged in probability."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.errors import RobenchError
from robench.core.rules import USUAL, Rule, checked
from robench.core.streams import side_by_side


class Ensemble(nn.Module):
    """N classifiers that decide together, by default by the mean of their softmax outputs.

    Calling it returns what attacks follow, (B,K), see `followed`. Of the default rule that is log p̄, with
    p̄ = (1/N) Σ softmax(z_i): computed as a log-sum-exp, so it needs no clamp (the DVERGE authors clamp p̄ at 1e-40).
    Cross-entropy on it is −log p̄_y.

    Args:
        rule: how they decide, see `robench.core.rules`.
    """

    #: No attribute of an instance where it is the usual one: identities hash these.
    rule: Rule = USUAL

    def __init__(self, members: Iterable[nn.Module], rule: str = USUAL) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise RobenchError("expected at least one member in an ensemble, got none")
        if checked(rule) != USUAL:
            self.rule = checked(rule)

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, images: Tensor) -> Tensor:
        """Every member's logits, shape (N,B,K)."""
        calls = [partial(logits_of, member, images) for member in self.members]
        return torch.stack(side_by_side(calls, images.device))

    def forward(self, images: Tensor) -> Tensor:
        return followed(self.logits(images), self.rule)


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


def followed(logits: Tensor, rule: Rule) -> Tensor:
    """What attacks on an ensemble of that rule follow, (B,K), of its members' logits (N,B,K): what it decides by, or,
    where that has no gradient, the stand-in of `robench.core.rules.STAND_INS`."""
    if rule == "vote":
        return mixture(logits / lead(logits))
    return mixture(logits) if rule == "random" else decided(logits, rule)


def decided(logits: Tensor, rule: Rule, drawn: Tensor | None = None) -> Tensor:
    """What an ensemble of that rule decides by, (B,K), of its members' logits (N,B,K): the class of the highest value.

    Args:
        drawn: the member of each image, int64 (B,), for ``random``.
    """
    if rule == "logits":
        return logits.mean(dim=0)
    if rule == "confidence":
        return F.log_softmax(logits, dim=-1).amax(dim=0)
    if rule == "vote":
        votes = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).sum(dim=0)
        return (votes + mixture(logits).exp() / 2) / len(logits)
    if rule == "random":
        assert drawn is not None
        return logits[drawn, torch.arange(len(drawn), device=logits.device)]
    return mixture(logits)


def lead(logits: Tensor) -> Tensor:
    """The distance of the two highest values, (...,1), at least 1e-12; no graph attached."""
    top = logits.detach().topk(2, dim=-1).values
    return (top[..., :1] - top[..., 1:]).clamp(min=1e-12)
