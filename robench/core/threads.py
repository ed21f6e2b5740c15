"""How many threads an operation gets on the CPU, and how many images at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Numbers in a batch of images below which one thread is enough. Measured with DVERGE/3 on 64 images of 8x8, on two
#: cores of which another process wanted one: .22 s a step with one thread, 4.7 with two, that wait for each other.
SMALL = 1 << 16

#: Numbers in a batch of images beyond which a step outgrows the processor's caches. Measured with DVERGE/3 on 3x32x32,
#: ms an image with 64, 100 and 256 images: 2.95, 3.05 and 3.4 in float32; 1.76, 1.73 and 1.65 in bfloat16.
CACHED = 200_000

#: Numbers in a batch of images that keep a GPU busy: a step of three ResNet-20 is about a thousand operations, which
#: the host starts in about 5 ms; an H200 computes some 2,500 images of 3x32x32 in that time. Half of it, as an image
#: takes 1.4 MB a member. Reckoned, not measured.
FILLED = 1 << 22

#: Images per forward pass at most, where nothing is crafted.
JUDGED = 500

#: Images per pass at most on a CPU, and of attacks whose images depend on their batch, where nobody says otherwise.
USUAL = 250


@contextmanager
def fitting_threads(device: torch.device, numel: int) -> Iterator[None]:
    """One thread within for small batches on the CPU; as before afterwards.

    It depends on the size alone, not on a measurement: rounding depends on the number of threads, and an interrupted
    training must round alike when it goes on.

    Args:
        numel: elements of a batch of images.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or numel >= SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fitting_batch(device: torch.device, numel: int, most: int | None) -> int:
    """Images per pass: ``most``, by default 250 and on a GPU what keeps it busy; on a CPU fewer where they are large,
    but 16.

    Args:
        numel: elements of one image.
    """
    if device.type == "cpu":
        return min(most or USUAL, max(16, CACHED // numel))
    return most or max(16, FILLED // numel)


def judging_batch(numel: int, most: int | None = None) -> int:
    """Images per forward pass: fewer of large ones, and at most ``most``.

    Args:
        numel: elements of one image.
    """
    return min(most or JUDGED, JUDGED, max(16, FILLED // numel))


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``count`` things, ``size`` at a time."""
    for start in range(0, count, size):
        yield slice(start, start + size)
