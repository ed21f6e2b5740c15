"""TRS against a plain writing: cosines image by image, gradients through torch's own double backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.defenses import DEFENSES, Batch
from tests.defenses.parity import assert_same, of_terms, smooth
from tests.defenses.test_adp_advt import batch_of, mean_loss

Trs = DEFENSES.get("trs")
STEPS, RATIO = 3, 0.4


def slopes_of(members: list[nn.Module], images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the batch's mean loss, one member after another; BatchNorm counts each once."""
    images = images.detach().requires_grad_(True)
    losses = [mean_loss(member(images), labels) for member in members]
    return [torch.autograd.grad(loss, images, create_graph=True)[0] for loss in losses]


def attacked(members: list[nn.Module], batch: Batch, eps: float) -> Tensor:
    """The images of odd places, where the members' gradients are long."""
    x, labels = batch.images[1::2], batch.labels[1::2]
    noise = batch.draws.uniform(batch.images.shape, "trs", "start").double()[1::2]
    z = (x + eps * (2 * noise - 1)).clamp(0, 1)
    for _ in range(STEPS):
        z = z.detach().requires_grad_(True)
        total = torch.zeros(()).double()
        for member in members:
            (slope,) = torch.autograd.grad(mean_loss(member(z), labels), z, create_graph=True)
            total = total + slope.square().sum()
        (direction,) = torch.autograd.grad(total, z)
        z = (z + RATIO * eps * direction.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return z.detach()


def plain(members: list[nn.Module], batch: Batch, eps: float, per_image: bool, adversarial: bool) -> Tensor:
    count = len(batch.images)
    images = batch.images.detach().requires_grad_(True)
    losses = [mean_loss(member(images), batch.labels) for member in members]
    slopes = [torch.autograd.grad(loss, images, create_graph=True)[0] for loss in losses]
    total = torch.stack(losses).sum()
    pairs = list(combinations(slopes, 2))
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            total = total + 3 * ((a * b).sum() / (a.norm() * b.norm())).abs() / (count * len(pairs))
    points, labels = batch.images, batch.labels
    if adversarial:
        points = torch.cat([points[::2], attacked(members, batch, eps)])
        labels = torch.cat([labels[::2], labels[1::2]])
    for slope in slopes_of(members, points, labels):
        lengths = torch.stack([(count * each if per_image else each).square().sum() for each in slope])
        total = total + 0.7 * 2 * lengths.mean() / len(members)
    return total


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("per_image", "adversarial"), [(False, True), (True, True), (False, False)])
def test_loss_gradients_and_statistics(n: int, per_image: bool, adversarial: bool) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    defense = Trs(
        similarity=3.0,
        smoothness=0.7,
        slope_of="image" if per_image else "mean",
        adversarial=adversarial,
        first_eps=0.1,
        last_eps=0.3,
        steps=STEPS,
        step_ratio=RATIO,
    )
    batch = replace(batch_of(), progress=0.25)
    assert_same(defense, ensemble, batch, lambda members, batch: plain(members, batch, 0.15, per_image, adversarial))


def test_two_halves_of_a_batch_have_the_loss_of_the_whole() -> None:
    """As several processes see it, without BatchNorm."""
    ensemble = Ensemble(smooth(key, batchnorm=False) for key in range(2)).train()
    whole = batch_of(8)
    start = whole.draws.uniform(whole.images.shape, "trs", "start")
    halves = []
    for at in (slice(4), slice(4, 8)):
        part = replace(whole, images=whole.images[at], labels=whole.labels[at], parts=2)

        class Part(type(whole.draws)):  # type: ignore[misc]
            def uniform(self, shape: object, *purpose: object, at: slice = at) -> Tensor:
                return start[at]

        halves.append(of_terms(Trs(smoothness=50.0), ensemble, replace(part, draws=Part(("test",)))))
    wanted = of_terms(Trs(smoothness=50.0), ensemble, whole)
    torch.testing.assert_close(torch.stack(halves).mean(), wanted, rtol=1e-9, atol=0)


def test_passes_count_second_derivatives() -> None:
    assert Trs(steps=6).passes(3) == 15
    assert Trs(adversarial=False).passes(3) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"similarity": -1.0}, "`similarity` of defense 'trs' to be at least 0"),
        ({"smoothness": -1.0}, "`smoothness` of defense 'trs' to be at least 0"),
        ({"first_eps": 0.0}, "`first_eps` of defense 'trs'"),
        ({"last_eps": 8.0}, "`last_eps` of defense 'trs'"),
        ({"steps": 0}, "`steps` of defense 'trs'"),
        ({"step_ratio": 0.0}, "`step_ratio` of defense 'trs'"),
    ],
)
def test_refuses_what_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(RobenchError, match=message):
        Trs(**values)
