"""FASTEN against a plain writing, over three steps, so that the memory counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from robench.defenses._memory import recall, remember
from tests.defenses.parity import assert_same, of_terms, smooth
from tests.defenses.test_adp_advt import mean_loss

Fasten = DEFENSES.get("fasten")
CODE = {"start_eps": 0.04, "project_start": False, "blend": "batch", "chained": True, "constant_target": False}


def batch_of(step: int, samples: list[int]) -> Batch:
    epoch = Stream(("test",)).within("epoch", step)
    draws = epoch.within("step", 0)
    images = draws.uniform((len(samples), 3, 4, 4), "images").double()
    labels = torch.tensor(samples) % 5
    return Batch(images, labels, draws, epoch, samples=torch.tensor(samples), train_size=9)


def features_of(member: nn.Module, images: Tensor, layer: int) -> Tensor:
    """`smooth` has two activations: layers 1 and 2 are what they get, 3 are the logits."""
    cut = {1: 2, 2: 4, 3: len(member)}[layer]  # type: ignore[arg-type]
    return member[:cut](images)  # type: ignore[index,no-any-return]


def plain(members: list[nn.Module], batch: Batch, eps: float, code: bool) -> Tensor:
    """Image by image where it can be; the memory is ``batch.state``, changed in place."""
    x, draws, count = batch.images, batch.draws, len(members)

    def unit(*purpose: str | int) -> float:
        return float(draws.uniform((1,), "fasten", *purpose))

    a = int(unit("first") * count)
    b = [i for i in range(count) if i != a][int(unit("second") * (count - 1))]
    layer = 1 + int(float(batch.epoch_draws.uniform((1,), "layer")) * 3)
    common = (2 * draws.uniform(x.shape, "fasten", "start").double() - 1) * (0.04 if code else eps)
    made = []
    memory = batch.state.setdefault("perturbation", torch.full((9, 3, 4, 4), -128, dtype=torch.int8))
    seen = [bool(each[0, 0, 0] != -128) for each in memory]
    before = memory[batch.samples].double() * eps / 127
    for which, i in enumerate((a, b)):
        z = x + common + (2 * draws.uniform(x.shape, "fasten", "noise", which).double() - 1) * eps
        z = z.clamp(0, 1) if code else z.clamp(x - eps, x + eps).clamp(0, 1)
        wanted = features_of(members[i], x, layer).detach()
        z = z.detach().requires_grad_(True)
        (features_of(members[i], z, layer) - wanted).square().sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        z = (z.detach() + 0.5 * eps * z.grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        share = (
            draws.uniform((1 if code else len(x), 1, 1, 1), "fasten", "share", which).double().expand(len(x), 1, 1, 1)
        )
        rows = []
        for n, sample in enumerate(batch.samples.tolist()):  # type: ignore[union-attr]
            part = z[n] - x[n]
            rows.append(share[n] * part + (1 - share[n]) * before[n] if seen[sample] else part)
        moved = (x + torch.stack(rows)).clamp(x - eps, x + eps).clamp(0, 1)
        if code:
            before = moved - x
        made.append(moved)
    for sample, move in zip(batch.samples.tolist(), made[1] - x, strict=True):  # type: ignore[union-attr]
        memory[sample] = torch.tensor([round(v * 127 / eps) for v in move.flatten().tolist()]).view(3, 4, 4)
    for member in members:
        member.zero_grad()
    total = torch.zeros(()).double()
    means, logs = [], []
    for i, member in enumerate(members):
        clean = member(x).detach().softmax(1)
        z = member(made[1] if i == a else made[0] if i == b else made[int(unit("other", i) * 2)])
        p = z.softmax(1)
        mean = (clean + p) / 2
        target = mean if code else mean.detach()
        kl = [(target * (target.log() - view.log())).sum() / len(x) for view in (clean, p)]
        total = total + mean_loss(z, batch.labels) + 3.0 / 2 * (kl[0] + kl[1])
        means.append(mean.detach())
        logs.append((clean.log() + p.log()) / 2)
    for i, log in enumerate(logs):
        others = [(m * (m.log() - log)).sum() / len(x) for j, m in enumerate(means) if j != i]
        total = total - 0.05 * 3.0 * torch.stack(others).mean()
    return total


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("code", [False, True], ids=["paper", "code"])
def test_loss_gradients_statistics_and_memory_over_steps(n: int, code: bool) -> None:
    ensemble = Ensemble(smooth(key) for key in range(n)).train()
    eps = 0.1
    defense = Fasten(eps=eps, step_ratio=0.5, **(CODE if code else {"start_eps": eps}))
    state: dict[str, Tensor] = {}
    for step, samples in enumerate(([0, 1, 2, 3], [4, 2, 6, 0], [8, 6, 4, 2])):
        batch = replace(batch_of(step, samples), state=state)
        twin = copy.deepcopy(list(ensemble.members))
        kept = {name: value.clone() for name, value in state.items()}
        assert_same(defense, ensemble, batch, lambda members, batch: plain(members, batch, eps, code))
        plain(twin, replace(batch, state=kept), eps, code)
        for name, value in kept.items():
            assert torch.equal(state[name], value), name
        ensemble.zero_grad()
    assert [bool((each != -128).all()) for each in state["perturbation"]] == [n not in (5, 7) for n in range(9)]


def test_what_is_remembered_stays_in_the_ball_and_belongs_to_its_image() -> None:
    ensemble = Ensemble(smooth(key) for key in range(3)).train()
    state: dict[str, Tensor] = {}
    of_terms(Fasten(eps=0.1), ensemble, replace(batch_of(0, [5, 1]), state=state))
    first = state["perturbation"].clone()
    assert first[[1, 5]].abs().max() == 127
    assert first[[1, 5]].min() >= -127
    assert (first[[0, 2, 3, 4, 6, 7, 8]] == -128).all()
    of_terms(Fasten(eps=0.1), ensemble, replace(batch_of(1, [1, 7]), state=state))
    assert torch.equal(state["perturbation"][5], first[5])
    assert not torch.equal(state["perturbation"][1], first[1])


def test_the_memory_takes_a_byte_a_pixel_and_gives_back_what_was_written() -> None:
    batch = batch_of(0, [5, 1])
    moves = 0.2 * batch.images - 0.1
    nothing, seen = recall(batch, "moves", 0.1)
    assert not nothing.any()
    assert not seen.any()
    remember(batch, "moves", 0.1, moves)
    found, seen = recall(batch, "moves", 0.1)
    assert seen.all()
    assert (found - moves).abs().max() <= 0.1 / 254 + 1e-12
    assert [(each.dtype, each.numel()) for each in batch.state.values()] == [(torch.int8, 9 * 3 * 4 * 4)]


def test_every_member_is_chosen_and_never_the_same_twice() -> None:
    ensemble = Ensemble(smooth(key) for key in range(3)).train()
    pairs = {tuple(Fasten().departed(ensemble, batch_of(step, [0, 1]))[0]) for step in range(60)}
    assert pairs == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}


def test_passes_count_two_members_that_craft() -> None:
    assert Fasten(steps=3).passes(4) == 3.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": -1.0}, "`beta` of defense 'fasten' to be at least 0"),
        ({"repulsion": -1.0}, "`repulsion` of defense 'fasten' to be at least 0"),
        ({"start_eps": -1.0}, "`start_eps` of defense 'fasten' to be at least 0"),
        ({"eps": 0.0}, "`eps` of defense 'fasten'"),
        ({"steps": 0}, "`steps` of defense 'fasten'"),
    ],
)
def test_refuses_what_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(RobenchError, match=message):
        Fasten(**values)
