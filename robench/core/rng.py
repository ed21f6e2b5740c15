"""Random draws keyed by what they are for.

A draw depends on its key alone: never on the batch it is made in, the order, the device or what was drawn before. The
generator is NumPy's counter-based Philox, of which only the raw 64-bit stream is used: that stream is fixed by
NumPy's compatibility policy, while the distributions on top of it are not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Part = str | int


def key(*parts: Part) -> int:
    """A 64-bit key for a tuple of names and numbers, the same in every process and on every machine."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _raw(key_: int, counter: int, count: int) -> npt.NDArray[np.uint64]:
    bits = np.random.Philox(key=np.array([key_, counter], dtype=np.uint64))
    return np.asarray(bits.random_raw(count), dtype=np.uint64)


def _unit(raw: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Uniform in (0, 1) on the grid (k + ½)/2²³, which float32 holds exactly: the same in every dtype."""
    return ((raw >> np.uint64(41)).astype(np.float64) * 2.0**-23 + 2.0**-24).astype(np.float32)


@dataclass(frozen=True)
class Draws:
    """The draws of one attack on one batch: keyed by (seed, index in the data set, restart), shared by all ε.

    Attributes:
        samples: index of each image in its data set, int64, shape (B,).
    """

    samples: npt.NDArray[np.int64]
    seed: int = 0
    restart: int = 0

    @classmethod
    def of(cls, samples: Tensor | Sequence[int] | npt.NDArray[np.int64], *, seed: int = 0, restart: int = 0) -> Draws:
        return cls(np.asarray(samples, dtype=np.int64), seed, restart)

    def uniform(self, purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uniform in (0, 1), shape (B, *shape), in the dtype and on the device of ``like``."""
        count = int(np.prod(shape, dtype=np.int64))
        key_ = key("attack", self.seed, self.restart, purpose)
        # ε values share a batch, so that one sample may come several times: drawn once.
        unique, inverse = np.unique(self.samples, return_inverse=True)
        block = np.empty((len(unique), count), dtype=np.float32)
        for row, sample in zip(block, unique, strict=True):
            row[:] = _unit(_raw(key_, int(sample), count))
        return torch.from_numpy(block[inverse]).view(-1, *shape).to(like)

    def at(self, restart: int) -> Draws:
        """The same samples at another restart."""
        return replace(self, restart=restart)

    def only(self, rows: npt.NDArray[np.int64]) -> Draws:
        """The draws of these rows of the batch."""
        return replace(self, samples=self.samples[rows])


@dataclass(frozen=True)
class Stream:
    """The draws of one training run: keyed by who trains (role, defense, n, seed) and by purpose and position."""

    owner: tuple[Part, ...]

    def key(self, *purpose: Part) -> int:
        return key("train", *self.owner, *purpose)

    def permutation(self, count: int, *purpose: Part) -> Tensor:
        """A permutation of range(count), int64, on the CPU."""
        return torch.from_numpy(np.argsort(_raw(self.key(*purpose), 0, count), kind="stable"))

    def uniform(self, shape: Sequence[int], *purpose: Part) -> Tensor:
        """Uniform in (0, 1), float32, on the CPU."""
        count = int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(_unit(_raw(self.key(*purpose), 0, count))).view(*shape)

    def below(self, count: int, *purpose: Part) -> int:
        """⌊u·count⌋ with u of `uniform`: a choice among ``count``. The same u serves every count."""
        return math.floor(float(self.uniform((1,), *purpose)) * count)

    def within(self, *purpose: Part) -> Stream:
        """The stream of a part of this run, such as one step."""
        return Stream((*self.owner, *purpose))
