"""AdvOAP against a plain writing, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.defenses import DEFENSES, Batch
from tests.defenses.parity import assert_same, of_terms, smooth
from tests.defenses.test_adp_advt import batch_of, mean_loss
from tests.defenses.test_advt import alone, written_out

AdvOAP = DEFENSES.get("advoap")
ATTACK = {"eps": 0.1, "steps": 3, "step_ratio": 0.4}


def plain(members: list[nn.Module], batch: Batch, offset: float, clean: bool) -> Tensor:
    """α = .2, β = 10: a row is p without the class y, divided by its sum."""
    logits = []
    for i, member in enumerate(members):
        noise = batch.draws.uniform(batch.images.shape, "advoap", i, "start").double()
        x = written_out(alone(member.eval(), batch.labels), batch.images, noise, 0.1, 3, 0.04)
        member.zero_grad()
        logits.append(member.train()(x))
        if clean:
            member(batch.images)
    total = torch.stack([mean_loss(z, batch.labels) for z in logits]).sum()
    for b, y in enumerate(batch.labels.tolist()):
        p = torch.stack([z[b].softmax(0) for z in logits])
        rows = torch.cat([p[:, :y], p[:, y + 1 :]], dim=1)
        rows = rows / rows.sum(dim=1, keepdim=True)
        mean = rows.mean(dim=0)
        entropy = -((mean + offset) * mean.log()).sum()
        gram = rows @ rows.T + 1e-6 * torch.eye(len(members)).double()
        total = total - (0.2 * gram.det().log() + 10 * entropy) / len(batch.labels)
    return total


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("offset", "clean"), [(0.0, False), (1e-6, True)], ids=["paper", "code"])
def test_loss_gradients_and_statistics(n: int, offset: float, clean: bool) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    defense = AdvOAP(**ATTACK, entropy_offset=offset, clean_statistics=clean)
    assert_same(defense, ensemble, batch_of(), lambda members, batch: plain(members, batch, offset, clean))


class Constant(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 0 * images.flatten(1)[:, :1]


def test_a_certain_member_gives_a_finite_gradient() -> None:
    logits = torch.zeros(6, 5)
    logits[:, 1], logits[:, 2] = 300.0, 150.0  # a probability of 1, one of 0, three that underflow
    ensemble = Ensemble([Constant(logits), Constant(logits)])
    assert torch.isfinite(of_terms(AdvOAP(steps=1), ensemble, batch_of()))
    assert all(torch.isfinite(weight.grad).all() for weight in ensemble.parameters() if weight.grad is not None)


def test_passes_count_the_attack_and_the_images() -> None:
    assert AdvOAP(steps=7).passes(3) == 8
    assert AdvOAP(steps=7, clean_statistics=True).passes(3) == 8.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1.0}, "`alpha` and `beta` of defense 'advoap' to be at least 0"),
        ({"beta": -1.0}, "`alpha` and `beta` of defense 'advoap' to be at least 0"),
        ({"entropy_offset": -1e-6}, "`entropy_offset` of defense 'advoap' to be at least 0"),
        ({"eps": 0.0}, "`eps` of defense 'advoap'"),
    ],
)
def test_refuses_what_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(RobenchError, match=message):
        AdvOAP(**values)


def test_refuses_more_members_than_wrong_classes() -> None:
    with pytest.raises(RobenchError, match=r"`n` of defense 'advoap' to be at most 9.*got 10; try --n 9"):
        AdvOAP().check(members=10, classes=10)
    with pytest.raises(RobenchError, match="at least 3 classes"):
        AdvOAP().check(members=2, classes=2)
