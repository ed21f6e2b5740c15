"""What no check of `tests/test_conformance.py` says of a defense: settings that are no defaults, recipes."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

from robench.core import data
from robench.core.frozen import _HOOKS
from robench.defenses import DEFENSES
from robench.training.recipes import recipe_file
from robench.training.task import resolve

everyone = pytest.mark.parametrize("name", DEFENSES.names())
#: Those that craft on the network that they train.
CRAFTING = [name for name in DEFENSES.names() if any(item.name == "craft_bn" for item in fields(DEFENSES.get(name)))]


@pytest.mark.parametrize("name", CRAFTING)
@pytest.mark.parametrize("craft_bn", ["batch", "eval"])
def test_leaves_no_state_but_running_statistics(name, craft_bn, make_ensemble, make_batch):
    kind = DEFENSES.get(name)
    few = {item.name: 2 for item in fields(kind) if item.name in ("steps", "advt_steps")}
    defense = kind(**few, craft_bn=craft_bn)
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


@everyone
@pytest.mark.parametrize("recipe", ["cifar10", "digits", "generic"])
def test_every_recipe_trains_it(name, recipe):
    for n in (3, 5, 8):
        recipe_file(recipe).resolve(name, n, {})


@everyone
def test_starts_where_it_says_or_from_scratch(name):
    digits = data.load("digits")
    task = resolve(digits, name, 3)
    assert task.init == DEFENSES.get(name).start
    assert (task.start is not None) == (task.init == "baseline")
    scratch = resolve(digits, name, 3, init="scratch")
    assert scratch.start is None
    assert scratch.init == "scratch"
