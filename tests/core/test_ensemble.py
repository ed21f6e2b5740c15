"""The log of the mean softmax, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robench.core.ensemble import Ensemble, mixture
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec, build


def reference(logits: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
    """By the definition, in extended precision where the platform has it."""
    exact = logits.astype(np.longdouble)
    exact = exact - exact.max(axis=-1, keepdims=True)
    log_p = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    top = log_p.max(axis=0)
    return np.asarray(top + np.log(np.exp(log_p - top).mean(axis=0)), dtype=np.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([1.0, 30.0, 1e4, 1e30]))
def test_it_is_the_log_of_the_mean_softmax(seed: int, members: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(members, 4, 6)) * scale
    value = mixture(torch.from_numpy(logits))
    np.testing.assert_allclose(value.numpy(), reference(logits), rtol=1e-12, atol=1e-12)
    single = mixture(torch.from_numpy(logits).float()).double().numpy()
    np.testing.assert_allclose(single, reference(logits.astype(np.float32).astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_moderate_logits_by_the_plain_formula() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 5.0]]], dtype=torch.float64)
    assert torch.allclose(mixture(logits), logits.softmax(-1).mean(0).log(), rtol=1e-14, atol=0)


def test_extreme_logits_keep_their_gradient() -> None:
    """The authors' clamp at 1e-40 has none here."""
    logits = torch.tensor([[[0.0, 500.0]], [[0.0, 400.0]]], requires_grad=True)
    value = mixture(logits)
    assert value[0, 0].item() == pytest.approx(-400 - np.log(2), rel=1e-6)
    (slope,) = torch.autograd.grad(value[0, 0], logits)
    assert bool(torch.isfinite(slope).all())
    assert slope[1, 0].tolist() == pytest.approx([1, -1])


def test_the_gradient_weights_members_by_their_probability_of_the_true_class() -> None:
    logits = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (slope,) = torch.autograd.grad(mixture(logits)[0, 2], logits)
    p = logits.detach().softmax(-1)
    weights = p[:, 0, 2] / p[:, 0, 2].sum()
    wanted = weights[:, None] * (torch.eye(4, dtype=torch.float64)[2] - p[:, 0])
    assert torch.allclose(slope[:, 0], wanted, rtol=1e-10)


def test_members_may_differ_in_architecture() -> None:
    specs = [
        ModelSpec(name=name, num_classes=4, in_channels=1, mean=(0.5,), std=(0.5,)) for name in ("resnet8", "resnet14")
    ]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    ensemble = Ensemble([*(build(spec, key) for key, spec in enumerate(specs)), flat]).eval()
    images = torch.rand(3, 1, 8, 8)
    assert len(ensemble) == 3
    each = torch.stack([member(images) for member in ensemble.members])
    assert torch.equal(ensemble.logits(images), each)
    assert torch.allclose(ensemble(images), each.softmax(-1).mean(0).log(), atol=1e-5)


def test_one_member_is_its_log_softmax() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(2, 1, 2, 2)
    assert torch.allclose(Ensemble([flat])(images), flat(images).log_softmax(-1))


def test_an_ensemble_needs_a_member() -> None:
    with pytest.raises(RobenchError, match="at least one member"):
        Ensemble([])
