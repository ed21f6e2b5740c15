"""GAL against closed forms and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch

Gal = DEFENSES.get("gal")


def batch_of(images: Tensor, labels: Tensor) -> Batch:
    stream = Stream(("test",))
    return Batch(images, labels, stream, stream)


def smooth(seed: int) -> nn.Module:
    """No kinks, so that finite differences of a gradient mean something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Conv2d(3, 3, 2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(3, 4),
        ).double()


@pytest.mark.parametrize("n", [2, 4])
def test_terms_equal_the_closed_form_of_linear_members(n):
    draws = np.random.default_rng(n)
    x, labels = draws.uniform(size=(6, 12)), draws.integers(5, size=6)
    weights, biases = draws.normal(size=(n, 5, 12)), draws.normal(size=(n, 5))
    members = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(12, 5).double()
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        members.append(nn.Sequential(nn.Flatten(), layer))
    (terms,) = Gal(weight=0.7).loss(Ensemble(members), batch_of(torch.tensor(x).view(6, 3, 2, 2), torch.tensor(labels)))

    logits = np.einsum("nkd,bd->nbk", weights, x) + biases[:, None]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    ce = -np.log(p[:, range(6), labels])
    g = np.einsum("nbk,nkd->nbd", p - np.eye(5)[labels], weights)
    g /= np.linalg.norm(g, axis=-1, keepdims=True)
    pairs = np.array([(g[i] * g[j]).sum(axis=-1) for i in range(n) for j in range(i + 1, n)])
    assert terms["ce"].item() == pytest.approx(ce.mean(), rel=1e-12)
    assert terms["coherence"].item() == pytest.approx(0.7 * np.log(np.exp(pairs).sum(axis=0)).mean(), rel=1e-12)


def test_parameter_gradient_equals_finite_differences():
    ensemble = Ensemble(smooth(seed) for seed in range(3)).train()
    draws = np.random.default_rng(0)
    batch = batch_of(torch.tensor(draws.uniform(size=(4, 1, 4, 4))), torch.tensor([0, 1, 2, 3]))
    defense = Gal(weight=2.0)

    def loss() -> Tensor:
        (terms,) = defense.loss(ensemble, batch)
        return torch.stack(list(terms.values())).sum()

    loss().backward()
    slopes = nn.utils.parameters_to_vector(parameter.grad for parameter in ensemble.parameters())
    weights = nn.utils.parameters_to_vector(ensemble.parameters()).detach()
    step = 1e-5
    for _ in range(6):
        direction = torch.tensor(draws.normal(size=weights.shape))
        values = []
        for signed in (step, -step):
            nn.utils.vector_to_parameters(weights + signed * direction, ensemble.parameters())
            values.append(loss().item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx((slopes @ direction).item(), rel=1e-6, abs=1e-7)


def test_coherence_alone_reaches_the_parameters_by_double_backprop():
    ensemble = Ensemble(smooth(seed) for seed in range(2))
    (terms,) = Gal().loss(ensemble, batch_of(torch.rand(4, 1, 4, 4, generator=_generator()).double(), torch.arange(4)))
    terms["coherence"].backward()
    assert all(member[0].weight.grad.abs().max() > 0 for member in ensemble.members)


def test_a_gradient_of_zero_has_cosine_zero_and_stays_finite():
    ensemble = Ensemble(smooth(seed) for seed in range(2))
    with torch.no_grad():
        ensemble.members[0][-1].weight.zero_()  # its logits do not depend on the image
    (terms,) = Gal().loss(ensemble, batch_of(torch.rand(4, 1, 4, 4, generator=_generator()).double(), torch.arange(4)))
    torch.stack(list(terms.values())).sum().backward()
    assert terms["coherence"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in ensemble.parameters() if p.grad is not None)


def test_parts_of_a_batch_have_the_coherence_of_the_whole_where_gradients_are_short():
    """Of a part, the mean's gradient is longer; what counts as short grows with it."""
    draws = torch.Generator().manual_seed(0)
    members = []
    for _ in range(3):
        layer = nn.Linear(12, 5).double()
        layer.load_state_dict({"weight": 1e-8 * torch.randn(5, 12, generator=draws).double(), "bias": torch.zeros(5)})
        members.append(nn.Sequential(nn.Flatten(), layer))
    x, labels = torch.rand(8, 3, 2, 2, generator=draws).double(), torch.arange(8) % 5
    ensemble, whole = Ensemble(members), batch_of(x, labels)

    def coherence(batch):
        (terms,) = Gal(weight=1.0).loss(ensemble, batch)
        return terms["coherence"]

    halves = [replace(whole, images=x[at], labels=labels[at], parts=2) for at in (slice(4), slice(4, 8))]
    found = torch.stack([coherence(half) for half in halves]).mean()
    assert 1e-4 < (coherence(whole) - math.log(3)).abs() < 0.5
    torch.testing.assert_close(found, coherence(whole), rtol=1e-12, atol=0)


def test_attention_can_be_differentiated_twice():
    def member() -> nn.Module:
        return VisionTransformer(
            image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = Ensemble([member(), member()]).train()
    for network in ensemble.members:
        torch.nn.init.normal_(network.heads.head.weight, std=0.1, generator=_generator())
    (terms,) = Gal().loss(ensemble, batch_of(torch.rand(4, 3, 8, 8, generator=_generator()), torch.arange(4)))
    terms["coherence"].backward()
    assert all(network.conv_proj.weight.grad.abs().max() > 0 for network in ensemble.members)


def test_refuses_a_negative_weight():
    with pytest.raises(RobenchError, match="`weight` of defense 'gal'"):
        Gal(weight=-0.5)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
