"""Losses against NumPy, and where the authors' variant goes blind."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.losses import CONFIDENCE, LOSSES, margin

ARRAY = npt.NDArray[np.float64]


def numpy_margin(logits: ARRAY, labels: npt.NDArray[np.int64]) -> ARRAY:
    return np.array([row[label] - np.delete(row, label).max() for row, label in zip(logits, labels, strict=True)])


def numpy_ce(logits: ARRAY, labels: npt.NDArray[np.int64]) -> ARRAY:
    top = logits.max(axis=1, keepdims=True)
    return np.array(np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(labels)), labels])


def numpy_paper(logits: ARRAY, labels: npt.NDArray[np.int64]) -> ARRAY:
    masked = logits.copy()
    masked[np.arange(len(labels)), labels] = 0
    return -np.maximum(0, logits[np.arange(len(labels)), labels] - masked.max(axis=1) + CONFIDENCE)


REFERENCES = {
    "ce": numpy_ce,
    "cw": lambda logits, labels: -np.maximum(0, numpy_margin(logits, labels) + 0.1),
    "cw-paper": numpy_paper,
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 1.0, 50.0]))
def test_a_loss_equals_its_numpy_reference(name: str, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(5, 4)) * scale, random.integers(0, 4, size=5)
    values = LOSSES.get(name)(torch.from_numpy(logits), torch.from_numpy(labels))
    assert values.shape == (5,)
    np.testing.assert_allclose(values.numpy(), REFERENCES[name](logits, labels), rtol=1e-12, atol=1e-12)


def test_there_are_no_losses_without_a_reference() -> None:
    assert LOSSES.names() == sorted(REFERENCES)


def test_the_margin_of_log_probabilities_sees_the_best_wrong_class() -> None:
    log_probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]).log()
    expected = [math.log(0.7 / 0.2), math.log(0.3 / 0.6)]
    assert margin(log_probabilities, torch.tensor([0, 2])).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_margin_touches_the_true_and_the_best_wrong_class() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(margin(logits, torch.tensor([0])).sum(), logits)
    assert slope.tolist() == [[1, 0, -1]]


def log_mixture(true: float) -> torch.Tensor:
    """Log-probabilities of four classes, ``true`` for class 0."""
    rest = (1 - true) / 3
    return torch.tensor([[true, rest, rest * 0.9, rest * 1.1]], dtype=torch.float64).log()


@pytest.mark.parametrize(("probability", "blind"), [(0.3, True), (0.904, True), (0.906, False), (0.99, False)])
def test_the_papers_cw_has_no_gradient_below_905(probability: float, blind: bool) -> None:
    for name, zero in (("cw-paper", blind), ("cw", probability < 0.3)):
        logits = log_mixture(probability).requires_grad_(True)
        (slope,) = torch.autograd.grad(LOSSES.get(name)(logits, torch.tensor([0])).sum(), logits)
        assert bool((slope == 0).all()) == zero, name
