"""DVERGE: its distilled images, its layers, its BatchNorm modes, and one optimiser instead of N."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core import data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.features import depth
from robench.defenses import DEFENSES, Batch, _layers
from robench.defenses import dverge as module
from robench.training.loop import make_optimizer, train_step
from robench.training.task import resolve

Dverge = DEFENSES.get("dverge")


def layers_of(member: nn.Module, images: Tensor) -> list[Tensor]:
    """Every f^l of a normalised ResNet, written out: inputs of the activations, then the logits."""
    net = member.model
    found = [net.bn1(net.conv1((images - member.mean.view(-1, 1, 1)) / member.std.view(-1, 1, 1)))]
    for block in (*net.layer1, *net.layer2, *net.layer3):
        x = found[-1].relu()
        found.append(block.bn1(block.conv1(x)))
        skip = x if block.downsample is None else block.downsample(x)
        found.append(block.bn2(block.conv2(found[-1].relu())) + skip)
    return [*found, net.fc(found[-1].relu().mean(dim=(2, 3)))]


def distilled(member: nn.Module, source: Tensor, target: Tensor, layer: int, eps: float, steps: int) -> Tensor:
    """As the authors do it: the target's features at every step."""
    z, velocity = source.clone(), torch.zeros_like(source)
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        distance = (layers_of(member, z)[layer - 1] - layers_of(member, target)[layer - 1].detach()) ** 2
        distance.flatten(1).mean(dim=1).sum().backward()
        velocity += z.grad / z.grad.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        z = (z - eps / steps * velocity.sign()).clamp(source - eps, source + eps).clamp(0, 1)
    return z.detach()


def statistics(ensemble: Ensemble) -> list[Tensor]:
    return [buffer.clone() for name, buffer in ensemble.named_buffers() if "running" in name]


@pytest.mark.parametrize("craft_bn", ["train", "batch", "eval"])
@pytest.mark.parametrize("layer", [1, 2, 3, 6, 7, 8])
def test_distilled_images_equal_the_formula(layer, craft_bn, make_ensemble, make_batch):
    ensemble, batch = make_ensemble(2).double(), make_batch(dtype=torch.float64)
    twin = copy.deepcopy(ensemble).train(craft_bn != "eval")
    images = Dverge(eps=0.1, steps=5, layer=layer, craft_bn=craft_bn).distilled(ensemble, batch)
    for crafted, member in zip(images, twin.members, strict=True):
        wanted = distilled(member, batch.images, batch.paired, layer, 0.1, 5)
        torch.testing.assert_close(crafted, wanted, rtol=0, atol=1e-12)
        assert not crafted.requires_grad


def test_loss_is_the_sum_over_the_other_members(make_ensemble, make_batch):
    ensemble, batch = make_ensemble(3), make_batch()
    twin = copy.deepcopy(ensemble)
    defense = Dverge(steps=2)
    images = defense.distilled(twin, batch)
    for i, terms in enumerate(defense.loss(ensemble, batch)):
        wanted = sum(F.cross_entropy(twin.members[i](images[j]), batch.labels) for j in range(3) if j != i)
        assert terms["distilled"].item() == wanted.item()
    # Also what every member's BatchNorm has seen, and in which order.
    assert all(torch.equal(*pair) for pair in zip(statistics(ensemble), statistics(twin), strict=True))


def test_only_train_mode_moves_running_statistics(make_ensemble, make_batch):
    images = {}
    for mode in ("train", "batch", "eval"):
        ensemble = make_ensemble(2)
        before = statistics(ensemble)
        images[mode] = Dverge(steps=3, layer=5, craft_bn=mode).distilled(ensemble, make_batch())
        unmoved = all(torch.equal(*pair) for pair in zip(before, statistics(ensemble), strict=True))
        assert unmoved == (mode != "train")
        assert ensemble.training
    assert all(torch.equal(*pair) for pair in zip(images["train"], images["batch"], strict=True))
    assert not torch.equal(images["train"][0], images["eval"][0])


def test_running_statistics_move_once_per_step_and_once_for_the_target(make_ensemble, make_batch):
    ensemble = make_ensemble(2)
    Dverge(steps=10, layer=3).distilled(ensemble, make_batch())
    for member in ensemble.members:
        assert member.model.bn1.num_batches_tracked == 11
        assert member.model.layer3[0].bn1.num_batches_tracked == 0  # beyond the layer


@pytest.mark.parametrize("per", ["epoch", "batch"])
def test_layers_are_drawn_per_epoch_or_batch_and_shared(per, make_ensemble, make_batch, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(module, "distill", lambda member, source, target, layer, **_: used.append(layer) or source)
    ensemble = make_ensemble(3, mixed=True)
    drawn = []
    for step in range(8):
        batch: Batch = make_batch(step)
        used.clear()
        Dverge(layer_per=per).distilled(ensemble, batch)
        u = (batch.epoch_draws if per == "epoch" else batch.draws).uniform((1,), "layer").item()
        assert used == [1 + math.floor(u * depth(member, batch.images)) for member in ensemble.members]
        assert used[0] == used[1]
        drawn.append(tuple(used))
    assert (len(set(drawn)) == 1) == (per == "epoch")


def test_a_fixed_layer_is_used_at_every_step(make_ensemble, make_batch, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(module, "distill", lambda member, source, target, layer, **_: used.append(layer) or source)
    ensemble = make_ensemble(2)
    for step in range(3):
        Dverge(layer=8).distilled(ensemble, make_batch(step))
    assert used == [8] * 6
    with pytest.raises(RobenchError, match=r"`layer` of defense 'dverge' in 0\.\.8"):
        Dverge(layer=9).distilled(ensemble, make_batch())
    with pytest.raises(RobenchError, match="no effect with a fixed `layer` 3"):
        Dverge(layer=3, layer_per="batch")


def test_depth_is_found_once_per_network_and_forgotten_with_it(make_ensemble, make_batch, monkeypatch):
    calls: list[nn.Module] = []
    monkeypatch.setattr(_layers, "depth", lambda member, image: calls.append(member) or depth(member, image))
    ensemble = make_ensemble(2)
    known = len(_layers._DEPTHS)
    for step in range(3):
        Dverge(steps=1).distilled(ensemble, make_batch(step))
    assert len(calls) == 2
    assert len(_layers._DEPTHS) == known + 2
    calls.clear()
    del ensemble
    gc.collect()
    assert len(_layers._DEPTHS) <= known


@pytest.mark.parametrize("name", ["baseline", "dverge", "dverge-advt", "advt"])
def test_one_optimiser_on_the_sum_equals_one_for_each_member(name, make_ensemble, make_batch):
    short = {"dverge": {"steps": 2}, "dverge-advt": {"steps": 2, "advt_steps": 2}, "advt": {"steps": 2}}
    task = resolve(data.load("digits"), name, 3, overrides=short.get(name, {}))
    ensemble = make_ensemble(3)
    twin = copy.deepcopy(ensemble)
    optimizer = make_optimizer(task.recipe, ensemble)
    settings = {"lr": task.recipe.lr, "momentum": task.recipe.momentum, "weight_decay": task.recipe.weight_decay}
    optimizers = [torch.optim.SGD(member.parameters(), **settings) for member in twin.members]
    for step in range(3):
        batch = make_batch(step)
        train_step(ensemble, optimizer, task, batch)
        for own, terms in zip(optimizers, task.defense.loss(twin, batch), strict=True):
            own.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            own.step()
    for (key, one), other in zip(ensemble.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
