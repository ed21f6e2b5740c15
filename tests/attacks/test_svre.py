"""SVRE against a plain writing of its algorithm, and the members that it reaches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.attacks.pgd import PGD
from robench.attacks.svre import SVRE
from robench.core.ensemble import Ensemble, mixture
from robench.core.errors import RobenchError
from robench.core.fast import attackable, members
from robench.core.rng import Draws, key
from tests.attacks.plain import climb, compare, counted, slope

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]


def test_svre_is_its_algorithm(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack = SVRE(steps=3, inner_steps=2, inner_ratio=0.15, momentum=0.7)
    model = make_ensemble(3, dtype=torch.float64)
    drawn: set[int] = set()

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        def rule(z: Tensor, step: int) -> Tensor:
            mean = sum((slope(member, z, label) for member in model.members), torch.zeros_like(z)) / 3
            inner, velocity = z.clone(), torch.zeros_like(z)
            for turn in range(6):
                number = key("attack", draws.seed, draws.restart, "members", step, turn) % 3
                drawn.add(number)
                member = model.members[number]
                reduced = slope(member, inner, label) - slope(member, z, label) + mean
                velocity = 0.7 * velocity + reduced / reduced.abs().sum()
                inner = inner + 0.15 * eps * velocity.sign()
                inner = torch.min(torch.max(inner, image - eps), image + eps).clamp(0, 1)
            return velocity

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)
    assert drawn == {0, 1, 2}


def test_of_one_step_on_one_member_it_is_momentum_pgd(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(1, dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    plain = PGD(steps=4, step_ratio=0.1, momentum=1.0, random_start=False)(model, images, labels, 0.1).images
    attack = SVRE(steps=4, inner_steps=1)
    torch.testing.assert_close(attack(model, images, labels, 0.1).images, plain, rtol=0, atol=1e-9)
    alone = attack(model.members[0], images, labels, 0.1).images
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-9)


def test_passes_are_those_that_it_makes_but_for_the_first_of_the_inner_ones(
    make_ensemble: Make, make_batch: MakeBatch
) -> None:
    attack, model = SVRE(steps=3), make_ensemble(3)
    images, labels = make_batch(model)
    with ExitStack() as stack:
        counts = [stack.enter_context(counted(member)) for member in model.members]
        attack(model, images, labels, 0.1)
    made = sum(sum(each) for each in counts) / 3 / len(images) - 1  # the contract looks at the last iterate
    assert made == attack.passes - attack.steps / 3
    assert SVRE().passes == 50
    assert not attack.restarts_are_versions


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_members_are_those_of_the_model(precision: Any, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3)
    images, _ = make_batch(model)
    fast = attackable(model, images, precision)
    images = images.to(torch.float64 if precision == "float64" else torch.float32)
    with torch.no_grad():
        logits = torch.stack([member(images) for member in members(fast)])
        assert logits.dtype == images.dtype
        torch.testing.assert_close(mixture(logits), fast(images))
    assert len(logits) == 3
    alone = nn.Flatten()
    assert members(alone) == [alone]


def test_networks_that_take_no_channels_last_are_attacked(make_batch: MakeBatch, make_ensemble: Make) -> None:
    class Viewing(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, images: Tensor) -> Tensor:
            return self.scale * images.view(len(images), -1)[:, :5]

    images, labels = make_batch(make_ensemble())
    crafted = SVRE(steps=2)(
        Ensemble([Viewing(1.0), Viewing(2.0)]), images.contiguous(memory_format=torch.channels_last), labels, 0.1
    )
    assert (crafted.linf > 0).all()


@pytest.mark.parametrize("values", [{"inner_steps": 0}, {"inner_ratio": 0.0}])
def test_wrong_fields_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(RobenchError, match=rf"`{next(iter(values))}` of attack 'svre'"):
        SVRE(**values)
