"""ADP against the formulas, written in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from robench.core import data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from robench.training.task import resolve

Adp = DEFENSES.get("adp")


class Constant(nn.Module):
    """A member with given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def terms_of(logits: Tensor, labels: Tensor, **settings: float) -> dict[str, Tensor]:
    stream = Stream(("test",))
    batch = Batch(torch.zeros(len(labels), 1, 1, 1), labels, stream, stream)
    (terms,) = Adp(**settings).loss(Ensemble(Constant(member) for member in logits), batch)
    return dict(terms)


def reference(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Σ_i CE, H(p̄) and log det(M̃M̃ᵀ + 1e-6·I), batch means."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = exponents / exponents.sum(axis=-1, keepdims=True)
    batch = range(len(labels))
    ce = -np.log(p[:, batch, labels]).mean(axis=1).sum()
    mean = p.mean(axis=0)
    entropy = -(mean * np.log(mean)).sum(axis=1).mean()
    determinants = []
    for b, label in enumerate(labels):
        m = np.delete(p[:, b], label, axis=1)
        m /= np.linalg.norm(m, axis=1, keepdims=True)
        determinants.append(np.linalg.det(m @ m.T + 1e-6 * np.eye(len(m))))
    return float(ce), float(entropy), float(np.log(determinants).mean())


@pytest.mark.parametrize("n", [2, 3, 8])
def test_terms_equal_the_formulas(n):
    draws = np.random.default_rng(n)
    logits, labels = 3 * draws.normal(size=(n, 16, 10)), draws.integers(10, size=16)
    terms = terms_of(torch.tensor(logits), torch.tensor(labels), alpha=3.0, beta=0.25)
    ce, entropy, logdet = reference(logits, labels)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-12)
    assert terms["entropy"].item() == pytest.approx(-3 * entropy, rel=1e-12)
    assert terms["logdet"].item() == pytest.approx(-0.25 * logdet, rel=1e-8)


def test_gradient_equals_finite_differences():
    logits = torch.tensor(np.random.default_rng(0).normal(size=(3, 2, 5)), requires_grad=True)
    labels = torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda z: torch.stack(list(terms_of(z, labels).values())).sum(), logits)


@pytest.mark.parametrize("case", ["certain", "alike"])
def test_extreme_logits_give_a_finite_gradient(case):
    logits = torch.tensor(1e-3 * np.random.default_rng(0).normal(size=(3, 4, 10)), dtype=torch.float32)
    if case == "certain":
        logits[:, :, 2] += 300  # p_y rounds to 1, every other probability to 0
    else:
        logits[:, :, 5] += 80  # one and the same wrong class: M̃M̃ᵀ is singular but for 1e-6
    logits.requires_grad_(True)
    terms = terms_of(logits, torch.full((4,), 2), beta=1.0)
    torch.stack(list(terms.values())).sum().backward()
    assert torch.isfinite(logits.grad).all()
    # Two eigenvalues of at least 1e-6, one of about 3.
    assert 0 < terms["logdet"].item() < -2 * np.log(1e-6)


def test_refuses_more_members_than_wrong_classes():
    Adp().check(members=9, classes=10)
    with pytest.raises(RobenchError, match=r"`n` of defense 'adp' to be at most 9.*got 10; try --n 9"):
        Adp().check(members=10, classes=10)
    with pytest.raises(RobenchError, match="at least 3 classes"):
        Adp().check(members=2, classes=2)
    with pytest.raises(RobenchError, match="at most 9"):
        resolve(data.load("digits"), "adp", 10)


def test_refuses_negative_weights():
    with pytest.raises(RobenchError, match="`alpha` and `beta`"):
        Adp(alpha=-1.0)
