"""What holds for every registered defense; a new one is tested by being registered."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import nn

from robench.core import data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import _HOOKS
from robench.defenses import DEFENSES, Batch, Defense
from robench.training.recipes import recipe_file
from robench.training.task import resolve

pytestmark = pytest.mark.parametrize("name", DEFENSES.names())

SHORT = {"steps": 2, "advt_steps": 2}


def short(name: str) -> Defense:
    """The defense at its defaults, but few steps."""
    cls = DEFENSES.get(name)
    return cls(**{field.name: SHORT[field.name] for field in fields(cls) if field.name in SHORT})


def trained(defense: Defense, ensemble: Ensemble, batch: Batch) -> list[dict[str, float]]:
    """Runs the loss as training does, without the update."""
    values = []
    for terms in defense.loss(ensemble, batch):
        assert all(value.shape == () for value in terms.values())
        torch.stack(list(terms.values())).sum().backward()
        values.append({term: value.item() for term, value in terms.items()})
    return values


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_loss_is_finite_and_reaches_every_parameter(name, mixed, make_ensemble, make_batch):
    ensemble = make_ensemble(3, mixed)
    turns = range(3) if DEFENSES.get(name).in_turn else range(1)
    values = [each for turn in turns for each in trained(short(name), ensemble, replace(make_batch(), turn=turn))]
    assert values
    assert all(torch.isfinite(torch.tensor(list(terms.values()))).all() for terms in values)
    for parameter, weights in ensemble.named_parameters():
        assert weights.grad is not None, parameter
        assert torch.isfinite(weights.grad).all(), parameter
    for member in ensemble.members:
        assert all(weights.grad.abs().max() > 0 for weights in member.parameters() if weights.ndim > 1)


def test_same_draws_give_the_same_loss(name, make_ensemble, make_batch):
    ensemble = make_ensemble()
    twin = copy.deepcopy(ensemble)
    assert trained(short(name), ensemble, make_batch()) == trained(short(name), twin, make_batch())
    for (key, one), other in zip(ensemble.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("craft_bn", ["train", "batch", "eval"])
def test_leaves_no_state_but_running_statistics(name, craft_bn, make_ensemble, make_batch):
    defense = short(name)
    if hasattr(defense, "craft_bn"):
        defense = type(defense)(**{**{f.name: getattr(defense, f.name) for f in fields(defense)}, "craft_bn": craft_bn})
    elif craft_bn != "train":
        pytest.skip("crafts nothing")
    ensemble, batch = make_ensemble(3, mixed=True), make_batch()
    ensemble.members[0].model.bn1.eval()  # a mode that is not everyone's is kept too
    frozen_weight = ensemble.members[1].model.conv1.weight.requires_grad_(False)

    def state(module: nn.Module) -> tuple[object, ...]:
        return module.training, getattr(module, "track_running_stats", None), *(len(getattr(module, h)) for h in _HOOKS)

    before = [state(module) for module in ensemble.modules()]
    kept = [tensor.clone() for tensor in (batch.images, batch.labels, batch.paired)]
    weights = [weights.clone() for weights in ensemble.parameters()]
    generator = torch.get_rng_state()
    for _ in defense.loss(ensemble, batch):
        assert [state(module) for module in ensemble.modules()] == before
        assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    for tensor, clone in zip((batch.images, batch.labels, batch.paired), kept, strict=True):
        assert torch.equal(tensor, clone)
        assert not tensor.requires_grad
        assert tensor.grad is None
    assert [p for p in ensemble.parameters() if not p.requires_grad] == [frozen_weight]
    assert all(torch.equal(one, other) for one, other in zip(ensemble.parameters(), weights, strict=True))


def test_refuses_an_ensemble_below_its_smallest(name):
    defense = DEFENSES.get(name)()
    defense.check(members=defense.min_members, classes=10)
    for members in range(1, defense.min_members):
        with pytest.raises(RobenchError, match=rf"`n` of defense '{name}' to be at least {defense.min_members}"):
            defense.check(members=members, classes=10)


def test_is_data(name):
    defense = DEFENSES.get(name)()
    assert defense.name == name
    assert json.loads(json.dumps(defense.manifest()))["name"] == name
    if fields(defense):
        with pytest.raises(FrozenInstanceError):
            setattr(defense, fields(defense)[0].name, 1)
        with pytest.raises(TypeError):
            type(defense)(1)


@pytest.mark.parametrize("recipe", ["cifar10", "digits", "generic"])
def test_every_recipe_trains_it(name, recipe):
    for n in (3, 5, 8):
        recipe_file(recipe).resolve(name, n, {})


def test_starts_where_it_says_or_from_scratch(name):
    digits = data.load("digits")
    task = resolve(digits, name, 3)
    assert task.init == DEFENSES.get(name).start
    assert (task.start is not None) == (task.init == "baseline")
    scratch = resolve(digits, name, 3, init="scratch")
    assert scratch.start is None
    assert scratch.init == "scratch"
