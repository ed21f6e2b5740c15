"""The cache of adversarial images: crafted once per surrogate, attack, loss, ε and restart, judged by every target."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robench.attacks import Crafted
from robench.core import linf
from robench.core.errors import RobenchError
from robench.core.files import Damaged, read_hashed, read_record, tensors_hash, write_hashed, write_record
from robench.core.parts import read_intact, read_parts
from robench.evaluation.cells import Cell, Craft
from robench.evaluation.predict import Indices, Radii

#: Names of the parts of a craft, and what is told where one is damaged.
PARTS = "part-*.safetensors"
DAMAGE = ("its images", "are crafted again")


class CacheEntry(NamedTuple):
    """One entry of the cache, for lists.

    Attributes:
        manifest: of a cell that it was made for; empty where that is lost.
        images: how many; size: bytes on disk; damaged: files that are not what was written.
    """

    key: str
    manifest: Mapping[str, Any]
    images: int
    size: int
    damaged: int


class Images:
    """A folder per craft, in it parts of images with their samples: lossless, verified when read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read = lru_cache(maxsize=8)(_read)
        #: Where each sample of a craft is: file, and row in it.
        self._kept: dict[str, dict[int, tuple[Path, int]]] = {}
        self._known: set[Path] = set()

    def kept(self, craft: Craft) -> Collection[int]:
        """The samples that the cache has of a craft; every file that is new is read."""
        kept = self._kept.setdefault(craft.key, {})
        folder = self.root / craft.key
        for path, tensors in read_parts(folder, PARTS, self._read, *DAMAGE, known=self._known):
            if tensors is not None:
                self._known.add(path)
                kept.update({int(sample): (path, row) for row, sample in enumerate(tensors["samples"])})
        return kept

    def samples(self, craft: Craft) -> list[int]:
        """The samples that `kept` would have, unless their images are damaged; only looks."""
        parts = map(_header, (self.root / craft.key).glob(PARTS))
        return [int(sample) for part in parts if part is not None for sample in part["samples"]]

    def save(self, cells: Mapping[float, Cell], samples: Indices, eps: Radii, crafted: Crafted) -> None:
        """Keeps what was crafted of ``samples``, (B,), at ``eps``, (B,), for ``cells``, by ε."""
        for radius, cell in cells.items():
            own = torch.from_numpy(eps == radius)
            if not bool(own.any()):
                continue
            folder = self.root / cell.attacked.key
            if not (folder / "craft.json").exists():
                about = {name: getattr(cell, name) for name in ("surrogate", "attack", "loss", "eps")}
                write_record(folder / "craft.json", about)
            images, flat = (every[own.to(every.device)].cpu() for every in (crafted.images, crafted.zero_gradient))
            tensors = {"images": images, "samples": torch.from_numpy(samples)[own], "zero_gradient": flat}
            write_hashed(folder / f"part-{tensors_hash(tensors)[:24]}.safetensors", tensors)

    def load(self, craft: Craft, samples: Indices, clean: Tensor) -> Crafted:
        """What was crafted of ``samples``, which are among `kept`, on the device of ``clean`` (B,C,H,W); what the
        attacked model returned for it is not kept.

        Raises:
            RobenchError: a file that was damaged since, or an image outside the ball or the box.
        """
        images, flags = [], []
        for sample in samples:
            path, row = self._kept[craft.key][int(sample)]
            tensors = read_intact(path, self._read, *DAMAGE)
            if tensors is None:
                raise RobenchError(f"{path} was damaged while it was in use; run the same command again")
            images.append(tensors["images"][row])
            flags.append(tensors["zero_gradient"][row])
        if any(image.shape != clean.shape[1:] for image in images):
            raise RobenchError(
                f"cached images in {self.root} are of {tuple(images[0].shape)}, the data of {tuple(clean.shape[1:])}; "
                f"robench cache clear, or --no-cache"
            )
        loaded = torch.stack(images).to(clean)
        distance = linf.distance(loaded, clean)
        inside = distance.amax() <= craft.eps + 1e-6 and loaded.amin() >= 0 and loaded.amax() <= 1
        if not bool(inside):
            raise RobenchError(
                f"cached images in {self.root} leave the ball of {craft.eps:g} around their clean images; "
                f"robench cache clear, or --no-cache"
            )
        nothing, none = loaded.new_empty((len(loaded), 0)), torch.full((len(loaded),), -1)
        return Crafted(loaded, distance, torch.stack(flags).to(clean.device), nothing, none)

    def crafts(self, *, verify: bool = False) -> Iterator[CacheEntry]:
        """Every entry; with ``verify`` each file is read and a damaged one set aside."""
        for folder in sorted(path for path in self.root.glob("*") if path.is_dir()):
            paths = sorted(folder.glob(PARTS))
            size = sum(path.stat().st_size for path in paths)
            read = [read_intact(path, _read, *DAMAGE) if verify else _header(path) for path in paths]
            manifest = _craft(folder / "craft.json")
            images = sum(len(tensors["samples"]) for tensors in read if tensors is not None)
            yield CacheEntry(folder.name, manifest, images, size, sum(tensors is None for tensors in read))

    def clear(self) -> int:
        """Removes everything; the bytes that were freed."""
        freed = sum(craft.size for craft in self.crafts())
        shutil.rmtree(self.root, ignore_errors=True)
        return freed


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a part; `Damaged` where it is none of ours."""
    tensors, metadata = read_hashed(path)
    if path.stem != f"part-{metadata['hash'][:24]}" or not _whole(tensors):
        raise Damaged(f"{path} is damaged: it holds no adversarial images of that name")
    return tensors


def _whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a part holds images (B,C,H,W), their samples and flags, and nothing else."""
    if set(tensors) != {"images", "samples", "zero_gradient"} or tensors["images"].ndim != 4:
        return False
    count = (len(tensors["images"]),)
    return tensors["samples"].shape == tensors["zero_gradient"].shape == count


def _craft(path: Path) -> dict[str, Any]:
    """What a folder of images is of; nothing where that is not known."""
    try:
        found = read_record(path)
    except RobenchError:
        return {}
    return found if all(isinstance(value, (str, float)) for value in found.values()) else {}


def _header(path: Path) -> dict[str, Tensor] | None:
    """The samples of a part alone; None where it cannot be opened."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {"samples": file.get_tensor("samples")}
    except (SafetensorError, OSError):
        return None
