"""A harder attack tells a masked model from a sound one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import robench
from robench.attacks import Attack
from robench.attacks.ascent import ascend
from robench.attacks.pgd import PGD
from robench.attacks.square import Square
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.logs import Lines, logged
from robench.core.rng import Draws
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding, failed
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Convergence, Queries, Threat, Transfer, Whitebox
from robench.validity import probe as module
from robench.validity.probe import SignNoise, probe
from tests.small import Rounds

CPU = torch.device("cpu")
MakeModel = Callable[[int], EvaluatedModel]

SQUARE, TARGETED, MEMBERS = module.SQUARE, module.TARGETED, module.MEMBERS
NAMES = {"a large ε takes all", "noise does not beat it", SQUARE, TARGETED, MEMBERS, "more effort changes nothing"}


def probed(
    data: Data, target: EvaluatedModel, attack: Attack, eps: tuple[float, ...], **options: int
) -> dict[str, Finding]:
    settings = Settings(CPU)
    outcomes = Evaluator(data, settings).run(
        [target], Whitebox(eps=eps, attacks=(attack,), restarts=2), torch.arange(40)
    )
    lines: list[str] = []
    with logged(Lines(lines)):
        checks = probe(target, outcomes, data, [attack], 2, settings, **options)
    assert len(lines) == 1
    assert "at most" in lines[0]
    return {check.name: check for check in checks}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("QUERIES", 100), ("OTHER_STEPS", 10), ("DRAWS", 20)):
        monkeypatch.setattr(module, name, few)


def test_a_sound_attack_stands(make_model: MakeModel, data: Data) -> None:
    checks = probed(data, make_model(0), PGD(steps=20), (0.01, 0.02, 0.1), limit=6)
    assert set(checks) == NAMES
    assert not failed(checks.values()), list(map(str, checks.values()))


def test_a_defense_without_gradients_is_beaten_by_noise_and_square(make_model: MakeModel, data: Data) -> None:
    target = EvaluatedModel.of_model(Rounds(make_model(0).ensemble, 32), CPU)
    checks = probed(data, target, PGD(steps=2, random_start=False), (0.1,))
    failing = {name for name, check in checks.items() if check.status == "fail"}
    # Without a gradient, ten times the steps are as good as none; APGD's random start is better.
    assert failing == NAMES - {MEMBERS, "more effort changes nothing"}  # it is one model
    assert "points of accuracy" in checks["noise does not beat it"].evidence


def test_too_few_steps_are_found(make_model: MakeModel, data: Data) -> None:
    checks = probed(data, make_model(0), PGD(steps=1, step_ratio=0.2, random_start=False), (0.03,))
    assert checks["more effort changes nothing"].status == "fail"
    assert "--steps 10" in checks["more effort changes nothing"].evidence


@dataclass(frozen=True, kw_only=True)
class OneWay(PGD):
    """Looks at one wrong class alone: the next number."""

    name: ClassVar[str] = "one-way"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        def gap(z: Tensor, step: int) -> Tensor:
            logits = model(z)
            rows = torch.arange(len(labels))
            return logits[rows, (labels + 1) % logits.shape[1]] - logits[rows, labels]

        return ascend(gap, images, eps, steps=self.steps, step_ratio=self.step_ratio)


def test_a_loss_that_misses_classes_is_found_by_targets(make_model: MakeModel, data: Data) -> None:
    checks = probed(data, make_model(0), OneWay(steps=10), (0.03,), limit=12)
    assert checks["more effort changes nothing"].status == "pass"
    assert checks[TARGETED].status == "fail"
    assert "--attacks apgd:steps=10:objective=dlr:targets=3 " in checks[TARGETED].evidence


def test_a_single_network_of_three_classes_is_attacked_as_it_can_be() -> None:
    trials, skipped = module._trials(PGD(), 0.03, 5, members=1, classes=3)
    assert not skipped
    assert {trial.name for trial in trials} == NAMES - {MEMBERS}
    (targeted,) = (trial.attack for trial in trials if trial.name == TARGETED)
    assert targeted.label == "apgd:steps=10"
    assert targeted.loss == "cw"


def test_by_default_the_result_had_the_protocols_restarts(make_model: MakeModel, data: Data) -> None:
    target, attack = make_model(0), PGD(steps=1)
    outcomes = Evaluator(data).run([target], Whitebox(eps=(0.02,), attacks=(attack,)), torch.arange(8))
    found = {check.name: check.evidence for check in probe(target, outcomes, data, [attack], limit=1)}
    assert "pgd:steps=10 in 10 tries takes" in found["more effort changes nothing"]


def test_where_nothing_survives_there_is_nothing_to_probe(make_model: MakeModel, data: Data) -> None:
    target, attack = make_model(0), PGD(steps=10)
    outcomes = Evaluator(data).run([target], Whitebox(eps=(0.5,), attacks=(attack,)), torch.arange(8))
    assert [str(check) for check in probe(target, outcomes, data, [attack])] == [
        "pass  probe: nothing of model0 survives, so that there is nothing to probe"
    ]


def test_sign_noise_is_a_corner_of_the_ball() -> None:
    images = torch.full((2, 1, 4, 4), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    crafted = SignNoise()(model, images, torch.tensor([0, 1]), 0.1, Draws.of([3, 4]))
    torch.testing.assert_close((crafted.images - images).abs(), torch.full_like(images, 0.1))
    other = SignNoise()(model, images, torch.tensor([0, 1]), 0.1, Draws.of([3, 4], restart=1))
    assert not torch.equal(crafted.images, other.images)
    with pytest.raises(RobenchError, match="eps"):
        SignNoise()(model, images, torch.tensor([0, 1]), 2.0)


class Votes(nn.Module):
    """Says the class, and nothing of how near the others are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).float()


class Remote(Votes):
    """Logits from elsewhere."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.model(images).detach().numpy())


@pytest.mark.filterwarnings("ignore::robench.DoubtWarning")
@pytest.mark.parametrize("kind", [Votes, Remote])
def test_a_model_without_a_gradient_is_judged_by_queries_and_on_surrogates(
    kind: type[Votes], make_model: MakeModel, data: Data
) -> None:
    model = kind(make_model(0).ensemble)
    square, eps = Square(queries=30), (0.1,)
    for threat in (
        Whitebox(eps=eps, attacks=(square,), restarts=1),
        Queries(eps=eps, attacks=(square,)),
        Blackbox(eps=eps, attacks=(PGD(steps=3),), restarts=1, surrogates=(make_model(7),)),
    ):
        found = robench.evaluate(model, data, threat, samples=24)
        assert 0 < found.accuracy()["accuracy"].min() < 1, threat.name
        assert "gradient true" not in [check.name for check in found.checks], "no attack followed it"


@pytest.mark.parametrize("threat", [Whitebox, Convergence, Transfer])
def test_gradient_attacks_are_refused_before_anything_is_crafted(
    threat: type[Threat], make_model: MakeModel, data: Data
) -> None:
    target = EvaluatedModel.of_model(Votes(make_model(0).ensemble), CPU, name="votes")
    evaluator = Evaluator(data, Settings(CPU))
    with pytest.raises(RobenchError, match=r"'pgd' of threat .*, and votes gives none.*--threat queries.*--attacks"):
        evaluator.run([target], threat(eps=(0.1,), attacks=(Square(queries=2), PGD())), torch.arange(8))
    surrogate = Blackbox(eps=(0.1,), attacks=(PGD(),), surrogates=(target,))
    with pytest.raises(RobenchError, match=r"votes gives none.*choose another surrogate"):
        evaluator.run([make_model(7)], surrogate, torch.arange(8))


@pytest.mark.filterwarnings("ignore::robench.DoubtWarning")
def test_one_member_with_a_gradient_is_enough(make_model: MakeModel, data: Data) -> None:
    members = make_model(0).ensemble.members
    mixed = [members[0], Remote(members[1])]
    found = robench.evaluate(mixed, data, Whitebox(eps=(0.1,), attacks=(PGD(steps=3),), restarts=1), samples=24)
    assert found.accuracy()["accuracy"].min() < 1
