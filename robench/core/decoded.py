"""Images that are decoded once and then lie in a file that is mapped into memory, however many there are."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.core.errors import RobenchError
from robench.core.files import Absent, Damaged, read_hashed, scratch, write_hashed
from robench.core.parts import read_intact

log = logging.getLogger(__name__)

#: Of a cache file.
_TENSORS = {f"{part}.{kind}" for part in ("train", "test") for kind in ("images", "labels")}


class Encoded(NamedTuple):
    """An image as it is found: what errors call it, the file or its content, the label."""

    name: str
    source: Path | bytes
    label: int


def decoded(path: Path, parts: Mapping[str, Iterable[Encoded]]) -> tuple[dict[str, Tensor], str]:
    """``train.images``, ``test.images`` uint8 (M,C,H,W), ``train.labels``, ``test.labels`` int64 (M,), and their hash.

    The images are those of the file ``path``, which is written first where it is absent or damaged; only what is looked
    at comes into memory, and the system may take it out again.

    Raises:
        RobenchError: what is no image, images of several sizes in a part, or a place that cannot be written.
    """
    if found := _kept(path):
        return found
    log.info(f"images are decoded once, into {path}")
    with contextlib.ExitStack() as stack:
        tensors = {}
        for part, entries in parts.items():
            raw = stack.enter_context(scratch(path))
            tensors[f"{part}.images"], tensors[f"{part}.labels"] = _written(raw, entries)
        write_hashed(path, tensors)
    return _read(path)


def _kept(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """What a cache file holds; None where it is absent or damaged."""
    with contextlib.suppress(Absent):
        return read_intact(path, _read, "the images", "are read again")
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    found, about = read_hashed(path)
    if set(found) != _TENSORS:
        raise Damaged(f"{path} is damaged: it holds no images")
    return found, about["hash"]


def _written(raw: Path, entries: Iterable[Encoded]) -> tuple[Tensor, Tensor]:
    """Images, mapped to the bytes in ``raw``, and labels. Plain writes: a full disk is an error, and kills nobody."""
    labels: list[int] = []
    first, shape = "", (0,)
    with raw.open("wb") as file:
        for entry in entries:
            pixels = _pixels(entry)
            first, shape = (first, shape) if labels else (entry.name, pixels.shape)
            if pixels.shape != shape:
                raise RobenchError(f"{entry.name} has shape {pixels.shape}, {first} has {shape}; make them equal")
            file.write(pixels.tobytes())
            labels.append(entry.label)
    images = torch.from_file(str(raw), shared=False, size=len(labels) * math.prod(shape), dtype=torch.uint8)
    return images.view(len(labels), *shape), torch.tensor(labels)


def _pixels(entry: Encoded) -> npt.NDArray[np.uint8]:
    """(C,H,W)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(entry.source) if isinstance(entry.source, bytes) else entry.source) as image:
            if image.mode[0] in "IF":
                raise RobenchError(f"{entry.name} holds pixels of more than 8 bits (mode {image.mode}); save it with 8")
            pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise RobenchError(f"{entry.name} cannot be decoded as an image ({error}); remove or replace it") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
