"""Losses that attacks ascend: logits (B,K) or log-probabilities, labels (B,) -> one value per sample, (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from robench.core.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: Registry[Loss] = Registry("loss", group="robench.losses")

#: Confidence κ of the CW loss in the DVERGE study.
CONFIDENCE = 0.1


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − max_{c≠y} z_c, shape (B,): positive where the prediction is right.

    The true class is masked by −∞. Masking it by 0, as the DVERGE and TRS code does, makes 0 the largest "wrong"
    logit of any log-probability vector.
    """
    true = logits.gather(1, labels[:, None])
    wrong = logits.scatter(1, labels[:, None], -float("inf")).amax(dim=1)
    return true[:, 0] - wrong


@LOSSES.register("ce")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(z)_y per sample, shape (B,). On an ensemble's log-probabilities this is −log p̄_y."""
    return F.cross_entropy(logits, labels, reduction="none")


@LOSSES.register("cw")
def carlini_wagner(logits: Tensor, labels: Tensor) -> Tensor:
    """−max(0, z_y − max_{c≠y} z_c + κ), κ = 0.1, shape (B,) (Carlini & Wagner 2017, f₆, as an objective to ascend)."""
    return -F.relu(margin(logits, labels) + CONFIDENCE)


@LOSSES.register("cw-paper")
def carlini_wagner_masked_by_zero(logits: Tensor, labels: Tensor) -> Tensor:
    """The CW loss as the DVERGE authors' code computes it, to measure its effect: never for a result of yours.

    It masks the true class by 0. On log-probabilities, all ≤ 0, the "wrong" logit is then always 0 and the gradient
    is exactly zero once p̄_y < exp(−κ) = 0.905.
    """
    true = logits.gather(1, labels[:, None])
    wrong = logits.scatter(1, labels[:, None], 0.0).amax(dim=1)
    return -F.relu(true[:, 0] - wrong + CONFIDENCE)
