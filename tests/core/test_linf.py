"""The ball, the box, and every wrong ε."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.errors import RobenchError
from robench.core.linf import as_eps, bounds, distance

IMAGES = torch.rand((3, 1, 2, 2), generator=torch.Generator().manual_seed(0))


def test_a_number_becomes_one_per_image_in_the_images_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        eps = as_eps(0.1, IMAGES.to(dtype))
        assert eps.dtype == dtype
        # 0.1 is rounded once, to the dtype of the images.
        assert torch.equal(eps, torch.full((3,), 0.1, dtype=dtype))


@pytest.mark.parametrize("eps", [torch.tensor(0.25), np.float32(0.25), [0.25] * 3, np.full(3, 0.25)])
def test_what_else_counts_as_eps(eps: Any) -> None:
    assert torch.equal(as_eps(eps, IMAGES), torch.full((3,), 0.25))


def test_a_tensor_is_copied() -> None:
    mine = torch.tensor([0.1, 0.2, 0.3])
    as_eps(mine, IMAGES).zero_()
    assert mine.tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "eps",
    [
        -0.01,
        1.01,
        8,
        float("nan"),
        float("inf"),
        torch.tensor([0.1, 0.2]),
        torch.tensor([0.1, 0.2, 1.5]),
        torch.tensor([0.1, 0.2, float("nan")]),
        torch.tensor([0.1, -0.2, 0.3]),
        torch.zeros(3, 1),
        torch.tensor(2.0),
        torch.tensor([0.1j, 0, 0]),
        "0.1",
        None,
        0.1j,
        [[0.1], [0.1, 0.2]],
        object(),
    ],
    ids=lambda eps: type(eps).__name__,
)
def test_every_other_eps_is_an_error(eps: Any) -> None:
    with pytest.raises(RobenchError, match="expected `eps`"):
        as_eps(eps, IMAGES)


def test_images_of_integers_are_an_error() -> None:
    with pytest.raises(RobenchError, match="divide uint8 by 255"):
        as_eps(0.1, torch.zeros((3, 1, 2, 2), dtype=torch.uint8))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_any_eps_gives_a_radius_or_our_error(eps: Any) -> None:
    try:
        radius = as_eps(eps, IMAGES)
    except RobenchError:
        return
    assert radius.shape == (3,)
    assert bool(((radius >= 0) & (radius <= 1)).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5), st.floats(0, 1, width=32))
def test_bounds_are_the_ball_cut_with_the_box(pixels: list[float], radius: float) -> None:
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 1, 1)
    before = images.clone()
    lower, upper = bounds(images, as_eps(radius, images))
    wanted = np.array(pixels, dtype=np.float32)
    assert np.array_equal(lower.flatten().numpy(), np.maximum(wanted - np.float32(radius), 0))
    assert np.array_equal(upper.flatten().numpy(), np.minimum(wanted + np.float32(radius), 1))
    assert torch.equal(images, before)


def test_every_image_has_its_own_radius() -> None:
    lower, upper = bounds(torch.full((2, 1, 1, 2), 0.5), torch.tensor([0.0, 0.25]))
    assert lower.flatten().tolist() == [0.5, 0.5, 0.25, 0.25]
    assert upper.flatten().tolist() == [0.5, 0.5, 0.75, 0.75]


def test_distance_is_the_largest_change_per_image() -> None:
    moved = IMAGES.clone()
    moved[1, 0, 1, 0] -= 0.5
    moved[2, 0, 0, 1] += 0.25
    assert distance(moved, IMAGES).tolist() == pytest.approx([0.0, 0.5, 0.25])
