"""The cache of adversarial images: crafted once per surrogate, attack, loss, ε and restart, judged by every target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.core.errors import RobenchError
from robench.core.store import read_tensors, tensors_hash, write_tensors


@dataclass(frozen=True)
class Kept:
    """What the cache has of one craft: where each sample is."""

    place: dict[int, tuple[Path, int]]

    def __contains__(self, sample: int) -> bool:
        return sample in self.place


class Images:
    """A folder per craft, in it parts of float32 images with their samples: lossless, verified when read."""

    def __init__(self, root: Path, notice: Callable[[str], None] = lambda text: None) -> None:
        self.root = root
        self._notice = notice
        self._read = lru_cache(maxsize=8)(self._verified)

    def kept(self, craft: str) -> Kept:
        place: dict[int, tuple[Path, int]] = {}
        for path in sorted((self.root / craft).glob("part-*.safetensors")):
            tensors = self._read(path)
            if tensors is not None:
                place.update({int(sample): (path, row) for row, sample in enumerate(tensors["samples"])})
        return Kept(place)

    def save(self, craft: str, samples: npt.NDArray[np.int64], images: Tensor, zero_gradient: Tensor) -> None:
        tensors = {
            "images": images.cpu(),
            "samples": torch.from_numpy(samples),
            "zero_gradient": zero_gradient.cpu(),
        }
        digest = tensors_hash(tensors)
        write_tensors(self.root / craft / f"part-{digest[:24]}.safetensors", tensors, {"hash": digest})

    def load(self, kept: Kept, samples: npt.NDArray[np.int64], clean: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Images (B,C,H,W) and zero-gradient flags (B,) of ``samples``, on the device of ``clean``.

        Raises:
            RobenchError: an image outside the ball or the box: the cache belongs to other data.
        """
        images, flags = [], []
        for sample in samples:
            path, row = kept.place[int(sample)]
            tensors = self._read(path)
            assert tensors is not None
            images.append(tensors["images"][row])
            flags.append(tensors["zero_gradient"][row])
        loaded = torch.stack(images).to(clean)
        inside = (loaded - clean).abs().amax() <= eps + 1e-6 and loaded.amin() >= 0 and loaded.amax() <= 1
        if not bool(inside):
            raise RobenchError(
                f"cached images in {self.root} leave the ball of {eps:g} around their clean images; "
                f"`robench cache clear`, or --no-cache"
            )
        return loaded, torch.stack(flags).to(clean.device)

    def _verified(self, path: Path) -> dict[str, Tensor] | None:
        try:
            tensors, metadata = read_tensors(path)
            good = metadata.get("hash") == tensors_hash(tensors) and path.stem == f"part-{metadata['hash'][:24]}"
        except RobenchError:
            good = False
        if not good:
            self._notice(f"{path} is damaged and was removed; its images are crafted again")
            path.unlink(missing_ok=True)
            return None
        return tensors
