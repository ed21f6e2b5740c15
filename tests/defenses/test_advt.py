"""AdvT attacks the ensemble, DVERGE+AdvT each member alone: against loops written out here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.defenses import DEFENSES, Batch, Defense

AdvT = DEFENSES.get("advt")
DvergeAdvT = DEFENSES.get("dverge-advt")


def written_out(
    loss: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor, eps: float, steps: int, alpha: float
) -> Tensor:
    """x ← Π(x + α·sign ∇loss), from x + U(−ε, ε)."""
    x = (images + eps * (2 * noise - 1)).clamp(0, 1)
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        loss(x).backward()
        x = (x + alpha * x.grad.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return x.detach()


def mean_probability(members: nn.ModuleList, labels: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        p = torch.stack([member(x).softmax(dim=1) for member in members]).mean(dim=0)
        return -p[range(len(labels)), labels].log().sum()

    return loss


def alone(member: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: -member(x).log_softmax(dim=1)[range(len(labels)), labels].sum()


def trained_on(defense: Defense, ensemble: Ensemble, batch: Batch) -> list[Tensor]:
    """The last image batch that each member saw: crafted, in both defenses."""
    seen: dict[int, Tensor] = {}
    handles = [
        member.register_forward_pre_hook(lambda module, args, i=i: seen.update({i: args[0]}))
        for i, member in enumerate(ensemble.members)
    ]
    for _ in defense.loss(ensemble, batch):
        pass
    for handle in handles:
        handle.remove()
    return [seen[i].detach() for i in range(len(ensemble))]


@pytest.mark.parametrize("craft_bn", ["train", "batch", "eval"])
def test_advt_attacks_the_mean_probability(craft_bn, make_ensemble, make_batch):
    ensemble, batch = make_ensemble(3).double(), make_batch(dtype=torch.float64)
    twin = copy.deepcopy(ensemble).train(craft_bn != "eval")
    defense = AdvT(eps=0.1, steps=4, step_ratio=0.3, craft_bn=craft_bn)
    noise = batch.draws.uniform(batch.images.shape, "advt", "start").double()
    wanted = written_out(mean_probability(twin.members, batch.labels), batch.images, noise, 0.1, 4, 0.03)
    images = trained_on(defense, ensemble, batch)
    assert all(torch.equal(one, images[0]) for one in images)
    torch.testing.assert_close(images[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("craft_bn", ["train", "batch", "eval"])
def test_dverge_advt_attacks_each_member_alone(craft_bn, make_ensemble, make_batch):
    ensemble, batch = make_ensemble(3).double(), make_batch(dtype=torch.float64)
    twin = copy.deepcopy(ensemble).train(craft_bn != "eval")
    defense = DvergeAdvT(steps=1, advt_eps=0.1, advt_steps=4, advt_step_ratio=0.3, craft_bn=craft_bn)
    images = trained_on(defense, ensemble, batch)
    for i, member in enumerate(twin.members):
        noise = batch.draws.uniform(batch.images.shape, "advt", i, "start").double()
        wanted = written_out(alone(member, batch.labels), batch.images, noise, 0.1, 4, 0.03)
        torch.testing.assert_close(images[i], wanted, rtol=0, atol=1e-12)


def test_attacking_the_ensemble_and_its_members_differ(make_ensemble, make_batch):
    ensemble, batch = make_ensemble(2), make_batch()
    noise = torch.full_like(batch.images, 0.5)  # no random start, so that only the loss differs
    crafted = [
        written_out(loss, batch.images, noise, 0.1, 4, 0.025)
        for loss in (
            mean_probability(ensemble.members, batch.labels),
            *(alone(member, batch.labels) for member in ensemble.members),
        )
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (crafted[one] != crafted[other]).float().mean() > 0.05


def test_dverge_advt_is_weighted_dverge_plus_cross_entropy(make_ensemble, make_batch):
    ensemble, batch = make_ensemble(3), make_batch()
    settings = {"steps": 2, "craft_bn": "batch"}
    plain = [terms["distilled"] for terms in DEFENSES.get("dverge")(**settings).loss(copy.deepcopy(ensemble), batch)]
    both = list(DvergeAdvT(**settings, weight=0.25, advt_steps=2).loss(ensemble, batch))
    for one, other in zip(plain, both, strict=True):
        assert set(other) == {"distilled", "adversarial"}
        torch.testing.assert_close(0.25 * one, other["distilled"])


def test_every_image_is_crafted_before_the_first_yield(make_ensemble, make_batch):
    ensemble = make_ensemble(3)
    for name in ("advt", "dverge-advt", "dverge"):
        stepped, untouched = copy.deepcopy(ensemble), copy.deepcopy(ensemble)
        for defense_ensemble in (stepped, untouched):
            losses = DEFENSES.get(name)(steps=2).loss(defense_ensemble, make_batch())
            next(losses)
            if defense_ensemble is stepped:
                with torch.no_grad():
                    for weights in defense_ensemble.members[0].parameters():
                        weights.zero_()
            rest = [value.item() for terms in losses for value in terms.values()]
            if defense_ensemble is stepped:
                wanted = rest
        assert rest == wanted, name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("advt", {"eps": 0}, "`eps` of defense 'advt'"),
        ("advt", {"eps": 8.0}, "8/255 is 0.03137"),
        ("advt", {"steps": 0}, "`steps` of defense 'advt' to be at least 1"),
        ("advt", {"step_ratio": 0}, "`step_ratio` of defense 'advt'"),
        ("dverge-advt", {"advt_eps": 2}, "`advt_eps` of defense 'dverge-advt'"),
        ("dverge-advt", {"advt_steps": 0}, "`advt_steps` of defense 'dverge-advt'"),
        ("dverge-advt", {"eps": 2}, "`eps` of defense 'dverge-advt'"),
        ("dverge-advt", {"weight": -1}, "`weight` of defense 'dverge-advt'"),
    ],
)
def test_refuses_what_makes_no_sense(name, settings, message):
    with pytest.raises(RobenchError, match=message):
        DEFENSES.get(name)(**settings)
