"""What a defense remembers of every training image."""

from __future__ import annotations

import torch
from torch import Tensor

from robench.defenses.base import Batch

#: Stands for what was never written.
_NOTHING = -128


def recall(batch: Batch, name: str, scale: float) -> tuple[Tensor, Tensor]:
    """What was last written of the batch's images under ``name``, (B,C,H,W), 0 where nothing was; and whether anything
    was, bool (B,1,1,1).

    Args:
        scale: the largest value; the memory is in steps of scale/127, a byte each: of CIFAR-10 154 MB, a quarter of
            what float32 takes.
    """
    if name not in batch.state:
        shape = (batch.train_size, *batch.images.shape[1:])
        batch.state[name] = torch.full(shape, _NOTHING, dtype=torch.int8, device=batch.images.device)
    kept = batch.state[name][batch.samples]
    seen = (kept.flatten(1)[:, 0] != _NOTHING).view(-1, 1, 1, 1)
    return torch.where(seen, kept.to(batch.images) * (scale / 127), 0.0), seen


def remember(batch: Batch, name: str, scale: float, values: Tensor) -> None:
    """Writes values in [−scale, scale], (B,C,H,W), for the next `recall`."""
    batch.state[name][batch.samples] = (values * (127 / scale)).round().clamp(-127, 127).to(torch.int8)
