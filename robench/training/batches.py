"""The batches of an epoch: order, augmentation and noise, each from a keyed draw."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.data import Split, to_images
from robench.core.rng import Stream
from robench.defenses import Batch
from robench.training.recipes import Recipe


def batches(
    split: Split,
    recipe: Recipe,
    stream: Stream,
    epoch: int,
    paired: bool,
    first: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The augmented batches of one epoch, from step ``first``; the last, incomplete one is left out.

    They are made on ``device``, by default where the images lie.

    Everything random is drawn from the epoch's and the step's keys, so that an epoch can be entered anywhere.
    """
    size = recipe.batch_size
    here = split.images.device
    device = device or here
    epoch_draws = stream.within("epoch", epoch)
    shuffles = [
        epoch_draws.permutation(len(split), "order", name).to(device) for name in ("first", "second")[: 1 + paired]
    ]
    moves = [
        epoch_draws.uniform((len(split), 3), "augment", name).to(device) for name in ("first", "second")[: 1 + paired]
    ]
    for step in range(first, len(split) // size):
        draws = epoch_draws.within("step", step)
        indices = [shuffle[step * size : (step + 1) * size] for shuffle in shuffles]
        taken = [split.images[index.to(here)].to(device) for index in indices]
        views = [
            noisy(augment(to_images(pixels), move[index], recipe), recipe, draws.within(str(which)))
            for which, (pixels, index, move) in enumerate(zip(taken, indices, moves, strict=True))
        ]
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        yield Batch(
            views[0],
            split.labels[indices[0].to(here)].to(device),
            draws,
            epoch_draws,
            views[1] if paired else None,
            samples=indices[0],
            train_size=len(split),
            progress=(epoch % recipe.epochs + step / (len(split) // size)) / recipe.epochs,
            turn=epoch // recipe.epochs,
        )


def augment(images: Tensor, draws: Tensor, recipe: Recipe) -> Tensor:
    """Random crop after zero-padding, and flip, per image, on the device.

    Args:
        draws: uniform in (0, 1), (B,3): row, column, flip.
    """
    if recipe.pad:
        height, width = images.shape[-2:]
        reach = 2 * recipe.pad + 1
        rows = (draws[:, 0] * reach).long()[:, None] + torch.arange(height, device=images.device)
        columns = (draws[:, 1] * reach).long()[:, None] + torch.arange(width, device=images.device)
        padded = F.pad(images, [recipe.pad] * 4)
        which = torch.arange(len(images), device=images.device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if recipe.flip:
        images = torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return images


def noisy(images: Tensor, recipe: Recipe, draws: Stream) -> Tensor:
    """Gaussian noise on the whole batch with the recipe's probability, not clamped (GAL)."""
    if not recipe.noise or float(draws.uniform((1,), "noise?")) >= recipe.noise_probability:
        return images
    uniform = draws.uniform(images.shape, "noise").to(images.device)
    return images + recipe.noise * 2**0.5 * torch.erfinv(2 * uniform - 1)
