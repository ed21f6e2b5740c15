"""A defense against a second, plain writing of its loss, in float64: values, gradients and what BatchNorm counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.defenses import Batch, Defense

#: Of values and gradients; they are of order 1.
AGREEMENT = 1e-9

Plain = Callable[[list[nn.Module], Batch], Tensor]


def smooth(key: int, *, channels: int = 3, classes: int = 5, batchnorm: bool = True) -> nn.Module:
    """A small network for images of 4x4 pixels in float64, without kinks but with activation modules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        norm = [nn.BatchNorm2d(4)] if batchnorm else []
        layers = [nn.Conv2d(channels, 4, 3, padding=1), *norm, nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Softplus()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, classes)).double()


def adp_terms(logits: list[Tensor], labels: Tensor, alpha: float, beta: float) -> Tensor:
    """−α·H(p̄) − β·log det(M̃M̃ᵀ + 1e-6·I), image by image from the definition; the mean."""
    total = torch.zeros(()).double()
    for b, y in enumerate(labels.tolist()):
        p = torch.stack([z[b].softmax(0) for z in logits])
        mean = p.mean(dim=0)
        rows = torch.cat([p[:, :y], p[:, y + 1 :]], dim=1)
        rows = rows / rows.square().sum(dim=1, keepdim=True).sqrt()
        gram = rows @ rows.T + 1e-6 * torch.eye(len(p)).double()
        total = total + alpha * (mean * mean.log()).sum() - beta * gram.det().log()
    return total / len(labels)


def of_terms(defense: Defense, ensemble: Ensemble, batch: Batch) -> Tensor:
    """Back-propagates as training does; the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for terms in defense.loss(ensemble, batch):
        value = torch.stack(list(terms.values())).sum()
        value.backward()
        total = total + value.detach()
    return total


def assert_same(defense: Defense, ensemble: Ensemble, batch: Batch, plain: Plain, *, buffers: bool = True) -> None:
    """Raises where loss, a parameter's gradient or, with ``buffers``, BatchNorm's statistics differ.

    What the defense keeps is a copy for each, from ``batch.state`` as it is.
    """
    twin = copy.deepcopy(ensemble)
    kept = {name: value.clone() for name, value in batch.state.items()}
    found = of_terms(defense, ensemble, batch)
    wanted = plain(list(twin.members), replace(batch, state=kept))
    wanted.backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=AGREEMENT)
    some = False
    for (name, mine), theirs in zip(ensemble.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        some = some or bool(theirs.grad.abs().max() > 1e-3)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=AGREEMENT, msg=name)
    assert some
    if buffers:
        for (name, mine), theirs in zip(ensemble.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=AGREEMENT, msg=name)
