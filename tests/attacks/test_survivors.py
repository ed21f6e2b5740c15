"""Parts in turn: who is attacked, what is kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks.survivors import Least, Part, Standing, in_turn
from robench.core.rng import Draws


class Brightness(nn.Module):
    """Class 0 where the first pixel is below .5; the margin of class 0 is 1 − 2x."""

    def forward(self, images: Tensor) -> Tensor:
        first = images[:, 0, 0, 0]
        return torch.stack([1 - first, first], dim=1)


def shown(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def test_each_part_gets_what_stands_and_the_least_margin_is_kept() -> None:
    images, labels = shown(0.1, 0.2, 0.3, 0.4), torch.zeros(4, dtype=torch.int64)
    eps, draws = shown(0.01, 0.02, 0.03, 0.04).flatten(), Draws.of([7, 8, 9, 10], seed=3, restart=2)
    given: list[Standing] = []

    def adding(amount: float) -> Part:
        def part(here: Standing) -> Tensor:
            given.append(here)
            return here.images + amount

        return part

    best, taken = in_turn(map(adding, (0.15, 0.05, 0.25, 9, 9)), Brightness(), images, labels, eps, draws)
    assert taken.tolist() == [3, 3, 2, 0]
    assert best.flatten().tolist() == (images + shown(9, 9, 0.25, 0.15)).flatten().tolist()
    assert [each.rows.tolist() for each in given] == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1]]
    for each in given:
        rows = each.rows
        assert torch.equal(each.images, images[rows])
        assert torch.equal(each.eps, eps[rows])
        assert torch.equal(each.labels, labels[rows])
        assert each.draws == Draws(each.draws.samples, 3, 2)
        assert each.draws.samples.tolist() == [7 + row for row in rows.tolist()]


def test_what_stands_to_the_end_keeps_its_best_and_is_said_to_stand() -> None:
    images, labels = shown(0.1, 0.2), torch.zeros(2, dtype=torch.int64)
    parts: list[Part] = [lambda here: here.images + 0.2, lambda here: here.images - 0.1]
    best, taken = in_turn(parts, Brightness(), images, labels, images.flatten(), Draws.of([0, 1]))
    assert taken.tolist() == [-1, -1]
    assert best.flatten().tolist() == (images + 0.2).flatten().tolist()


def test_the_last_one_standing_is_never_alone_in_its_batch() -> None:
    images, labels = shown(0.45, 0.1), torch.zeros(2, dtype=torch.int64)
    sizes = []

    def part(here: Standing) -> Tensor:
        sizes.append((len(here.images), here.draws.samples.tolist()))
        return here.images + 0.1

    best, taken = in_turn([part, part], Brightness(), images, labels, images.flatten(), Draws.of([4, 5]))
    assert sizes == [(2, [4, 5]), (2, [5, 5])]
    assert taken.tolist() == [0, -1]
    np.testing.assert_allclose(best.flatten().numpy(), [0.55, 0.2])


def test_least_keeps_the_image_of_the_least_margin() -> None:
    least = Least(shown(0.1, 0.1), torch.tensor([0, 1]))
    for values in ((0.2, 0.7), (0.6, 0.9), (0.4, 0.3)):
        least.see(shown(*values), Brightness()(shown(*values)))
    assert least.images.flatten().tolist() == [0.6, 0.3]
    np.testing.assert_allclose(least.margin.numpy(), [-0.2, -0.4])
