"""M-DI²-FGSM: the geometry against loops, its draws, its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from robench.attacks import ATTACKS
from robench.attacks.mdi2 import MDI2, diversify
from robench.attacks.pgd import PGD
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Draws, Stream

Array = npt.NDArray[np.float64]


def reference(image: Array, unit: Array, probability: float, smallest: float) -> Array:
    """One image (C,H,W), pixel by pixel."""
    if not unit[0] < probability:
        return image.copy()
    sides, offsets = [], []
    for size, shift in zip(image.shape[1:], unit[2:], strict=True):
        least = math.ceil(smallest * size)
        side = least + math.floor(unit[1] * (size - least + 1))
        sides.append(side)
        offsets.append(math.floor(shift * (size - side + 1)))
    result = np.zeros_like(image)
    for row in range(sides[0]):
        for column in range(sides[1]):
            source = row * image.shape[1] // sides[0], column * image.shape[2] // sides[1]
            result[:, offsets[0] + row, offsets[1] + column] = image[:, source[0], source[1]]
    return result


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 32, 32), (1, 20, 12), (2, 7, 31)], ids=str)
@pytest.mark.parametrize("smallest", [0.875, 0.4])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_geometry_is_that_of_the_loops(shape: tuple[int, ...], smallest: float, probability: float) -> None:
    draws = Stream(("mdi2",))
    images = draws.uniform((40, *shape), "images").double()
    unit = draws.uniform((40, 4), "unit")
    found = diversify(images, unit, probability, smallest)
    wanted = [
        reference(image, values, probability, smallest)
        for image, values in zip(images.numpy(), unit.double().numpy(), strict=True)
    ]
    np.testing.assert_array_equal(found.numpy(), np.stack(wanted))


def test_sides_and_offsets_are_uniform() -> None:
    unit = Draws.of(range(6_000)).uniform("diversity", (4,), torch.empty(0))
    shown = diversify(torch.ones(6_000, 1, 32, 32), unit, 0.5, 0.875)[:, 0]
    sides = shown.amax(dim=2).sum(dim=1).long()
    shares = torch.bincount(sides, minlength=33)[28:] / len(sides)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]), rtol=0, atol=0.02)
    tops = shown[sides == 28].amax(dim=2).argmax(dim=1)
    lefts = shown[sides == 28].amax(dim=1).argmax(dim=1)
    for first in (tops, lefts):
        torch.testing.assert_close(torch.bincount(first) / len(first), torch.full((5,), 0.2), rtol=0, atol=0.07)
    assert abs(np.corrcoef(tops.numpy(), lefts.numpy())[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_sees_the_same_geometry(dtype: torch.dtype) -> None:
    draws = Stream(("mdi2",))
    # 64 grey levels, exact in every dtype.
    images, unit = (draws.uniform((9, 3, 32, 32), "images") * 64).floor() / 64, draws.uniform((9, 4), "unit")
    found = diversify(images.to(dtype), unit, 1.0, 0.875)
    assert found.dtype == dtype
    assert torch.equal(found.float(), diversify(images, unit, 1.0, 0.875))


def test_the_gradient_goes_back_to_where_pixels_came_from() -> None:
    draws = Stream(("mdi2",))
    images = draws.uniform((4, 2, 6, 9), "images").double().requires_grad_(True)
    unit = draws.uniform((4, 4), "unit")
    assert torch.autograd.gradcheck(lambda z: diversify(z, unit, 0.7, 0.6), (images,))


def test_one_size_is_left_alone() -> None:
    images = Stream(("mdi2",)).uniform((4, 3, 8, 8), "images")
    unit = Stream(("mdi2",)).uniform((4, 4), "unit")
    assert torch.equal(diversify(images, unit, 1.0, 1.0), images)


def test_without_diversity_it_is_momentum_pgd(
    make_ensemble: Callable[..., Ensemble], make_batch: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = make_ensemble()
    images, labels = make_batch(model)
    plain = PGD(steps=5, momentum=1.0, random_start=False)(model, images, labels, 0.1)
    diverse = MDI2(steps=5, probability=0.0)
    assert torch.equal(diverse(model, images, labels, 0.1).images, plain.images)
    assert not torch.equal(MDI2(steps=5)(model, images, labels, 0.1).images, plain.images)
    started = MDI2(steps=5, probability=0.0, random_start=True)(model, images, labels, 0.1)
    assert torch.equal(started.images, PGD(steps=5, momentum=1.0)(model, images, labels, 0.1).images)


def test_it_draws_what_it_says() -> None:
    assert MDI2().stochastic
    assert MDI2(probability=0.0, random_start=True).stochastic
    assert not MDI2(probability=0.0).stochastic
    assert not MDI2(smallest=1.0).stochastic


@pytest.mark.parametrize("values", [{"probability": 1.1}, {"probability": -0.1}, {"smallest": 0}, {"smallest": 1.2}])
def test_wrong_fields_are_named(values: dict[str, float]) -> None:
    with pytest.raises(RobenchError, match=next(iter(values))):
        ATTACKS.get("mdi2")(**values)
