"""How many threads an operation gets on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Numbers in a batch of images below which one thread is enough. Measured with DVERGE/3 on 64 images of 8x8, on two
#: cores of which another process wanted one: .22 s a step with one thread, 4.7 with two, that wait for each other.
SMALL = 1 << 16


@contextmanager
def fitting_threads(device: torch.device, numbers: int) -> Iterator[None]:
    """One thread within for small batches on the CPU; as before afterwards.

    It depends on the size alone, not on a measurement: rounding depends on the number of threads, and an interrupted
    training must round alike when it goes on.

    Args:
        numbers: elements of a batch of images.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or numbers >= SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
