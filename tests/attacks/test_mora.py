"""MORA against its formulas in plain Python, and its loop against one written for one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.mora import MORA, SHARES, Rule, Weights, reweighed
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.fast import attackable
from robench.core.rng import Draws

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., Any]

everything = pytest.mark.parametrize(
    ("weights", "rule"), [(weights, rule) for weights in get_args(Weights) for rule in get_args(Rule)]
)


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def lead(values: list[float]) -> float:
    first, second = sorted(values, reverse=True)[:2]
    return first - second


def averaged(members: list[list[float]]) -> list[float]:
    return [sum(column) / len(members) for column in zip(*members, strict=True)]


def plain(members: list[list[float]], y: int, share: float, weights: str, rule: str) -> list[float]:
    """u of one sample."""
    classes, temperature = range(len(members[0])), {"softmax": 0.2, "vote": 0.8, "logits": 0.0}[rule]
    if rule == "logits":
        main = averaged(members)
    else:
        unit = [[each / lead(z) for each in z] if rule == "vote" else z for z in members]
        main = [math.log(each) for each in averaged([softmax(z) for z in unit])]
    everyone = [*members, main] if weights == "code" else members
    scale = max(1.0, max(lead(z) for z in everyone) / 10)
    mean = averaged([softmax([each / scale for each in z]) for z in members])
    rival = max((c for c in classes if c != y), key=lambda c: mean[c])
    right = mean[y] > mean[rival]
    total, weighed = 0.0, [0.0 for _ in classes]
    for z in everyone:
        q = softmax([temperature * each for each in z])
        if weights == "code" and right:
            weight = q[rival] * ((1 + q[rival]) / mean[rival] - q[y] / mean[y])
        else:
            weight = q[rival] * (q[y] / mean[y] + (1 - q[rival]) / mean[rival])
        if rule != "logits" and max(classes, key=lambda c, z=z: z[c]) != y:  # type: ignore[misc]
            weight = 0.0
        total += weight
        weighed = [sum_ + weight * each / scale for sum_, each in zip(weighed, z, strict=True)]
    whole = zip(main, weighed, strict=True)
    return [(1 - share) * v / lead(main) + share * each / (total + 1e-8) for v, each in whole]


@everything
@pytest.mark.parametrize("scale", [0.3, 3.0, 8.0])
def test_what_is_ascended_is_the_formula(weights: Any, rule: Any, scale: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 40, 5)) * scale)
    labels = torch.arange(40) % 5
    logits[:, torch.arange(20), labels[:20]] += 2 * scale
    for share in SHARES:
        found = reweighed(logits, labels, share, weights, rule)
        wanted = [plain(logits[:, row].tolist(), int(labels[row]), share, weights, rule) for row in range(40)]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)
    # All sides of the formula are among the samples.
    right = logits.argmax(dim=2) == labels
    assert set(right.sum(dim=0).tolist()) == {0, 1, 2, 3}


def test_the_gradient_is_that_of_the_logits_alone() -> None:
    """Weights, masks and scales are numbers: of s = 1, u is linear in the members' logits."""
    logits = torch.from_numpy(np.random.default_rng(6).normal(size=(2, 1, 4))).requires_grad_(True)
    labels = logits.detach()[:, 0].sum(dim=0).argmax()[None]
    (slope,) = torch.autograd.grad(reweighed(logits, labels, 1.0, "paper", "softmax")[0, 2], logits)
    assert torch.count_nonzero(slope[:, 0, [0, 1, 3]]) == 0
    assert float(slope[:, 0, 2].sum()) == pytest.approx(1, abs=1e-6)


def reference(
    model: Ensemble, image: Tensor, label: Tensor, start: Tensor, eps: float, steps: int, raised: Any
) -> tuple[Tensor, float]:
    """A run on one sample: the point of the least margin, and that margin."""
    lower, upper = (image - eps).clamp(min=0), (image + eps).clamp(max=1)
    points, found = [start.clamp(lower, upper)], []
    for i in range(steps + 1):
        z = points[-1][None].requires_grad_(True)
        outputs = model(z)[0].tolist()
        rest = [value for c, value in enumerate(outputs) if c != int(label)]
        found.append((outputs[int(label)] - max(rest), points[-1].detach()))
        if i == steps:
            break
        (slope,) = torch.autograd.grad(raised(z, label[None]), z)
        here, eta = points[-1].detach(), 2 * eps * math.cos(math.pi * i / (2 * steps))
        stepped = (here + eta * slope[0].sign()).clamp(lower, upper)
        moved = stepped if i == 0 else here + 0.75 * (stepped - here) + 0.25 * (here - points[-2].detach())
        points.append(moved.clamp(lower, upper))
    margin, point = min(found, key=lambda each: each[0])
    return point, margin


@pytest.mark.parametrize("weights", get_args(Weights))
def test_its_runs_are_the_shares_and_then_the_targets(weights: Any, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3, 8, torch.float64)
    images, labels = make_batch(model, 5, dtype=torch.float64)
    draws, eps, steps = Draws.of([4, 3, 2, 1, 0]), 0.012, 5
    crafted = MORA(steps=steps, targets=1, weights=weights)(model, images, labels, eps, draws).images
    runs = []
    for row in range(5):
        clean = model(images[row][None])[0].detach()
        rival = clean.scatter(0, labels[row], -math.inf).argmax()
        aims: list[tuple[str, Any]] = [
            (
                f"start {share:g}",
                lambda z, y, share=share: F.cross_entropy(reweighed(model.logits(z), y, share, weights, "softmax"), y),
            )
            for share in (0.5, 0.0, 0.25, 0.75, 1.0)
        ]
        aims.append(("start towards 0", lambda z, y, rival=rival: model(z)[0, rival]))
        found = []
        for purpose, raised in aims:
            unit = draws.uniform(purpose, images.shape[1:], images)[row]
            found.append(
                reference(model, images[row], labels[row], images[row] + (2 * unit - 1) * eps, eps, steps, raised)
            )
            if found[-1][1] < 0:
                break
        wanted = min(found, key=lambda each: each[1])[0]
        torch.testing.assert_close(crafted[row], wanted, rtol=0, atol=1e-9)
        runs.append(len(found))
    assert min(runs) < max(runs), "or all fell, or none did"


@everything
def test_an_image_does_not_depend_on_its_batch(
    weights: Any, rule: Any, make_ensemble: Make, make_batch: MakeBatch
) -> None:
    model = make_ensemble(3, 8, torch.float64)
    images, labels = make_batch(model, 5, dtype=torch.float64)
    attack = MORA(steps=3, targets=1, weights=weights, rule=rule)
    whole = attack(model, images, labels, 0.01, Draws.of(range(5))).images
    for rows in ([0, 1], [2], [4, 3]):
        part = attack(model, images[rows], labels[rows], 0.01, Draws.of(rows)).images
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-9)


def test_a_model_without_members_is_an_ensemble_of_one(make_ensemble: Make, make_batch: MakeBatch) -> None:
    member = make_ensemble(dtype=torch.float64).members[0]
    batch = make_batch(member, 4, dtype=torch.float64)
    attack = MORA(steps=3, targets=0)
    one, other = (attack(model, *batch, 0.02).images for model in (member, Ensemble([member])))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_it_attacks_what_the_evaluator_attacks(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(3)
    images, labels = make_batch(model)
    crafted = MORA(steps=5, targets=0)(attackable(model, images, "bfloat16"), images, labels, 0.2).images
    assert not bool((model(crafted).argmax(dim=1) == labels).any())


def test_it_says_its_passes_and_refuses_wrong_fields() -> None:
    assert MORA().passes == (5 + 9) * 101
    assert MORA(steps=10, targets=0).passes == 5 * 11
    for values in ({"weights": "both"}, {"rule": "median"}, {"targets": -1}):
        with pytest.raises(RobenchError, match=next(iter(values))):
            MORA(**values)  # type: ignore[arg-type]
