"""ADP and GAL with adversarial training, against plain writings of both."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from tests.defenses.parity import adp_terms, assert_same, smooth
from tests.defenses.test_advt import mean_probability, written_out

EPS, STEPS, RATIO = 0.1, 3, 0.4


def batch_of(count: int = 6) -> Batch:
    draws = Stream(("test",))
    images = draws.uniform((count, 3, 4, 4), "images").double()
    return Batch(images, torch.arange(count) % 5, draws, draws, samples=torch.arange(count), train_size=count)


def attacked(members: list[nn.Module], batch: Batch) -> Tensor:
    noise = batch.draws.uniform(batch.images.shape, "advt", "start").double()
    crafted = written_out(
        mean_probability(members, batch.labels),
        batch.images,
        noise,
        EPS,
        STEPS,
        RATIO * EPS,  # type: ignore[arg-type]
    )
    for member in members:
        member.zero_grad()
    return crafted


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.stack([row.softmax(0)[y].log() for row, y in zip(logits, labels, strict=True)]).mean()


def adp(members: list[nn.Module], batch: Batch, alpha: float, beta: float) -> Tensor:
    """Image by image, from the definition."""
    images = attacked(members, batch)
    logits = [member(batch.images) for member in members]
    total = torch.stack([mean_loss(z, batch.labels) for z in logits]).sum()
    total = total + adp_terms(logits, batch.labels, alpha, beta)
    return total + torch.stack([mean_loss(member(images), batch.labels) for member in members]).sum()


def gal(members: list[nn.Module], batch: Batch, weight: float) -> Tensor:
    crafted, images = attacked(members, batch), batch.images.clone().requires_grad_(True)
    losses = [mean_loss(member(images), batch.labels) for member in members]
    slopes = [torch.autograd.grad(loss, images, create_graph=True)[0].flatten(1) for loss in losses]
    pairs = [
        ((a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()).exp()
        for a, b in combinations(slopes, 2)
    ]
    adversarial = [mean_loss(member(crafted), batch.labels) for member in members]
    return torch.stack([*losses, *adversarial]).sum() / len(members) + weight * sum(pairs).log().mean()  # type: ignore


@pytest.mark.parametrize("n", [2, 4])
def test_adp_and_the_loss_on_adversarial_images(n: int) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    defense = DEFENSES.get("adp-advt")(alpha=1.5, beta=0.3, eps=EPS, steps=STEPS, step_ratio=RATIO)
    assert_same(defense, ensemble, batch_of(), lambda members, batch: adp(members, batch, 1.5, 0.3))


@pytest.mark.parametrize("n", [2, 3])
def test_gal_and_the_mean_loss_on_adversarial_images(n: int) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    defense = DEFENSES.get("gal-advt")(weight=0.7, eps=EPS, steps=STEPS, step_ratio=RATIO)
    assert_same(defense, ensemble, batch_of(), lambda members, batch: gal(members, batch, 0.7))


@pytest.mark.parametrize(("name", "wanted"), [("adp-advt", 12), ("gal-advt", 14)])
def test_passes_count_the_attack_the_clean_and_the_adversarial_images(name: str, wanted: int) -> None:
    assert DEFENSES.get(name)().passes(3) == wanted


@pytest.mark.parametrize("name", ["adp-advt", "gal-advt"])
@pytest.mark.parametrize(("field", "value"), [("eps", 0.0), ("steps", 0), ("step_ratio", 0.0), ("eps", 8.0)], ids=str)
def test_refuses_an_attack_that_makes_no_sense(name: str, field: str, value: float) -> None:
    with pytest.raises(RobenchError, match=f"`{field}` of defense '{name}'"):
        DEFENSES.get(name)(**{field: value})


def test_refuses_what_its_parts_refuse() -> None:
    with pytest.raises(RobenchError, match="`alpha` and `beta` of defense 'adp-advt'"):
        DEFENSES.get("adp-advt")(alpha=-1.0)
    with pytest.raises(RobenchError, match="`weight` of defense 'gal-advt'"):
        DEFENSES.get("gal-advt")(weight=-1.0)
    with pytest.raises(RobenchError, match="`n` of defense 'adp-advt' to be at most 9"):
        DEFENSES.get("adp-advt")().check(members=10, classes=10)
