"""Member-wise PGD against its formulas, one sample and one member at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.attacks.members import Combine, Members, onto_simplex
from robench.attacks.pgd import PGD
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.fast import attackable
from robench.core.rng import Draws

Array = npt.NDArray[np.float64]
Make = Callable[..., Ensemble]
MakeBatch = Callable[..., Any]

STEPS, EPS = 6, 0.05
everyone = pytest.mark.parametrize("combine", get_args(Combine))


def simplex(point: Array) -> Array:
    """By bisection: τ with Σ max(p − τ, 0) = 1."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.asarray(np.maximum(point - low, 0))


def plain(members: nn.ModuleList, image: Tensor, label: Tensor, start: Tensor, combine: str) -> Tensor:
    """One sample, (C,H,W)."""
    lower, upper = (image - EPS).clamp(min=0), (image + EPS).clamp(max=1)
    z, weights = start.clamp(lower, upper), np.full(len(members), 1 / len(members))
    for step in range(STEPS):
        slopes, losses = [], []
        for member in members:
            point = z[None].clone().requires_grad_(True)
            loss = F.cross_entropy(member(point), label[None])
            slopes.append(torch.autograd.grad(loss, point)[0][0])
            losses.append(loss.item())
        if combine == "logits":
            point = z[None].clone().requires_grad_(True)
            mean = sum(member(point) for member in members) / len(members)
            (direction,) = torch.autograd.grad(F.cross_entropy(mean, label[None]), point)
            direction = direction[0]
        elif combine == "losses":
            direction = sum(slopes)
        elif combine == "normalised":
            direction = sum(slope / slope.abs().sum() for slope in slopes)
        else:
            if step:
                weights = simplex(weights - 0.1 * (np.array(losses) + 2.0 * (weights - 1 / len(members))))
            direction = sum(float(weight) * slope for weight, slope in zip(weights, slopes, strict=True))
        z = (z + 0.2 * EPS * direction.sign()).clamp(lower, upper)
    return z


@everyone
def test_it_is_its_formula(combine: Combine, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3, dtype=torch.float64)
    images, labels = make_batch(model, 4, dtype=torch.float64)
    draws = Draws.of([5, 2, 8, 1])
    starts = images + (2 * draws.uniform("start", images.shape[1:], images) - 1) * EPS
    attack = Members(steps=STEPS, combine=combine, gamma=2.0, beta=0.1)
    crafted = attack(model, images, labels, EPS, draws).images
    for row in range(4):
        wanted = plain(model.members, images[row], labels[row], starts[row], combine)
        torch.testing.assert_close(crafted[row], wanted, rtol=0, atol=1e-9)


def test_the_four_differ(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3)
    batch = make_batch(model)
    crafted = [Members(steps=STEPS, combine=each, beta=0.5)(model, *batch, EPS).images for each in get_args(Combine)]
    assert all(not torch.equal(one, other) for i, one in enumerate(crafted) for other in crafted[:i])


@everyone
def test_on_a_model_without_members_it_is_pgd(combine: Combine, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64).members[0]
    batch = make_batch(model, dtype=torch.float64)
    crafted = Members(steps=STEPS, combine=combine)(model, *batch, EPS).images
    torch.testing.assert_close(crafted, PGD(steps=STEPS)(model, *batch, EPS).images, rtol=0, atol=1e-9)


@everyone
def test_an_image_does_not_depend_on_its_batch(combine: Combine, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    attack = Members(steps=STEPS, combine=combine, beta=0.5)
    whole = attack(model, images, labels, EPS, Draws.of(range(6))).images
    part = attack(model, images[2:4], labels[2:4], EPS, Draws.of([2, 3])).images
    torch.testing.assert_close(part, whole[2:4], rtol=0, atol=1e-9)


@everyone
def test_it_attacks_what_the_evaluator_attacks(combine: Combine, make_ensemble: Make, make_batch: MakeBatch) -> None:
    """In bfloat16 too: other images, but nearly as good ones."""
    model = make_ensemble(3)
    images, labels = make_batch(model)
    fast = attackable(model, images, "bfloat16")
    attack, losses = Members(steps=STEPS, combine=combine), []
    for attacked in (model, fast):
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(attack(attacked, images, labels, EPS).images), labels)))
    clean = F.cross_entropy(model(images), labels).item()
    assert losses[1] - clean > 0.8 * (losses[0] - clean) > 0


def test_a_member_without_a_gradient_leaves_it_to_the_others(make_ensemble: Make, make_batch: MakeBatch) -> None:
    class Rounded(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return model.members[0]((images * 7).round() / 7)  # type: ignore[no-any-return]

    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    attack = Members(steps=STEPS)
    crafted = attack(Ensemble([Rounded(), model.members[1]]), images, labels, EPS).images
    torch.testing.assert_close(crafted, attack(model.members[1], images, labels, EPS).images, rtol=0, atol=1e-9)
    with pytest.raises(RobenchError, match="differentiably"):
        attack(Rounded(), images, labels, EPS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.01, 1.0, 100.0]))
def test_the_projection_onto_the_simplex_is_the_nearest_point(seed: int, members: int, scale: float) -> None:
    points = np.random.default_rng(seed).normal(size=(members, 5)) * scale
    found = onto_simplex(torch.from_numpy(points)).numpy()
    np.testing.assert_allclose(found, np.stack([simplex(point) for point in points.T], axis=1), atol=1e-9)


@pytest.mark.parametrize("values", [{"combine": "mean"}, {"gamma": -1.0}, {"beta": -0.1}, {"steps": 0}])
def test_wrong_fields_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(RobenchError, match=next(iter(values))):
        Members(**values)
