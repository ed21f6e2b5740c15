"""Adversarial images batch by batch: from the cache, or crafted on a copy of the source that is proven."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import Attack, Crafted
from robench.core.data import Data
from robench.core.errors import RobenchError, out_of_memory
from robench.core.fast import attackable, compiled, crafting_dtype
from robench.core.frozen import frozen
from robench.core.threads import USUAL, chunks, fitting_batch
from robench.evaluation.attacked import AttackedModel
from robench.evaluation.craft import craft
from robench.evaluation.images import Images
from robench.evaluation.planning import Work
from robench.evaluation.predict import Indices
from robench.evaluation.settings import Settings

log = logging.getLogger(__name__)


class Crafter:
    """Makes the images of works.

    Args:
        images: the cache of adversarial images; None crafts again for every call.
    """

    def __init__(self, data: Data, settings: Settings, images: Images | None) -> None:
        self.data = data
        self.settings = settings
        self._images = images
        self._batch = settings.batch_size
        self._source: tuple[str, AttackedModel] | None = None
        self._told_why = False

    def batches(self, work: Work, chosen: Indices, restart: int) -> Iterator[tuple[Indices, Crafted]]:
        """Adversarial images of ``chosen`` positions in ``work.pairs``: (positions, crafted). Those of surrogates,
        which other targets meet too, are taken from the cache where it has them, and else kept there."""
        samples, eps = work.pairs
        attack, cache = work.job.attack, None if work.job.pooled else self._images
        if cache is not None:
            for radius, cell in work.cells.items():
                kept = chosen[(eps[chosen] == radius) & np.isin(samples[chosen], list(cache.kept(cell.attacked)))]
                for at in chunks(len(kept), self._images_per_pass(attack, len(kept))):
                    own = samples[kept[at]]
                    yield kept[at], cache.load(cell.attacked, own, images_of(self.data, own, self.settings))
                chosen = np.setdiff1d(chosen, kept)
        source, start = self._attacked(work), 0
        while start < len(chosen):
            chunk = chosen[start : start + self._images_per_pass(attack, len(chosen) - start)]
            try:
                images = images_of(self.data, samples[chunk], self.settings)
                labels = labels_of(self.data, samples[chunk])
                crafted = craft(
                    source.model, attack, images, labels, samples[chunk], eps[chunk],
                    seed=self.settings.seed, restart=restart, draws=work.draws,
                )  # fmt: skip
                same = source.proves(attack, crafted, torch.from_numpy(labels).to(images.device))
            except RuntimeError as error:
                self._halve(attack, len(chunk), error)
                continue
            if not same:  # once more, on a plain copy
                continue
            if cache is not None:
                cache.save(work.cells, samples[chunk], eps[chunk], crafted)
            yield chunk, crafted
            start += len(chunk)

    def release(self) -> None:
        """Lets go of the copy that was attacked last."""
        self._source = None

    def _attacked(self, work: Work) -> AttackedModel:
        """Whom the attack follows; the same for units of one work that follow each other."""
        if self._source is None or self._source[0] != work.key:
            job, draws = work.job, bool(work.draws)
            image = images_of(self.data, work.parts[0].samples[:1], self.settings)

            def copied(plain: bool) -> nn.Module:
                with frozen(job.source):
                    model = attackable(job.source, image, self.settings.precision, plain=plain)
                    if self.settings.compile and not job.attack.hooks and not plain and not draws:
                        model, why = compiled(model, image)
                        if why and not self._told_why:
                            log.warning(f"torch.compile failed, going on without: {why}")
                            self._told_why = True
                    return model

            made = AttackedModel(work.source, job.source, copied, self.settings.precision, draws)
            self._source = work.key, made
        return self._source[1]

    def _halve(self, attack: Attack, images: int, error: RuntimeError) -> None:
        """Halves batches from now on, as memory ran out with so many ``images``; raises where that is not what
        happened, or no way out."""
        if not out_of_memory(error) or images == 1:
            raise error
        if attack.batch_dependent:
            raise RobenchError(
                f"out of memory with {images} images, and of attack {attack.label!r} an image depends on its batch: "
                f"choose a smaller --batch-size"
            ) from error
        self._batch = max(1, images // 2)
        log.warning(f"out of memory with {images} images: going on with {self._batch}")

    def _images_per_pass(self, attack: Attack, count: int) -> int:
        """As many as are allowed, but no small rest of ``count``, which would take longer by the image."""
        if attack.batch_dependent:  # its rows depend on it, and their key holds it
            return self.settings.batch_size or USUAL
        most = fitting_batch(self.settings.device, self.data.numel, self._batch)
        passes = max(1, -(-count // most))
        return max(1, -(-count // passes))


def images_of(data: Data, samples: Indices, settings: Settings) -> Tensor:
    """Test images (B,C,H,W) in [0, 1], on the device, of the dtype that is crafted in."""
    pixels = data.test.images[torch.from_numpy(samples)].to(settings.device)
    return pixels.to(crafting_dtype(settings.precision)) / 255


def labels_of(data: Data, samples: Indices) -> Indices:
    """Their labels, (B,)."""
    return np.asarray(data.test.labels.numpy()[samples], dtype=np.int64)
