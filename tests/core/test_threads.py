"""How many images go through a pass."""

from __future__ import annotations

import pytest
import torch

from robench.core.threads import fitting_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "numbers", "most", "expected"),
    [
        (CPU, 64, None, 250),
        (CPU, 64, 1000, 1000),
        (CPU, 3072, None, 65),  # the caches
        (CPU, 3072, 20, 20),
        (CPU, 3 * 224 * 224, None, 16),
        (GPU, 3072, None, 1365),
        (GPU, 3 * 224 * 224, None, 27),
        (GPU, 3072, 4000, 4000),  # whoever knows the memory decides
        (GPU, 3072, 20, 20),
    ],
)
def test_as_many_as_suit_the_device_and_no_more_than_asked_for(
    device: torch.device, numbers: int, most: int | None, expected: int
) -> None:
    assert fitting_batch(device, numbers, most) == expected
