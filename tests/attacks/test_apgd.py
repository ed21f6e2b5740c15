"""APGD against algorithm 1 of the paper written for one sample in NumPy, its losses against loops, its targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.attacks.apgd import APGD, checkpoints, dlr, targeted_dlr
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.losses import LOSSES, margin
from robench.core.rng import Draws, Stream

Array = npt.NDArray[np.float64]
Make = Callable[..., Ensemble]
MakeBatch = Callable[..., Any]

EPS = 0.08
STEPS = 30
IN_DOUBLE = {"rtol": 0, "atol": 1e-9}


class Found(NamedTuple):
    """What the plain writing saw."""

    image: Array
    margin: float
    halved: list[int]
    visited: int


def number(outputs: Array, label: int) -> float:
    return float(outputs[label] - np.delete(outputs, label).max())


def plain(look: Callable[[Array], tuple[float, Array, float]], image: Array, start: Array, eps: float) -> Found:
    """Algorithm 1: ``look`` gives the objective, its gradient and the margin at a point."""
    lower, upper = np.maximum(image - eps, 0), np.minimum(image + eps, 1)
    at = [Fraction(0), Fraction(22, 100)]
    while at[-1] <= 1:
        at.append(at[-1] + max(at[-1] - at[-2] - Fraction(3, 100), Fraction(6, 100)))
    checks = [math.ceil(p * STEPS) for p in at if p <= 1]
    eta, points = 2 * eps, [np.clip(start, lower, upper)]
    values, slope, margins, seen = [], None, [], []
    top_value, top, top_slope = -math.inf, points[0], points[0]
    halvings: list[int] = []
    ups, value_at_check, halved_at_check = [], -math.inf, False
    for k in range(STEPS + 1):
        value, slope, gap = look(points[-1])
        margins.append(gap)
        seen.append(points[-1])
        if k:
            ups.append(value > values[-1])
        values.append(value)
        if value > top_value:
            top_value, top, top_slope = value, points[-1], slope
        if k == 0:
            value_at_check = value
        if k and k in checks:
            since = k - max(check for check in checks if check < k)
            few = sum(ups[-since:]) < 0.75 * since
            idle = not halved_at_check and top_value == value_at_check
            halved_at_check, value_at_check = few or idle, top_value
            if few or idle:
                eta /= 2
                points[-1], slope, values[-1] = top, top_slope, top_value
                halvings.append(k)
        if k < STEPS:
            here = points[-1]
            stepped = np.clip(here + eta * np.sign(slope), lower, upper)
            moved = stepped if k == 0 else here + 0.75 * (stepped - here) + 0.25 * (here - points[-2])
            points.append(np.clip(moved, lower, upper))
    least = int(np.argmin(margins))
    return Found(seen[least], margins[least], halvings, least)


def looked(
    model: nn.Module, raised: Callable[[Tensor], Tensor], label: int
) -> Callable[[Array], tuple[float, Array, float]]:
    def look(point: Array) -> tuple[float, Array, float]:
        z = torch.from_numpy(point)[None].requires_grad_(True)
        outputs = model(z)
        value = raised(outputs)
        (slope,) = torch.autograd.grad(value.sum(), z)
        return value.item(), slope[0].numpy(), number(outputs[0].detach().numpy(), label)

    return look


def start_of(image: Array, draws: Draws, row: int, eps: float, purpose: str = "start") -> Array:
    unit = draws.uniform(purpose, image.shape, torch.empty(0, dtype=torch.float64))[row].numpy()
    return np.asarray(image + (2 * unit - 1) * eps)


@pytest.mark.parametrize(("objective", "loss"), [("loss", "ce"), ("loss", "cw"), ("dlr", "ce")])
def test_it_is_algorithm_1(objective: Any, loss: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(depth=8, dtype=torch.float64)
    images, labels = make_batch(model, 5, dtype=torch.float64)
    draws = Draws.of([3, 1, 4, 15, 9])
    crafted = APGD(steps=STEPS, objective=objective, loss=loss)(model, images, labels, EPS, draws).images
    halved, visited = set(), set()
    kind = dlr if objective == "dlr" else LOSSES.get(loss)
    for row, label in enumerate(labels.tolist()):
        look = looked(model, lambda z, label=label: kind(z, torch.tensor([label])), label)  # type: ignore[misc]
        image = images[row].numpy()
        found = plain(look, image, start_of(image, draws, row, EPS), EPS)
        np.testing.assert_allclose(crafted[row].numpy(), found.image, **IN_DOUBLE)
        halved.add(tuple(found.halved))
        visited.add(found.visited)
    # Or this would say little: steps are halved, not at the same time for all, and the results are late points.
    assert len(halved) > 1 or loss == "cw"
    assert max(visited) > STEPS // 2


def test_checkpoints_are_the_paper_s() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]
    assert max(checkpoints(1)) == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(3, 7), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_dlr_losses_are_their_formulas(seed: int, classes: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    outputs, labels = random.normal(size=(4, classes)) * scale, random.integers(0, classes, size=4)
    targets = (labels + random.integers(1, classes, size=4)) % classes
    tensors = torch.from_numpy(outputs), torch.from_numpy(labels), torch.from_numpy(targets)
    order = [sorted(row, reverse=True) for row in outputs.tolist()]
    plain = [-number(row, y) / (top[0] - top[2]) for row, y, top in zip(outputs, labels, order, strict=True)]
    np.testing.assert_allclose(dlr(*tensors[:2]).numpy(), plain, rtol=1e-9)
    np.testing.assert_allclose(dlr(5 * tensors[0] - 3, tensors[1]).numpy(), plain, rtol=1e-9)
    if classes >= 4:
        aimed = [
            -(row[y] - row[t]) / (top[0] - (top[2] + top[3]) / 2)
            for row, y, t, top in zip(outputs, labels, targets, order, strict=True)
        ]
        np.testing.assert_allclose(targeted_dlr(*tensors).numpy(), aimed, rtol=1e-9)
        np.testing.assert_allclose(targeted_dlr(5 * tensors[0] - 3, *tensors[1:]).numpy(), aimed, rtol=1e-9)


class Counted(nn.Module):
    """Says how many images each pass was over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return self.model(images)  # type: ignore[no-any-return]


def test_targets_are_the_likely_classes_in_turn_on_what_stands(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, 6, dtype=torch.float64)
    draws, eps = Draws.of(range(6)), 0.02
    seen = Counted(model)
    attack = APGD(steps=STEPS, objective="dlr", targets=3)
    crafted = attack(seen, images, labels, eps, draws).images
    with torch.no_grad():
        clean, after = model(images), model(crafted)
    taken = []
    for row, label in enumerate(labels.tolist()):
        image, least = images[row].numpy(), None
        ranked = [each for each in clean[row].argsort(descending=True).tolist() if each != label]
        for rank, target in enumerate(ranked[:3]):
            raised = lambda z, y=label, t=target: targeted_dlr(z, torch.tensor([y]), torch.tensor([t]))  # noqa: E731
            found = plain(looked(model, raised, label), image, start_of(image, draws, row, eps, f"start {rank}"), eps)
            least = found if least is None or found.margin < least.margin else least
            if found.margin < 0:
                taken.append(rank)
                break
        assert least is not None
        np.testing.assert_allclose(crafted[row].numpy(), least.image, **IN_DOUBLE)
    standing = int((after.argmax(dim=1) == labels).sum())
    assert len(taken) == 6 - standing
    assert set(taken) > {0}, "or nothing was left for the second target"
    # Passes of the attack alone: the contract makes one before it, and one after.
    assert sum(seen.sizes[2:-1]) <= 6 * attack.passes


def linear(classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes)).double().eval()
    model[1].weight.data = Stream(("apgd",)).uniform((classes, 3 * 8 * 8), "weight").double() - 0.5
    model[1].bias.data.zero_()
    return model


def test_what_fell_is_not_attacked_again() -> None:
    model, images = linear(5), Stream(("apgd",)).uniform((6, 3, 8, 8), "images").double()
    labels, seen = model(images).argmax(dim=1), Counted(model)
    crafted = APGD(steps=8, objective="dlr", targets=4)(seen, images, labels, 0.5).images
    assert not bool((model(crafted).argmax(dim=1) == labels).any())
    # Of the contract, of the targets, of the first run with its verdict, and of the contract.
    assert len(seen.sizes) == 1 + 1 + (8 + 1) + 1 + 1


def test_it_reaches_the_optimum_of_a_linear_model() -> None:
    model, images = linear(2), Stream(("apgd",)).uniform((8, 3, 8, 8), "images").double()
    labels = model(images).argmax(dim=1)
    slope = (model[1].weight[1] - model[1].weight[0]).detach().view(3, 8, 8)
    best = (images + 0.05 * slope.sign() * (1 - 2 * labels).view(-1, 1, 1, 1)).clamp(0, 1)
    crafted = APGD(steps=20)(model, images, labels, 0.05).images
    gained, possible = (margin(model(images), labels) - margin(model(z), labels) for z in (crafted, best))
    assert bool((gained > 0.999 * possible).all())


@pytest.mark.parametrize("targets", [0, 9])
def test_dlr_says_how_many_classes_it_needs(targets: int) -> None:
    images, least = torch.rand(4, 3, 8, 8, dtype=torch.float64), 4 if targets else 3
    for classes in (2, 3, 4):
        model = linear(classes)
        attack, labels = APGD(steps=2, objective="dlr", targets=targets), model(images).argmax(dim=1)
        if classes >= least:
            attack(model, images, labels, 0.1)
            continue
        with pytest.raises(RobenchError, match=f"objective=dlr.*at least {least} classes, got {classes}"):
            attack(model, images, labels, 0.1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"objective": "ratio"}, "objective"),
        ({"targets": -1, "objective": "dlr"}, "targets"),
        ({"targets": 9}, "objective=dlr"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": 1.1}, "momentum"),
        ({"rho": 2.0}, "rho"),
    ],
)
def test_wrong_fields_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(RobenchError, match=named):
        APGD(**values)


def test_targets_do_not_make_an_image_depend_on_its_batch() -> None:
    model, images = linear(6), Stream(("apgd",)).uniform((6, 3, 8, 8), "images").double()
    labels, attack, eps = model(images).argmax(dim=1), APGD(steps=12, objective="dlr", targets=3), 0.012
    whole = attack(model, images, labels, eps, Draws.of(range(6))).images
    for rows in ([0, 1], [2], [5, 3, 4]):
        part = attack(model, images[rows], labels[rows], eps, Draws.of(rows)).images
        torch.testing.assert_close(part, whole[rows], **IN_DOUBLE)
    assert 0 < int((model(whole).argmax(dim=1) == labels).sum()) < 6, "or there are no survivors to choose"


def test_without_a_random_start_nothing_is_drawn(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble()
    batch, attack = make_batch(model), APGD(steps=4, random_start=False)
    one, two = (attack(model, *batch, EPS, Draws.of(range(6), restart=restart)).images for restart in (0, 1))
    assert not attack.stochastic
    assert torch.equal(one, two)
