"""iGAT over ADP and over DVERGE against a plain writing, image by image."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from tests.defenses.parity import adp_terms, assert_same, smooth
from tests.defenses.test_adp_advt import mean_loss
from tests.defenses.test_advt import mean_probability, written_out

Igat, IgatDverge = DEFENSES.get("igat"), DEFENSES.get("igat-dverge")
EPS, STEPS, RATIO = 0.05, 2, 0.5
ADVT = {"advt_eps": EPS, "advt_steps": STEPS, "advt_step_ratio": RATIO}


def batch_of(ensemble: Ensemble, count: int = 12) -> Batch:
    """Three of four labels are what the ensemble says, so that it is right of some images and wrong of others."""
    draws = Stream(("igat",))
    images, paired = (draws.uniform((count, 3, 4, 4), name).double() for name in ("images", "paired"))
    with torch.no_grad():
        labels = copy.deepcopy(ensemble)(images).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 5
    return Batch(images, labels, draws, draws, paired, samples=torch.arange(count), train_size=count)


def pair() -> Ensemble:
    return Ensemble(smooth(key) for key in range(2)).train()


def attacked(members: list[nn.Module], batch: Batch, first: int, step: int) -> Tensor:
    labels = batch.labels[first::step]
    noise = batch.draws.uniform(batch.images.shape, "igat", "start").double()[first::step]
    crafted = written_out(
        mean_probability(members, labels),
        batch.images[first::step],
        noise,
        EPS,
        STEPS,
        RATIO * EPS,  # type: ignore[arg-type]
    )
    for member in members:
        member.zero_grad()
    return crafted


def points_of(members: list[nn.Module], batch: Batch, every: bool) -> tuple[Tensor, Tensor]:
    if every:
        return attacked(members, batch, 0, 1), batch.labels
    crafted = attacked(members, batch, 1, 2)
    return torch.cat([batch.images[::2], crafted]), torch.cat([batch.labels[::2], batch.labels[1::2]])


def interaction(logits: list[Tensor], labels: Tensor, draws: Stream, cap: float, largest: bool) -> Tensor:
    unit = draws.uniform((len(labels),), "igat", "member").double()
    total, wrong = torch.zeros(()).double(), 0
    for b, y in enumerate(labels.tolist()):
        p = [z[b].softmax(0) for z in logits]
        if int((sum(p) / len(p)).argmax()) == y:  # type: ignore[union-attr, operator]
            continue
        wrong += 1
        order = sorted(range(len(p)), key=lambda i: float(p[i][y].detach()))
        chances = [2.0 ** order.index(i) / (2 ** len(p) - 1) for i in range(len(p))]
        chosen = next(i for i in range(len(p)) if float(unit[b]) < sum(chances[: i + 1]))
        total = total + 5 * -p[chosen][y].log()
        rivals = [torch.cat([each[:y], each[y + 1 :]]).max().clamp(max=cap) for each in p]
        total = total + 10 * (-2 * (1 - max(rivals)).log() if largest else -sum((1 - each).log() for each in rivals))
    assert 0 < wrong < len(labels)
    return total / len(labels)


def adp(logits: list[Tensor], labels: Tensor, ce: bool) -> Tensor:
    likely = [z[b].log_softmax(0)[y] for z in logits for b, y in enumerate(labels.tolist())]
    return adp_terms(logits, labels, 2, 0.5) - (sum(likely) / len(labels) if ce else 0)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "fields",
    [{}, {"cap": 0.3, "base_ce": False}, {"cap": 0.99, "attacked": "all"}, {"largest": True}],
    ids=["paper", "code 1", "code 2", "largest"],
)
def test_over_adp(n: int, fields: dict[str, object]) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    cap, largest, every = fields.get("cap", 1.0), bool(fields.get("largest")), "attacked" in fields

    def plain(members: list[nn.Module], batch: Batch) -> Tensor:
        points, labels = points_of(members, batch, every)
        if every:
            total = adp([member(batch.images) for member in members], labels, True)
            logits = [member(points) for member in members]
            total = total + sum(mean_loss(z, labels) for z in logits)
        else:
            logits = [member(points) for member in members]
            total = adp(logits, labels, "base_ce" not in fields)
        return total + interaction(logits, labels, batch.draws, cap, largest)  # type: ignore[arg-type]

    assert_same(Igat(**ADVT, **fields), ensemble, batch_of(ensemble), plain)


@pytest.mark.parametrize("alone", [False, True])
def test_over_dverge_adds_the_two_terms(alone: bool) -> None:
    """The base's own loss is held against plain writings in its own tests."""
    ensemble = Ensemble(smooth(key) for key in range(3)).train()
    fields = {"eps": 0.1, "steps": 2, **ADVT}

    def plain(members: list[nn.Module], batch: Batch) -> Tensor:
        points, labels = points_of(members, batch, False)
        base = DEFENSES.get("dverge-advt")(**fields) if alone else DEFENSES.get("dverge")(eps=0.1, steps=2)
        total = torch.stack([sum(terms.values()) for terms in base.loss(Ensemble(members), batch)]).sum()
        return total + interaction([member(points) for member in members], labels, batch.draws, 1.0, False)

    assert_same(IgatDverge(alone=alone, **fields), ensemble, batch_of(ensemble), plain)


def test_nothing_is_added_where_the_ensemble_is_right() -> None:
    ensemble = Ensemble(smooth(key) for key in range(3)).eval()
    batch = batch_of(ensemble)
    with torch.no_grad():
        predicted = ensemble(batch.images).argmax(dim=1)
    logits = ensemble.logits(batch.images)
    terms = Igat().interaction(logits, predicted, batch)
    assert [value.item() for value in terms.values()] == [0.0, 0.0]


def test_the_likeliest_member_is_the_one_that_is_nearest_to_right() -> None:
    """Of three members as 1, 2 and 4 of 7; no probability is its loss where it is drawn."""
    count = 7000
    labels = torch.zeros(count, dtype=torch.int64)
    logits = torch.tensor([[0.0, 3.0], [-2.0, 3.0], [2.0, 3.0]]).double()[:, None].expand(-1, count, -1)
    draws = Stream(("many",))
    batch = replace(batch_of(pair()), draws=draws)
    losses = [-math.log(float(z.softmax(0)[0])) for z in logits[:, 0]]
    wanted = sum(share * loss for share, loss in zip((2 / 7, 1 / 7, 4 / 7), losses, strict=True))
    found = Igat(distributed=1.0).interaction(logits, labels, batch)["distributed"]
    assert float(found) == pytest.approx(wanted, abs=0.05)


def test_a_probability_of_one_has_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[[0.0, 200.0, 0.0]]]).requires_grad_(True)
    terms = Igat().interaction(logits, torch.tensor([0]), replace(batch_of(pair()), draws=Stream(("one",))))
    terms["bounded"].backward()
    assert float(terms["bounded"]) == pytest.approx(10 * (200 - math.log(2)), rel=1e-5)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_passes_count_the_attack_of_half_or_of_all() -> None:
    assert Igat().passes(3) == 6
    assert Igat(attacked="all").passes(3) == 12
    assert IgatDverge().passes(3) == 10 + 2 + 5 + 1
    assert IgatDverge(alone=True, attacked="all").passes(3) == 10 + 2 + 11 + 10 + 1


@pytest.mark.parametrize("name", ["igat", "igat-dverge"])
@pytest.mark.parametrize(
    ("field", "value"), [("distributed", -1.0), ("bounded", -1.0), ("cap", 0.0), ("cap", 2.0), ("advt_steps", 0)]
)
def test_refuses_what_makes_no_sense(name: str, field: str, value: float) -> None:
    with pytest.raises(RobenchError, match=rf"`{field}`.* of defense '{name}'|`bounded` of defense '{name}'"):
        DEFENSES.get(name)(**{field: value})
