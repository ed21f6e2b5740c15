"""MRBoost against a plain writing, turn by turn, and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robench.core import data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from robench.store.runs import Runs
from robench.training.loop import ensure
from robench.training.task import resolve
from tests.defenses.parity import AGREEMENT, of_terms, smooth
from tests.defenses.test_adp_advt import batch_of

MRBoost = DEFENSES.get("mrboost")
EPS, STEPS, RATIO = 0.1, 3, 0.4
ATTACK = {"eps": EPS, "steps": STEPS, "step_ratio": RATIO}


def margin_loss(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Mean over the batch, from the definition."""
    total = torch.zeros(()).double()
    for row, y in zip(logits, labels.tolist(), strict=True):
        away = (-row).softmax(0).log()
        total = total - row.softmax(0)[y].log()
        total = total - weight / (len(row) - 1) * sum(away[c] for c in range(len(row)) if c != y)
    return total / len(labels)


def plain(members: list[nn.Module], batch: Batch, weight: float, joint: bool, start: float) -> Tensor:
    """The loss of member ``batch.turn``; earlier ones, and while crafting it too, are in eval mode."""
    x, group = batch.images, members[: batch.turn + 1]
    unit = batch.draws.uniform(x.shape, "mrboost").double()
    z = (x + start * EPS * (2 * unit - 1)).clamp(0, 1)
    for member in group:
        member.eval()
    for _ in range(STEPS):
        z = z.detach().requires_grad_(True)
        logits = sum(member(z) for member in group) / len(group)
        (slope,) = torch.autograd.grad(margin_loss(logits, batch.labels, weight), z)  # type: ignore[arg-type]
        z = (z + RATIO * EPS * slope.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    z = z.detach()
    group[-1].train()
    logits = group[-1](z)
    if joint:
        logits = (logits + sum(member(z).detach() for member in group[:-1])) / len(group)
    return margin_loss(logits, batch.labels, weight)


@pytest.mark.parametrize("turn", [0, 2])
@pytest.mark.parametrize(("weight", "joint", "start"), [(1.0, False, 1.0), (0.7, True, 0.5), (0.0, False, 0.5)])
def test_loss_gradients_and_statistics(turn: int, weight: float, joint: bool, start: float) -> None:
    ensemble, twin = (Ensemble(smooth(key) for key in range(4)).train() for _ in range(2))
    defense = MRBoost(weight=weight, learns="joint" if joint else "alone", start_ratio=start, **ATTACK)
    batch = replace(batch_of(), turn=turn)
    found = of_terms(defense, ensemble, batch)
    wanted = plain(list(twin.members), batch, weight, joint, start)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=AGREEMENT)
    for number, (mine, theirs) in enumerate(zip(ensemble.members, twin.members, strict=True)):
        assert all(module.training for module in mine.modules())
        for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (one.grad is None) == (number != turn), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=AGREEMENT, msg=name)
        for (name, one), other in zip(mine.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=AGREEMENT, msg=name)


def test_members_are_trained_in_turn_each_for_all_epochs_and_on_the_whole_schedule(tmp_path: Path) -> None:
    digits, store = data.load("digits"), Runs(tmp_path)
    fields = {"epochs": 2, "steps": 1, "milestones": (0.5,), "weight_decay": 0.01}
    task = resolve(digits, "mrboost", 2, models=["resnet8"], overrides=fields)
    assert task.epochs == 4
    run = ensure(task, digits, store, device=torch.device("cpu"))
    assert [entry["lr"] for entry in run.manifest["history"]] == pytest.approx([0.1, 0.01, 0.1, 0.01])
    stream = Stream((task.role, task.defense.name, task.n, task.seed))
    for i, member in enumerate(run.load().members):
        start = build(task.members[i], stream.key("weights", i))
        assert (member.model.fc.weight - start.model.fc.weight).abs().max() > 0.01
        assert int(member.model.bn1.num_batches_tracked) == 2 * (len(digits.train) // 64)


def test_a_member_is_left_alone_after_its_turn(tmp_path: Path) -> None:
    """The first of two is the first of three: what comes later changes nothing of it."""
    digits, store = data.load("digits"), Runs(tmp_path)
    first = []
    for n in (1, 2):
        task = resolve(digits, "mrboost", n, models=["resnet8"], overrides={"epochs": 1, "steps": 1})
        ensemble = Ensemble(build(spec, 7 + i) for i, spec in enumerate(task.members))
        parent = store.save(
            f"start{n}", ensemble, members=task.members, defense={"name": "x"}, seed=0, role="target",
            data={"name": "digits", "fingerprint": digits.fingerprint},
        )  # fmt: skip
        task = replace(task, init=parent.name, given_name=f"boosted{n}")
        first.append(one_stream(task, digits, store))
    for (name, one), other in zip(first[0].state_dict().items(), first[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def one_stream(task, digits, store) -> nn.Module:  # type: ignore[no-untyped-def]
    """The first member, trained from draws that do not depend on N."""
    from robench.training import loop

    stream, own = Stream(("alike",)), loop.Stream
    try:
        loop.Stream = lambda owner: stream  # type: ignore[assignment, misc]
        return ensure(task, digits, store, device=torch.device("cpu")).load().members[0]
    finally:
        loop.Stream = own  # type: ignore[misc]


def test_passes_are_the_mean_over_turns() -> None:
    assert MRBoost(steps=10).passes(1) == 11
    assert MRBoost(steps=10).passes(3) == pytest.approx((10 + 20 + 30 + 3) / 3 / 3)


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("start_ratio", 1.5), ("eps", 0.0), ("steps", 0)])
def test_refuses_what_makes_no_sense(field: str, value: float) -> None:
    with pytest.raises(RobenchError, match=f"`{field}` of defense 'mrboost'"):
        MRBoost(**{field: value})
