"""VMI, GRA, PGN and MEF against plain writings of their formulas; the loop that follows what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robench.attacks import ATTACKS, copies
from robench.attacks.ascent import ascend, follow
from robench.attacks.gra import GRA
from robench.attacks.mef import MEF
from robench.attacks.pgd import PGD
from robench.attacks.pgn import PGN
from robench.attacks.vmi import VMI
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Draws
from tests.attacks.plain import climb, compare, counted, noises, slope

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]

NAMES = ("vmi", "gra", "pgn", "mef")


def test_vmi_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = VMI(steps=4, neighbours=3), make_ensemble(dtype=torch.float64)

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        variance = torch.zeros_like(image)

        def rule(z: Tensor, step: int) -> Tensor:
            nonlocal variance
            here, before = slope(model, z, label), variance
            around = [slope(model, z + noise, label) for noise in noises(draws, z, 1.5 * eps, step, 3)]
            variance = sum(around, torch.zeros_like(z)) / 3 - here
            return here + before

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


def test_gra_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = GRA(steps=6, neighbours=3), make_ensemble(dtype=torch.float64)
    slower = 0

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        changes, before = torch.zeros_like(image), torch.zeros_like(image)

        def rule(z: Tensor, step: int) -> Tensor:
            here = slope(model, z, label)
            around = sum(
                (slope(model, z + noise, label) for noise in noises(draws, z, 3.5 * eps, step, 3)), torch.zeros_like(z)
            )
            around = around / 3
            cosine = (here * around).sum() / (here.norm() * around.norm())
            return cosine * here + (1 - cosine) * around

        def pixels(velocity: Tensor) -> Tensor:
            nonlocal changes, before, slower
            changes = changes + (velocity * before < 0)
            before = velocity
            slower += int((changes > 1).sum())
            return 0.94**changes

        return climb(image, eps, attack, rule, pixels)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)
    assert slower > 0


@pytest.mark.parametrize("length", ["mean", "l1"])
def test_pgn_is_its_formula(length: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack = PGN(steps=3, neighbours=3, balance=0.3, length=length)  # type: ignore[arg-type]
    model = make_ensemble(dtype=torch.float64)

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        def rule(z: Tensor, step: int) -> Tensor:
            total = torch.zeros_like(z)
            for noise in noises(draws, z, 3 * eps, step, 3):
                near = slope(model, z + noise, label)
                size = near.abs().mean() if length == "mean" else near.abs().sum()
                total += 0.7 * near + 0.3 * slope(model, z + noise - 0.1 * eps * near / size, label)
            return total / 3

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


def test_mef_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = MEF(steps=4, neighbours=3), make_ensemble(dtype=torch.float64)

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        directions = [torch.zeros_like(image)] * 3

        def rule(z: Tensor, step: int) -> Tensor:
            found = [
                slope(model, z + noise + 0.15 * eps * direction, label)
                for noise, direction in zip(noises(draws, z, 2 * eps, step, 3), directions, strict=True)
            ]
            for number, each in enumerate(found):
                directions[number] = each / each.abs().mean() - 0.9 * directions[number]
            return sum(found, torch.zeros_like(z)) / 3

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


@pytest.mark.parametrize(
    "attack",
    [
        VMI(steps=4, radius=0.0),
        GRA(steps=4, radius=0.0, decay=1.0),
        PGN(steps=4, radius=0.0, balance=0.0),
        MEF(steps=4, radius=0.0, inner_ratio=0.0, momentum=1.0),
    ],
    ids=NAMES,
)
def test_without_a_neighbourhood_it_is_momentum_pgd(attack: Any, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    plain = PGD(steps=4, step_ratio=0.1, momentum=1.0, random_start=False)(model, images, labels, 0.1)
    torch.testing.assert_close(attack(model, images, labels, 0.1).images, plain.images, rtol=0, atol=1e-9)
    assert not attack.stochastic


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_copies_give_what_all_at_once_do(
    name: str, make_ensemble: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = ATTACKS.get(name)(steps=3, neighbours=5)  # type: ignore[call-arg]
    model = make_ensemble(dtype=torch.float64)
    batch = make_batch(model, dtype=torch.float64)
    with counted(model) as counts:
        whole = attack(model, *batch, 0.1).images
    assert max(counts) == 5 * 6
    for most, size in ((0, 6), (2 * 6 * 192, 12)):
        monkeypatch.setattr(copies, "AT_ONCE", most)
        with counted(model) as counts:
            torch.testing.assert_close(attack(model, *batch, 0.1).images, whole, rtol=0, atol=1e-9)
        assert max(counts) == size


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_those_that_it_makes(name: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = ATTACKS.get(name)(steps=3, neighbours=5), make_ensemble()  # type: ignore[call-arg]
    images, labels = make_batch(model)
    with counted(model) as counts:
        attack(model, images, labels, 0.1)
    assert sum(counts) == (attack.passes + 1) * len(images)  # the contract looks at the last iterate


def test_their_defaults_are_the_authors() -> None:
    found = [(VMI(), 190), (GRA(), 210), (PGN(), 400), (MEF(), 400)]
    assert [attack.passes for attack, _ in found] == [10 + 9 * 20, 10 * 21, 2 * 10 * 20, 20 * 20]
    assert not any(attack.restarts_are_versions for attack, _ in found)
    assert all(attack.stochastic for attack, _ in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_gradient_that_is_not_finite_spoils_no_other(
    name: str, make_ensemble: Make, make_batch: MakeBatch
) -> None:
    """√0 has the slope ∞, and 0·∞ is NaN: a mean, a norm or a cosine over it would be NaN for the whole image."""
    model = make_ensemble()
    images, labels = make_batch(model)
    images[:, :, 0, 0] = 0.0

    class Rooted(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images.abs().sqrt().square())

    attack = ATTACKS.get(name)(steps=6, neighbours=2, radius=0.0)  # type: ignore[call-arg]
    plain, rooted = (attack(each, images, labels, 0.1).images - images for each in (model, Rooted()))
    others = torch.ones_like(images, dtype=torch.bool)
    others[:, :, 0, 0] = False
    shares = [(each.abs()[others] > 0.03).double().mean() for each in (rooted, plain)]
    assert shares[0] > 0.9 * shares[1] > 0.5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, {"neighbours": 0}) for name in NAMES),
        *((name, {"radius": -0.1}) for name in NAMES),
        ("gra", {"decay": 0.0}),
        ("gra", {"decay": 1.1}),
        ("pgn", {"balance": 1.1}),
        ("pgn", {"length": "l2"}),
        ("mef", {"inner_ratio": -1.0}),
        ("mef", {"inner_momentum": -1.0}),
    ],
)
def test_wrong_fields_are_named(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(RobenchError, match=rf"`{next(iter(values))}` of attack '{name}'"):
        ATTACKS.get(name)(**values)


def test_follow_says_where_the_momentum_ended_and_scales_steps_by_it() -> None:
    images = torch.full((2, 1, 1, 2), 0.5, dtype=torch.float64)
    eps = torch.tensor([0.1, 0.2], dtype=torch.float64)
    rises = torch.tensor([[3.0, -1.0], [0.0, 2.0]], dtype=torch.float64).view(2, 1, 1, 2)

    def rule(z: Tensor, step: int) -> Tensor:
        return rises * (1 + step)

    z, velocity = follow(rule, images, eps, steps=3, step_ratio=0.1, momentum=0.5)
    signs = rises.sign()
    torch.testing.assert_close(z, images + 0.3 * eps.view(2, 1, 1, 1) * signs)
    normed = rises / rises.abs().sum(dim=3, keepdim=True)
    torch.testing.assert_close(velocity, 1.75 * normed)
    seen: list[Tensor] = []

    def scale(velocity: Tensor) -> Tensor:
        seen.append(velocity.clone())
        return torch.where(velocity > 0, 1.0, 0.5)

    z, velocity = follow(rule, images, eps, steps=2, step_ratio=0.1, momentum=0.0, scale=scale)
    torch.testing.assert_close(z, images + 0.2 * eps.view(2, 1, 1, 1) * signs * torch.where(rises > 0, 1.0, 0.5))
    torch.testing.assert_close(torch.stack(seen), torch.stack([rises, 2 * rises]))
    torch.testing.assert_close(velocity, 2 * rises)
    along = ascend(lambda z, _: (z * rises).flatten(1).sum(dim=1), images, eps, steps=3, step_ratio=0.1)
    torch.testing.assert_close(along, images + 0.3 * eps.view(2, 1, 1, 1) * signs)
