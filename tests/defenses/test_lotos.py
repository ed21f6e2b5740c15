"""LOTOS against dense matrices and their singular value decomposition."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.spectral import convolutions
from robench.defenses import DEFENSES, Batch
from tests.defenses.parity import assert_same, smooth
from tests.defenses.test_adp_advt import batch_of, mean_loss

Lotos = DEFENSES.get("lotos")


def layers_of(member: nn.Module) -> list[nn.Conv2d]:
    return [module for module in member.modules() if isinstance(module, nn.Conv2d)]


def matrix(layer: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> Tensor:
    """(outputs, inputs) of 4x4 images, column by column; with a graph."""
    basis = torch.eye(layer.in_channels * 16).double().view(-1, layer.in_channels, 4, 4)
    made = layer(basis) - layer(torch.zeros_like(basis[:1]))
    if norm is not None:
        made = made * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, -1, 1, 1)  # type: ignore[operator]
    return made.flatten(1).T


def top(dense: Tensor) -> Tensor:
    return torch.linalg.svd(dense.detach()).Vh[0]


def with_vectors(batch: Batch, ensemble: Ensemble) -> Batch:
    """The exact singular vectors in the state, which one more power iteration leaves where they are."""
    state = {}
    for i, member in enumerate(ensemble.members):
        for number, layer in enumerate(layers_of(member)):
            shape = (1, layer.in_channels, 4, 4)
            state[f"convolution.{i}.{number}"] = top(matrix(layer)).view(shape)
            if number == 0:
                state[f"composition.{i}.{number}"] = top(matrix(layer, norm_of(member))).view(shape)
    return replace(batch, state=state)


def norm_of(member: nn.Module) -> nn.BatchNorm2d:
    return next(module for module in member.modules() if isinstance(module, nn.BatchNorm2d))


def plain(members: list[nn.Module], batch: Batch, weight: float, composition: bool, normalised: bool) -> Tensor:
    dense = [[matrix(layer) for layer in layers_of(member)] for member in members]
    columns = [[layers[number] for layers in dense] for number in range(2)]
    if composition:
        columns.append([matrix(layers_of(member)[0], norm_of(member)) for member in members])
    overlap = torch.zeros(()).double()
    for column in columns:
        for j, mine in enumerate(column):
            for k, other in enumerate(column):
                if j != k:
                    overlap = overlap + ((mine @ top(other)).square().sum().sqrt() - 0.3).clamp(min=0)
    if normalised:
        overlap = overlap / (2 * len(members) * (len(members) - 1))
    losses = [mean_loss(member(batch.images), batch.labels) for member in members]
    return torch.stack(losses).sum() + weight * overlap


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("composition", "normalised"), [(False, False), (True, True)], ids=["code", "paper"])
def test_loss_gradients_and_statistics(n: int, composition: bool, normalised: bool) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    defense = Lotos(weight=0.6, mal=0.3, composition=composition, normalised=normalised)
    batch = with_vectors(batch_of(), ensemble)
    assert_same(defense, ensemble, batch, lambda members, batch: plain(members, batch, 0.6, composition, normalised))


def test_vectors_come_to_the_singular_ones_over_the_steps() -> None:
    ensemble, batch = Ensemble(smooth(key) for key in range(2)).train(), batch_of()
    for _ in range(60):
        list(Lotos(iterations=5).loss(ensemble, batch))
    for i, member in enumerate(ensemble.members):
        for number, layer in enumerate(layers_of(member)):
            dense = matrix(layer)
            wanted = torch.linalg.matrix_norm(dense, 2)
            found = (dense @ batch.state[f"convolution.{i}.{number}"].flatten()).norm()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_a_vector_of_another_shape_is_not_compared() -> None:
    narrow = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, 4), nn.Flatten(), nn.Linear(2, 5)
    )
    wide = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, 4), nn.Flatten(), nn.Linear(2, 5))
    ensemble, batch = Ensemble([narrow.double(), wide.double()]).train(), batch_of()
    (overlap,) = [terms for terms in Lotos(weight=1.0, mal=0.0).loss(ensemble, batch) if "orthogonality" in terms]
    first = [matrix(layers_of(member)[0]) for member in ensemble.members]
    vectors = [batch.state[f"convolution.{i}.0"].flatten() for i in (0, 1)]
    wanted = (first[0] @ vectors[1]).norm() + (first[1] @ vectors[0]).norm()
    torch.testing.assert_close(overlap["orthogonality"], wanted, rtol=1e-9, atol=0)


def test_spectral_norms_come_to_the_clip_and_smaller_ones_stay() -> None:
    ensemble, batch = Ensemble(smooth(key) for key in range(2)).train(), batch_of()
    with torch.no_grad():
        layers_of(ensemble.members[0])[0].weight.mul_(5)
        layers_of(ensemble.members[1])[0].weight.mul_(0.1)
    small = layers_of(ensemble.members[1])[0].weight.clone()
    defense = Lotos(clip=1.0, iterations=3)
    list(defense.loss(ensemble, batch))
    with torch.no_grad():
        for _ in range(60):
            defense.finish(ensemble, batch)
    for member in ensemble.members:
        for layer in layers_of(member):
            assert torch.linalg.matrix_norm(matrix(layer), 2) < 1.01
    assert torch.equal(layers_of(ensemble.members[1])[0].weight, small)


def test_without_a_clip_weights_stay() -> None:
    ensemble, batch = Ensemble(smooth(key) for key in range(2)).train(), batch_of()
    before = copy.deepcopy(ensemble.state_dict())
    Lotos(clip=0.0).finish(ensemble, batch)
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


def test_a_network_without_convolutions_is_refused() -> None:
    ensemble = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double() for _ in range(2)])
    with pytest.raises(RobenchError, match=r"needs nn\.Conv2d modules"):
        list(Lotos().loss(ensemble, batch_of()))


def test_convolutions_that_were_not_called_at_first_are_found_later() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ready, self.layer = False, nn.Conv2d(3, 2, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images) if self.ready else images  # type: ignore[no-any-return]

    model = Late()
    assert convolutions(model, torch.zeros(1, 3, 4, 4)) == []
    model.ready = True
    assert [layer.shape for layer in convolutions(model, torch.zeros(2, 3, 4, 4))] == [(1, 3, 4, 4)]


@pytest.mark.parametrize(("field", "value"), [("weight", -0.1), ("mal", -1.0), ("clip", -1.0), ("iterations", 0)])
def test_refuses_what_makes_no_sense(field: str, value: float) -> None:
    with pytest.raises(RobenchError, match=f"`{field}` of defense 'lotos' to be at least"):
        Lotos(**{field: value})
