"""Adversarial images that others crafted, judged like our own."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS, Attack
from robench.core.errors import RobenchError
from robench.core.files import tensors_hash
from robench.core.rng import Draws

#: The prefix of these attacks: ``given/PATH.npz``.
FAMILY = "given"
ROUNDING = 1e-6
#: Files that were named in this process, by the start of their hash, which is their name in rows and keys.
_files: dict[str, type[Attack]] = {}


@dataclass(frozen=True, kw_only=True)
class Given(Attack):
    """The images of one file. An image outside the ball is refused, never projected: it would be another one.

    Attributes:
        path: of the file; images: (N,C,H,W) in [0, 1]; rows: the row of each sample, an index in the test set.
    """

    gradient_free: ClassVar[bool] = True
    keeps_clean: ClassVar[bool] = True
    path: ClassVar[str]
    images: ClassVar[Tensor]
    rows: ClassVar[dict[int, int]]

    @property
    def stochastic(self) -> bool:
        return False

    def __reduce__(self) -> tuple[object, ...]:
        # The class is made from the file: another process makes its own.
        return _rebuilt, (self.path, {"loss": self.loss})

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        samples = draws.samples.tolist()
        if lacking := sorted({sample for sample in samples if sample not in self.rows}):
            raise RobenchError(
                f"attack {self.label!r} has images of {len(self.rows)} samples, and none of sample {lacking[0]} nor of "
                f"{len(lacking) - 1} others of this batch; judge what it has with --samples and --subset"
            )
        found = self.images[[self.rows[sample] for sample in samples]].to(images)
        if found.shape != images.shape:
            raise RobenchError(
                f"attack {self.label!r} has images {tuple(found.shape[1:])}, the data {tuple(images.shape[1:])}"
            )
        distance = (found.double() - images.double()).abs().flatten(1).amax(dim=1)
        # The clean image was rounded to this dtype as well.
        beyond = (distance > eps.double() + ROUNDING + torch.finfo(images.dtype).eps).nonzero()[:, 0]
        if len(beyond):
            at = int(beyond[0])
            raise RobenchError(
                f"attack {self.label!r}: the image of sample {samples[at]} is {float(distance[at]):.4g} away from the "
                f"clean one, beyond ε {float(eps[at]):.4g}; judge at the ε that the images were made for: --eps"
            )
        return found


def _resolve(name: str) -> type[Attack]:
    """The class of ``given/<path of a file>``, or of ``given/<hash>`` where that file was named before."""
    return _files[name] if name in _files else _of_file(str(Path(name).resolve()), name)


@cache
def _of_file(path: str, name: str) -> type[Attack]:
    images, samples = _read(Path(path), name)
    digest = tensors_hash({"images": images, "samples": torch.from_numpy(samples)})[:16]
    rows = {int(sample): row for row, sample in enumerate(samples)}
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": Given.__doc__,
        "path": path,
        "images": images,
        "rows": rows,
    }
    # Named by what they are, wherever the file lies.
    namespace["name"] = f"{FAMILY}/{digest}"
    _files[digest] = make_dataclass("Given", [], bases=(Given,), namespace=namespace, frozen=True, kw_only=True)
    return _files[digest]


def _rebuilt(path: str, values: dict[str, str]) -> Attack:
    return _of_file(path, Path(path).name)(**values)


def _read(path: Path, name: str) -> tuple[Tensor, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Images in [0, 1], float32 (N,C,H,W), and samples, int64 (N,).

    Raises:
        RobenchError: no such file, or one that holds something else.
    """
    expected = "expected an .npz with `images` (N,C,H,W), uint8 or float in [0, 1], and `samples` (N,)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, samples = file["images"], file["samples"]
    except FileNotFoundError as error:
        raise RobenchError(f"attack '{FAMILY}/{name}': there is no such file here; {expected}") from error
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise RobenchError(f"attack '{FAMILY}/{name}': {path.name} cannot be read ({error}); {expected}") from error
    found = f"got {images.dtype} {images.shape} and {samples.dtype} {samples.shape}"
    if images.ndim != 4 or samples.shape != images.shape[:1] or samples.dtype.kind not in "iu":
        raise RobenchError(f"attack '{FAMILY}/{name}': {expected}, {found}")
    if len(set(samples.tolist())) < len(samples):
        raise RobenchError(f"attack '{FAMILY}/{name}': a sample has several images; give one file for each")
    if images.dtype == np.uint8:
        pixels = torch.from_numpy(images).float() / 255
    elif images.dtype.kind == "f" and np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1:
        pixels = torch.from_numpy(images.astype(np.float32))
    else:
        raise RobenchError(f"attack '{FAMILY}/{name}': {expected}, {found}")
    return pixels, samples.astype(np.int64)


ATTACKS.family(FAMILY, _resolve, lambda: list(_files))
