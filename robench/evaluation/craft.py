"""One batch of adversarial images: the one place that calls an attack outside the contract's checks."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack, Crafted
from robench.core.drawn import model_draws
from robench.core.errors import RobenchError
from robench.core.files import content_key
from robench.core.plugins import construct
from robench.core.rng import Draws
from robench.evaluation.cells import Cell
from robench.evaluation.predict import Indices, Radii
from robench.evaluation.soundness import keyed_torch


def craft(
    model: nn.Module,
    attack: Attack,
    images: Tensor,
    labels: Indices,
    samples: Indices,
    eps: Radii,
    *,
    seed: int,
    restart: int,
    draws: int = 0,
) -> Crafted:
    """Attacks ``model`` on a batch, with draws that are keyed by sample.

    Args:
        images: (B,C,H,W) in [0, 1], of the dtype that is crafted in; labels, samples, eps: (B,).
        samples: indices in the data set.
        draws: of a model that draws at inference, over how many gradients are means; 0 where it draws nothing.
    """
    # Convolution kernels for a batch of one round differently: never craft alone.
    padded = len(samples) == 1
    order = np.array([0, 0]) if padded else np.arange(len(samples))
    at = torch.from_numpy(order).to(images.device)
    owner = "craft", seed, restart
    drawing = model_draws(owner, samples[order], draws) if draws else nullcontext()
    # A model that draws takes the same draws whatever torch's seed is.
    with keyed_torch(images.device, *owner, int(samples[0])), drawing:
        crafted = attack(
            model,
            images[at].contiguous(memory_format=torch.channels_last),
            torch.tensor(labels, device=images.device)[at],
            torch.tensor(eps).to(images)[at],
            Draws.of(samples[order], seed=seed, restart=restart),
        )
    return Crafted(*(value[:1] for value in crafted)) if padded else crafted


def attack_of(cell: Cell) -> Attack:
    """The attack that the images of a cell were crafted with; RobenchError where it is not the same any more."""
    told = cell.attacked.attack
    values = {name: value for name, value in told.items() if name not in ("name", "version")}
    made: Attack = construct(ATTACKS.get(told["name"]), values, f"attack {cell.attack!r}")
    if content_key(made.manifest()) != content_key(told):
        raise RobenchError(f"attack {cell.attack!r} has changed since")
    return made
