"""Random bad input gives our error, never a traceback from torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from robench.attacks import ATTACKS, Attack
from robench.core.errors import RobenchError
from robench.core.losses import LOSSES
from robench.core.rng import Draws

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
PGD = ATTACKS.get("pgd")

sizes = st.sampled_from(
    [(2, 3, 2, 2), (1, 3, 2, 2), (0, 3, 2, 2), (2, 1, 2, 2), (2, 3, 3, 2), (2, 12), (12,), (), (2, 3, 0, 2)]
)
fills = st.sampled_from([0.0, 0.5, 1.0, 1.5, -0.1, 255.0, float("nan"), float("inf")])
kinds = st.sampled_from(
    [torch.float32, torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]
)
images = st.builds(
    lambda size, fill, kind: torch.full(size, fill).nan_to_num(9).to(kind), sizes, fills, kinds
) | st.builds(torch.full, sizes, fills)
labels = st.builds(
    lambda values, kind: torch.tensor(values).to(kind),
    st.lists(st.integers(-2, 4), max_size=3) | st.just([0, 1]) | st.integers(0, 2),
    st.sampled_from([torch.int64, torch.int64, torch.int32, torch.float32, torch.bool]),
)
radii = (
    st.floats()
    | st.sampled_from([0, 0.1, 1, "0.1", None, []])
    | st.builds(torch.tensor, st.lists(st.floats(-0.5, 1.5), max_size=3))
)
batches = st.none() | st.builds(Draws.of, st.lists(st.integers(0, 5), max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images, labels, radii, batches)
def test_an_attack_gives_images_or_our_error(x: torch.Tensor, y: torch.Tensor, eps: Any, draws: Draws | None) -> None:
    try:
        crafted = PGD(steps=1)(MODEL, x, y, eps, draws)
    except RobenchError:
        return
    assert crafted.images.shape == x.shape
    assert bool(torch.isfinite(crafted.images).all())


def test_good_input_is_not_an_error() -> None:
    crafted = PGD(steps=1)(MODEL, torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 2]), 0.1, Draws.of([4, 4]))
    assert crafted.linf.tolist() == pytest.approx([0.1, 0.1], abs=0.1)
    assert float(crafted.linf.min()) > 0


@pytest.mark.parametrize(
    "bad",
    [
        {"images": torch.full((2, 3, 2, 2), 128, dtype=torch.uint8)},
        {"images": torch.zeros((2, 3, 2, 2), dtype=torch.uint8)},
        {"images": torch.full((2, 3, 2, 2), float("nan"))},
        {"images": torch.full((2, 3, 2, 2), 1.5)},
        {"images": torch.rand(2, 12)},
        {"images": torch.rand(2, 1, 2, 2)},
        {"labels": torch.tensor([0, 3])},
        {"labels": torch.tensor([0, -1])},
        {"labels": torch.tensor([0.0, 1.0])},
        {"labels": torch.tensor([0])},
        {"eps": 8},
        {"eps": float("nan")},
        {"eps": torch.tensor([0.1, 2.0])},
        {"draws": Draws.of([1])},
        {"draws": Draws.of([1, 2, 3])},
    ],
    # Names that every test process makes alike: the values are random.
    ids=lambda changes: "-".join(changes),
)
def test_each_bad_argument_is_our_error(bad: dict[str, Any]) -> None:
    good = {"images": torch.full((2, 3, 2, 2), 0.5), "labels": torch.tensor([0, 2]), "eps": 0.1, "draws": None}
    with pytest.raises(RobenchError, match=r"expected|does not take"):
        PGD(steps=1)(MODEL, **{**good, **bad})


@pytest.mark.parametrize("fields", [{"loss": "cE"}, {"steps": 0}, {"steps": -1}, {"loss": ""}], ids=str)
def test_an_attack_is_not_made_of_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(RobenchError):
        PGD(**fields)


def test_errors_of_losses_name_the_known_ones() -> None:
    with pytest.raises(RobenchError, match="did you mean ce"):
        PGD(loss="cee")
    assert "ce" in LOSSES.names()
    assert issubclass(PGD, Attack)
