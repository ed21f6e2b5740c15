"""Models that draw at inference: the gradient of an attack is the mean over draws, and an image's draws are its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.attacks.pgd import PGD
from robench.core.drawn import model_draws, row_key
from robench.core.ensemble import Ensemble
from robench.core.rng import Draws, key

pytestmark = pytest.mark.slow

OWNER = ("craft", 0, 0)
SAMPLES = np.array([3, 11, 20, 8])


class Noisy(nn.Module):
    """A model of images plus Gaussian noise."""

    def __init__(self, model: nn.Module, sigma: float = 0.3) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images + self.sigma * torch.randn_like(images))
        return found


def crafted(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, chosen: list[int], count: int) -> Tensor:
    at = SAMPLES[chosen]
    with torch.random.fork_rng(devices=[]), model_draws(OWNER, at, count):
        return attack(model, images[chosen], labels[chosen], 0.1, Draws.of(at)).images


def by_hand(model: Noisy, image: Tensor, label: Tensor, sample: int, steps: int, draws: int) -> Tensor:
    """PGD of α = ε/5 along the mean gradient over draws, of one image; noise by number of the draw."""
    numbers = iter(range(1, 10**6))  # number 0 is the look at the labels

    def noise() -> Tensor:
        generator = torch.Generator().manual_seed(row_key(OWNER, sample, next(numbers)))
        return torch.randn(1, *image.shape, generator=generator, dtype=torch.float64)

    start = Draws.of([sample]).uniform("start", image.shape, image)[0]
    z = (image + 0.1 * (2 * start - 1)).clamp(0, 1)
    for _ in range(steps):
        total = torch.zeros_like(z)
        for _ in range(draws):
            point = z.clone().requires_grad_(True)
            F.cross_entropy(model.model(point[None] + model.sigma * noise()), label[None]).backward()
            assert point.grad is not None
            total += point.grad
        z = z + 0.02 * (total / draws).sign()
        z = torch.min(torch.max(z, image - 0.1), image + 0.1).clamp(0, 1)
    return z


@pytest.mark.parametrize("draws", [1, 3])
def test_the_gradient_is_the_mean_over_draws_as_written_once_more(
    make_ensemble: Callable[..., Ensemble], make_batch: Callable[..., tuple[Tensor, Tensor]], draws: int
) -> None:
    ensemble = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(ensemble, 4, torch.float64)
    model = Noisy(ensemble)
    found = crafted(PGD(steps=4), model, images, labels, [0, 1, 2, 3], draws)
    wanted = [by_hand(model, images[i], labels[i], int(SAMPLES[i]), 4, draws) for i in range(4)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-12)


#: Few steps of every attack that follows the shared gradient, or outputs alone.
ATTACKED = {
    "apgd": {"steps": 6}, "apgd-t": {"objective": "dlr", "targets": 2, "steps": 3}, "mora": {"steps": 3, "targets": 1},
    "members": {"steps": 3, "combine": "minmax"}, "strongest": {"steps": 2, "queries": 10}, "square": {"queries": 12},
    "pgd": {"steps": 4}, "mdi2": {"steps": 4}, "sgm": {"steps": 4}, "vmi": {"steps": 3, "neighbours": 2},
    "gra": {"steps": 3, "neighbours": 2}, "pgn": {"steps": 2, "neighbours": 2}, "svre": {"steps": 2, "inner_steps": 1},
    "bsr": {"steps": 2, "copies": 3}, "sia": {"steps": 2, "copies": 3}, "tim": {"steps": 3}, "sim": {"steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKED)
def test_an_image_is_the_same_in_any_batch_of_a_model_that_draws(
    make_ensemble: Callable[..., Ensemble], make_batch: Callable[..., tuple[Tensor, Tensor]], name: str
) -> None:
    ensemble = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(ensemble, 4, torch.float64)
    drawing = Ensemble(map(Noisy, ensemble.members)).eval()
    attack = ATTACKS.get(name.partition("-")[0])(**ATTACKED[name])
    whole = crafted(attack, drawing, images, labels, [0, 1, 2, 3], 2)
    parts = torch.cat([crafted(attack, drawing, images, labels, chosen, 2) for chosen in ([2, 0], [3, 1])])
    torch.testing.assert_close(parts, whole[[2, 0, 3, 1]], rtol=0, atol=1e-9)
    assert not torch.equal(whole, crafted(attack, drawing, images, labels, [0, 1, 2, 3], 3))


def test_minmax_weighs_members_once_a_step_whatever_the_draws(
    make_ensemble: Callable[..., Ensemble], make_batch: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Of a model that draws nothing, several draws are one, but for rounding."""
    ensemble = make_ensemble(3, dtype=torch.float64)
    images, labels = make_batch(ensemble, 4, torch.float64)
    for name in ("pgd", "members", "apgd", "mora", "square"):
        attack = ATTACKS.get(name)(**ATTACKED[name])
        several = crafted(attack, ensemble, images, labels, [0, 1, 2, 3], 3)
        with torch.random.fork_rng(devices=[]):
            one = attack(ensemble, images, labels, 0.1, Draws.of(SAMPLES)).images
        torch.testing.assert_close(several, one, rtol=0, atol=1e-9)


def test_keys_of_crafting_are_not_those_of_judging() -> None:
    assert row_key(OWNER, 3, 0) == key("model", "craft", 0, 0, 3, 0) != row_key(("judge", 0), 3, 0)
