"""CIFAR-10-C and CIFAR-100-C (Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261): corrupted test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from robench.core.data import Data, DataFolder, Split, outline
from robench.core.errors import RobenchError, unknown
from robench.core.files import tensors_hash

#: Test images of each severity; an array holds those of all, the mildest first.
IMAGES = 10_000
SEVERITIES = 5


@dataclass(frozen=True)
class _Clean:
    """The data set that was corrupted: its name, the folder of the arrays, its classes."""

    name: str
    folder: str
    classes: tuple[str, ...]


#: Those of `robench.core.data.CORRUPTED`.
KINDS = {
    "cifar10-c": _Clean(
        "cifar10", "CIFAR-10-C",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100-c": _Clean("cifar100", "CIFAR-100-C", tuple(map(str, range(100)))),
}  # fmt: skip


def corrupted(kind: str, what: str, place: DataFolder) -> Data:
    """The test images under one corruption at one severity; there are no training images.

    Args:
        kind: of `KINDS`; what: ``fog/3``, the name of an array and a severity of 1 to 5.

    Raises:
        RobenchError: the arrays are absent or not those that were published, or there is no such corruption.
    """
    clean = KINDS[kind]
    folder = place.folder / clean.folder
    name, _, severity = what.partition("/")
    if not folder.is_dir():
        raise RobenchError(
            f"{folder} does not exist; unpack {clean.folder}.tar there, which holds labels.npy and an array for each "
            f"corruption, or say where it is: --data-dir"
        )
    there = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
    if name not in there:
        raise unknown(f"corruption of {kind}", name, there, f"They are read from {folder}.")
    if severity not in map(str, range(1, SEVERITIES + 1)):
        raise RobenchError(f"expected a severity of 1 to {SEVERITIES}, {kind}:{name}/3, got {kind}:{what!r}")
    part = slice((int(severity) - 1) * IMAGES, int(severity) * IMAGES)
    # Only the slice is read.
    pixels = np.ascontiguousarray(_array(folder / f"{name}.npy", (32, 32, 3))[part].transpose(0, 3, 1, 2))
    labels = _array(folder / "labels.npy", ())[part].astype(np.int64)
    if labels.min() < 0 or labels.max() >= len(clean.classes):
        raise RobenchError(
            f"{folder}/labels.npy: expected labels in 0..{len(clean.classes) - 1}, got {labels.min()}..{labels.max()}"
        )
    test = Split(torch.from_numpy(pixels), torch.from_numpy(labels))
    none = Split(test.images[:0], test.labels[:0])
    usual = outline(clean.name)
    digest = tensors_hash({"test.images": test.images, "test.labels": test.labels})
    return Data(f"{kind}:{what}", none, test, usual.mean, usual.std, clean.classes, digest, usual.recipe)


def _array(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """An array of all severities, mapped from the disk."""
    try:
        found: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RobenchError(f"{path} cannot be read ({error}); unpack the published archive again") from error
    wanted = (SEVERITIES * IMAGES, *shape)
    if found.shape != wanted or not np.issubdtype(found.dtype, np.integer) or (shape and found.dtype != np.uint8):
        raise RobenchError(
            f"{path}: expected {'uint8' if shape else 'integers'} {wanted}, got {found.dtype} {found.shape}; "
            f"unpack the published archive again"
        )
    return found
