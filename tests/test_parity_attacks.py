"""Attacks against what the DVERGE authors' own code computes on their published weights (`parity.npz`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from robench.attacks.ascent import gradient
from robench.attacks.pgd import PGD
from robench.attacks.sgm import skip_gradient
from robench.core.ensemble import Ensemble
from robench.core.losses import LOSSES, cross_entropy
from robench.core.models import ModelSpec, build

SPEC = ModelSpec(
    name="resnet20", num_classes=10, in_channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)
CHECKPOINTS = {"baseline": "baseline-3-resnet20-seed0.pth", "dverge": "dverge-3-resnet20-eps0.07-seed0.pth"}

Published = Callable[[str], Ensemble]
Answer = Callable[[str], Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Published:
    """(name) -> the authors' ensemble, in eval mode; the normalisation is their file's."""

    def load(name: str) -> Ensemble:
        path = shared_data / "checkpoints" / CHECKPOINTS[name]
        if not path.exists():
            pytest.skip(f"{path} does not exist")
        members = []
        for state in torch.load(path, weights_only=True, map_location="cpu").values():
            member = build(SPEC, 0)
            mean, std = (state.pop(f"normalizer.{key}").flatten() for key in ("mean", "std"))
            member.load_state_dict({**state, "mean": mean, "std": std})
            members.append(member)
        return Ensemble(members).eval()

    return load


@pytest.fixture(scope="module")
def answer(shared_data: Path) -> Answer:
    path = shared_data / "parity.npz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    file: dict[str, npt.NDArray[np.generic]] = dict(np.load(path, allow_pickle=False))
    return lambda key: torch.from_numpy(file[key])


@pytest.fixture(scope="module")
def images(shared_data: Path) -> Tensor:
    return _subset(shared_data)[0]


@pytest.fixture(scope="module")
def labels(shared_data: Path) -> Tensor:
    return _subset(shared_data)[1]


def _subset(folder: Path) -> tuple[Tensor, Tensor]:
    path = folder / "cifar10-lossless-subset.npz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    with np.load(path, allow_pickle=False) as file:
        # Divided in float32, as the answers were, also where the attack then computes in float64.
        return torch.from_numpy(file["x_test"][:16]).float() / 255, torch.from_numpy(file["y_test"][:16]).long()


@pytest.mark.parametrize(("key", "momentum"), [("pgd_10", 0.0), ("momentum_pgd_10", 1.0)])
def test_pgd(key: str, momentum: float, published: Published, answer: Answer, images: Tensor, labels: Tensor) -> None:
    model, images, labels = published("dverge").double(), images[:8].double(), labels[:8]
    attack = PGD(steps=10, step_ratio=0.2, momentum=momentum, random_start=False)
    crafted = attack(model, images, labels, 0.03)
    torch.testing.assert_close(crafted.images, answer(key)[:8], rtol=0, atol=1e-9)
    torch.testing.assert_close(model(crafted.images), answer(f"{key}_logprob")[:8], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("key", "gamma", "blocks"),
    [
        ("sgm_input_gradient_all", 0.2, "all"),
        ("sgm_input_gradient_reference", 0.2, "reference"),
        ("plain_input_gradient", 1.0, "all"),
    ],
)
def test_sgm(
    key: str, gamma: float, blocks: str, published: Published, answer: Answer, images: Tensor, labels: Tensor
) -> None:
    model = published("baseline").members[0]
    with skip_gradient(model, gamma, blocks):  # type: ignore[arg-type]
        found = gradient(lambda z: cross_entropy(model(z), labels), images)
    wanted = answer(key)
    # Per image, against its own largest entry: confident images have gradients of 1e-6.
    error = (found - wanted).abs().flatten(1).amax(dim=1) / wanted.abs().flatten(1).amax(dim=1)
    with torch.no_grad():
        doubt = 1 - model(images).double().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    # In float32 p_y − 1, the slope of CE, is a multiple of 2⁻²⁴: where p_y is nearly 1, processors round it apart.
    assert (error < 1e-4 + 24 * 2**-24 / doubt).all()
    assert (doubt > 1e-2).sum() >= 2
    assert error[doubt > 1e-2].max() < 2e-5


@pytest.mark.parametrize(("key", "loss"), [("cw_margin", "cw"), ("cw_authors", "cw-paper")])
def test_cw(key: str, loss: str, answer: Answer, labels: Tensor) -> None:
    found = LOSSES.get(loss)(answer("ensemble_logprob"), labels)
    torch.testing.assert_close(found, answer(key), rtol=1e-6, atol=1e-7)
