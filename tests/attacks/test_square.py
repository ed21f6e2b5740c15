"""Square: squares of the paper's sizes at keyed places, kept where the margin gets smaller."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from robench.attacks.square import Square
from robench.core.losses import margin
from robench.core.rng import Draws, Stream

IMAGES = 0.3 + 0.4 * Stream(("square",)).uniform((6, 3, 16, 16), "images")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def linear() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval()
    model[1].bias.data.zero_()
    model[1].weight.data = Stream(("square",)).uniform((3, 3 * 16 * 16), "weight") - 0.5
    return model


def margins(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(images), LABELS)


def test_more_queries_go_on_from_fewer_and_never_raise_the_margin() -> None:
    """With a schedule of one side, the queries of a shorter attack are the first of a longer one."""
    model, found = linear(), []
    for queries in (1, 10, 40, 160):
        attack = Square(queries=queries, area=1 / 256)
        found.append(margins(model, attack(model, IMAGES, LABELS, 0.1, Draws.of(range(6))).images))
    for fewer, more in pairwise(found):
        assert bool((more <= fewer).all())
    assert bool((found[-1] < found[0]).all())


def test_it_comes_near_the_optimum_of_a_linear_model() -> None:
    """Where x + ε·sign(w) is the best that there is; noise of the same size takes almost nothing."""
    model = linear()
    weight = model[1].weight.detach()
    clean = margins(model, IMAGES)
    rival = model(IMAGES).scatter(1, LABELS[:, None], -float("inf")).argmax(dim=1)
    best = (IMAGES - 0.05 * (weight[LABELS] - weight[rival]).sign().view_as(IMAGES)).clamp(0, 1)
    crafted = Square(queries=2000)(model, IMAGES, LABELS, 0.05).images
    noise = IMAGES + 0.05 * (Stream(("square",)).uniform(IMAGES.shape, "noise") - 0.5).sign()
    gained, possible = clean - margins(model, crafted), clean - margins(model, best)
    assert bool((gained > 0.4 * possible).all()), gained / possible
    assert bool(((clean - margins(model, noise)) < 0.2 * possible).all())


def test_pixels_are_at_the_corners_of_the_ball_and_no_gradient_is_asked_for() -> None:
    class Steps(nn.Module):
        """Not differentiable."""

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return linear()((images * 15).round() / 15)

    crafted = Square(queries=30)(Steps(), IMAGES, LABELS, 0.1)
    torch.testing.assert_close((crafted.images - IMAGES).abs(), torch.full_like(IMAGES, 0.1))
    assert not bool(crafted.zero_gradient.any())
    torch.testing.assert_close(crafted.outputs, Steps()(crafted.images))


def test_sides_are_the_paper_s() -> None:
    """Of 10,000 queries on 32x32: p = .8, halved after 10, 50, 200, ...; a side of one pixel at last."""
    attack = Square(queries=10_000)
    assert [attack.side(at, 32, 32) for at in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 9999)] == [
        29, 29, 20, 14, 10, 7, 5, 4, 3, 1,
    ]  # fmt: skip
    assert Square(queries=100).side(99, 32, 32) == 1


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, attack = linear().double(), Square(queries=50)
    images = IMAGES.double()
    whole = attack(model, images, LABELS, 0.1, Draws.of([5, 6, 7, 8, 9, 10])).images
    part = attack(model, images[2:4], LABELS[2:4], 0.1, Draws.of([7, 8])).images
    assert torch.equal(whole[2:4], part)
    other = attack(model, images[2:4], LABELS[2:4], 0.1, Draws.of([7, 8], restart=1)).images
    assert not torch.equal(part, other)
