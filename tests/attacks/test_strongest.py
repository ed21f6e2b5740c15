"""The strongest set: each part on what stands, and nothing stands that one of them takes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from robench.attacks.apgd import APGD
from robench.attacks.square import Square
from robench.attacks.strongest import Strongest
from robench.core.ensemble import Ensemble
from robench.core.frozen import frozen
from robench.core.rng import Draws

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., Any]


def test_its_parts_are_in_order_of_cost_and_its_passes_are_theirs() -> None:
    attack = Strongest()
    parts = attack.parts(10)
    costs = [part.passes for part in parts]
    assert [part.name for part in parts] == ["apgd", *["members"] * 4, "mora", "apgd", "square"]
    assert costs[1:] == sorted(costs[1:])
    assert costs == [101, 100, 100, 100, 100, 505, 909, 1000]
    assert attack.passes == sum(costs)
    assert [part.loss for part in Strongest(loss="cw").parts(10)] == ["cw"] * 8


@pytest.mark.parametrize("eps", [0.006, 0.012])
def test_nothing_stands_that_a_part_takes_alone(eps: float, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3, 8, torch.float64)
    images, labels = make_batch(model, 8, dtype=torch.float64)
    attack, draws = Strongest(steps=4, queries=8), Draws.of(range(10, 18))
    radii = torch.full((8,), eps, dtype=torch.float64)
    with frozen(model):
        found, taken = attack.perturb(model, images, labels, radii, draws)
    torch.testing.assert_close(attack(model, images, labels, eps, draws).images, found, rtol=0, atol=0)
    alone = [part(model, images, labels, eps, draws).images for part in attack.parts(5)]
    wrong = torch.stack([model(each).argmax(dim=1) != labels for each in alone])
    first = [next((number for number in range(8) if wrong[number, row]), -1) for row in range(8)]
    assert taken.tolist() == first
    assert (model(found).argmax(dim=1) == labels).tolist() == [number < 0 for number in first]
    for row, number in enumerate(first):
        if number >= 0:
            torch.testing.assert_close(found[row], alone[number][row], rtol=0, atol=1e-9)
    assert len(set(first)) > 1, "or one part did all of it"


def test_few_classes_have_no_targeted_dlr() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)).eval()
    images = torch.rand(4, 3, 8, 8)
    attack = Strongest(steps=2, queries=2)
    assert attack.parts(3)[-2] == APGD(loss="cw", steps=2)
    assert attack.parts(4)[-2] == APGD(objective="dlr", targets=3, steps=2)
    assert attack.parts(3)[-1] == Square(queries=2)
    crafted = attack(model, images, model(images).argmax(dim=1), 1e-4)
    assert crafted.images.shape == images.shape
