"""On linear models, where the ℓ∞ optimum is known: x + ε·sign(w_other − w_true), cut to the box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.core.losses import LOSSES, margin
from robench.core.rng import Stream

SHAPE = (3, 8, 8)
COUNT = 24


class _LinearResidual(nn.Module):
    """x + f(x) with f linear and positive per pixel: γ scales the gradient and keeps every sign."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        self.conv1 = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.conv2 = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        nn.init.constant_(self.conv1.weight, gain)
        nn.init.constant_(self.conv2.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.conv1(x))


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Sequential, Tensor]:
    """A residual linear classifier of two classes, and its weights w_1 − w_0 on the pixels, (C,H,W)."""
    draws = Stream(("oracle",))
    head = nn.Linear(3 * 8 * 8, 2)
    weight = (2 * draws.uniform((2, 3 * 8 * 8), "weight") - 1) * 0.2
    head.weight.data, head.bias.data = weight, torch.tensor([0.1, -0.1])
    model = nn.Sequential(_LinearResidual(0.6), _LinearResidual(1.0), nn.Flatten(), head).double().eval()
    factor = (1 + 0.6 * 0.5) * (1 + 1.0 * 0.5)
    return model, factor * (weight[1] - weight[0]).double().view(SHAPE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return Stream(("oracle",)).uniform((COUNT, *SHAPE), "images").double()


def optimum(slope: Tensor, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    direction = slope.sign() * (1 - 2 * labels).view(-1, 1, 1, 1)
    return (images + eps * direction).clamp(0, 1)


def attack_of(name: str, loss: str) -> Attack:
    steps = {"mdi2": {"steps": 100}, "fgsm": {}}.get(name, {"steps": 12})
    return ATTACKS.get(name)(loss=loss, **steps)


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("name", ["pgd", "sgm", "fgsm"])
def test_ce_reaches_the_optimum(name: str, eps: float, linear: tuple[nn.Module, Tensor], images: Tensor) -> None:
    model, slope = linear
    labels = model(images).argmax(dim=1)
    crafted = attack_of(name, "ce")(model, images, labels, eps).images
    torch.testing.assert_close(crafted, optimum(slope, images, labels, eps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("name", ["pgd", "sgm", "fgsm"])
def test_the_verdict_with_cw_is_the_optimum_s(
    name: str, eps: float, linear: tuple[nn.Module, Tensor], images: Tensor
) -> None:
    model, slope = linear
    labels = model(images).argmax(dim=1)
    crafted = attack_of(name, "cw")(model, images, labels, eps).images
    best = optimum(slope, images, labels, eps)
    assert torch.equal(model(crafted).argmax(dim=1), model(best).argmax(dim=1))
    # The hinge stops where the margin is κ on the wrong side; up to there the two agree.
    short = margin(model(best), labels) >= -0.1
    torch.testing.assert_close(crafted[short], best[short], rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.03, 0.1])
def test_mdi2_gains_nearly_all_of_it(eps: float, linear: tuple[nn.Module, Tensor], images: Tensor) -> None:
    model, slope = linear
    labels = model(images).argmax(dim=1)
    crafted = attack_of("mdi2", "ce")(model, images, labels, eps).images
    best = optimum(slope, images, labels, eps)
    clean, found, most = (margin(model(z), labels) for z in (images, crafted, best))
    assert ((clean - found) / (clean - most) >= 0.95).all()


def test_the_eps_grid_holds_both_verdicts(linear: tuple[nn.Module, Tensor], images: Tensor) -> None:
    """Without samples that fall and samples that stand, the tests above would show little."""
    model, slope = linear
    labels = model(images).argmax(dim=1)
    for eps in (0.005, 0.01):
        fallen = model(optimum(slope, images, labels, eps)).argmax(dim=1) != labels
        assert 0 < fallen.sum() < COUNT
    assert LOSSES.get("ce")(model(images), labels).isfinite().all()
