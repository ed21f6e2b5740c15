"""False numbers that the evaluator must notice while it measures: of a copy, a surrogate, outputs of any size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import robench
from robench.attacks.pgd import PGD
from robench.core.data import Data, Split, to_images
from robench.core.errors import DoubtWarning, RobenchError
from robench.core.logs import Lines, logged
from robench.evaluation.cost import AROUND
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.rows import FolderRows
from robench.evaluation.threats import Blackbox, Threat, Whitebox
from tests import small

CPU = torch.device("cpu")
SAMPLES = torch.arange(40)
WHITE = Whitebox(eps=(0.02, 0.05), attacks=(PGD(steps=10),), restarts=2)
MakeModel = Callable[[int], EvaluatedModel]


def judged(
    data: Data, model: nn.Module | EvaluatedModel, threat: Threat = WHITE, samples: Tensor = SAMPLES
) -> tuple[Outcomes, list[str]]:
    lines: list[str] = []
    target = model if isinstance(model, EvaluatedModel) else EvaluatedModel.of_model(model, CPU)
    with logged(Lines(lines)):
        return Evaluator(data).run([target], threat, samples), lines


def verdicts(outcomes: Outcomes) -> pd.DataFrame:
    frame = outcomes.where(threat="whitebox").frame
    return frame.set_index(["eps", "sample"])[["prediction", "correct", "restart"]]


class Branch(nn.Module):
    """One function, whichever of two equal BatchNorms an image takes: bright ones take the second."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 64, 4)
        self.first.running_mean, self.first.running_var = torch.rand(8), torch.rand(8) + 0.2
        self.second = copy.deepcopy(self.first)
        self.branches = branches

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        # Of clean noise, the sum of the first image decides; an attack moves it to the other side.
        other = self.branches and bool((images * 255 - (images * 255).round()).abs().max() > 1e-3)
        # Nothing was learnt, and it is as sure as if it had been.
        return 30 * self.head((self.second if other else self.first)(features).relu().flatten(1))  # type: ignore[no-any-return]


def test_a_copy_that_is_another_function_on_crafted_images_is_not_attacked(data: Data) -> None:
    sound, said = judged(data, Branch(branches=False))
    assert said == []
    found, lines = judged(data, Branch(branches=True))
    pd.testing.assert_frame_equal(verdicts(found), verdicts(sound))
    (line,) = lines
    assert line.startswith("the faster copy of model is another function (outputs differ by ")


class Copied(nn.Module):
    """What a test does to copies."""

    def __init__(self, model: nn.Module, spoil: Callable[[nn.Module], nn.Module], left: int) -> None:
        super().__init__()
        self.model, self.spoil, self.left = model, spoil, left

    def __deepcopy__(self, memo: Any) -> nn.Module:
        if self.left == 0:
            return Copied(copy.deepcopy(self.model), self.spoil, 0)
        return Copied(self.spoil(copy.deepcopy(self.model)), self.spoil, self.left - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


class Misled(nn.Module):
    """The same outputs, and a gradient of something else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        other = self.model(images.roll(3, -1))
        return other + (self.model(images) - other).detach()  # type: ignore[no-any-return]


def scaled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def test_a_copy_that_differs_at_every_image_is_an_error(make_model: MakeModel, data: Data) -> None:
    with pytest.raises(RobenchError, match="model is another function where it is attacked than where it is judged"):
        judged(data, Copied(make_model(0).ensemble, scaled, 99))


def test_the_gradient_of_the_copy_is_compared_too(
    make_model: MakeModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robench.evaluation import crafter

    original = crafter.attackable

    def misled(model: nn.Module, *arguments: Any, plain: bool = False) -> nn.Module:
        made = original(model, *arguments, plain=plain)
        return made if plain else Misled(made)

    sound, _ = judged(data, make_model(0))
    monkeypatch.setattr(crafter, "attackable", misled)
    found, (line,) = judged(data, make_model(0))
    assert "gradients have a cosine of" in line
    pd.testing.assert_frame_equal(verdicts(found), verdicts(sound))


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.model(images)  # type: ignore[no-any-return]


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3])
def test_outputs_of_any_size_are_judged_alike(make_model: MakeModel, data: Data, factor: float) -> None:
    member = make_model(0).ensemble.members[0]
    usual, _ = judged(data, Scaled(member, 1))
    found, _ = judged(data, Scaled(member, factor))
    clean = [each.where(threat="clean").frame["prediction"].tolist() for each in (usual, found)]
    assert clean[0] == clean[1]
    accuracies = [each.where(threat="whitebox").accuracy(["eps"])["accuracy"] for each in (usual, found)]
    np.testing.assert_allclose(accuracies[1], accuracies[0], atol=0.1)


def test_where_cross_entropy_is_blind_cw_is_attacked_with_too(make_model: MakeModel, data: Data) -> None:
    member = make_model(0).ensemble.members[0]
    usual, _ = judged(data, Scaled(member, 1))
    found, lines = judged(data, Scaled(member, 1e7))
    assert lines == ["the outputs of model are so large that cross-entropy has no gradient: attacking with CW too"]
    assert set(found.where(threat="whitebox").frame["loss"]) == {"ce", "cw"}
    accuracies = [each.where(threat="whitebox").accuracy(["eps"])["accuracy"] for each in (usual, found)]
    assert (accuracies[1] <= accuracies[0] + 0.05).all()
    assert [check.status for check in found.checks if check.name == "cross-entropy sees"] == ["warn"]


def test_a_target_that_needs_cw_changes_no_rows_of_another(make_model: MakeModel, data: Data) -> None:
    member = make_model(0).ensemble.members[0]
    other, blind = (EvaluatedModel.of_model(Scaled(member, by), CPU, name=f"by {by:g}") for by in (1, 1e7))
    alone, together = (Evaluator(data).run(targets, WHITE, SAMPLES).frame for targets in ([other], [other, blind]))
    rows = together.groupby("target")
    pd.testing.assert_frame_equal(rows.get_group(other.name).reset_index(drop=True), alone)
    assert set(rows.get_group(blind.name)["loss"]) == {"", "ce", "cw"}


class Nearest(nn.Module):
    """Knows the data by heart, without a weight in common with anyone."""

    def __init__(self, data: Data, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", data.test.images.flatten(1).float() / 255)
        self.register_buffer("classes", nn.functional.one_hot(labels, 4).float())

    def forward(self, images: Tensor) -> Tensor:
        distance = torch.cdist(images.flatten(1), self.get_buffer("images"))
        return (-4 * distance).softmax(dim=1) @ self.get_buffer("classes")


def surrogate_check(data: Data, target: EvaluatedModel, labels: Tensor, samples: Tensor = SAMPLES) -> Finding:
    surrogate = EvaluatedModel.of_model(Nearest(data, labels), CPU, name="source")
    threat = Blackbox(eps=(0.1,), attacks=(PGD(steps=10),), restarts=1, surrogates=(surrogate,))
    outcomes, _ = judged(data, target, threat, samples)
    assert set(outcomes.frame["threat"]) == {"clean", "blackbox"}, "a surrogate's own rows are no result"
    (check,) = (check for check in outcomes.checks if check.name == "surrogate source")
    return check


def test_a_surrogate_is_judged_beside_what_it_took(make_model: MakeModel, data: Data) -> None:
    labels = data.test.labels
    check = surrogate_check(data, make_model(0), labels)
    assert check.status == "pass"
    assert check.evidence.startswith(
        "source gets 100.0% of 40 images right; what was crafted on it at ε 0.1 fools itself"
    )
    renamed = surrogate_check(data, make_model(0), (labels + 1) % 4)
    assert renamed.status == "fail"
    assert "it knows no more of the data than chance, 25.0%, so that this is no black-box result" in renamed.evidence
    weak = torch.where(torch.arange(40) % 3 == 0, labels, (labels + 1) % 4)
    weak[::2] = labels[::2]
    warned = surrogate_check(data, make_model(0), weak)
    assert warned.status == "warn"
    assert "a weak attacker makes a target look robust" in warned.evidence


def test_members_that_the_average_hides_are_attacked_by_themselves(data: Data) -> None:
    one, two, three = small.ensemble(0, 3).members
    model = [one, Scaled(two, 30), Scaled(three, 30)]
    with torch.no_grad():
        images = to_images(data.test.images)
        labels = torch.stack([member(images).softmax(dim=1) for member in model]).mean(dim=0).argmax(dim=1)
    own = replace(data, test=replace(data.test, labels=labels), fingerprint="as the three see them")
    threat = Whitebox(eps=(0.1,), attacks=(PGD(steps=10),), restarts=1)
    with pytest.warns(DoubtWarning, match="survivors attacked again: .*what takes most here, mora:steps=20:targets=0"):
        outcomes = robench.evaluate(model, own, threat, samples=40)
    (found,) = (check for check in outcomes.checks if check.name == "survivors attacked again")
    assert found.status == "fail"


class Clamped(Scaled):
    """A model that sees no pixel below .05: there an attack has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.clamp(min=0.05))


@pytest.mark.parametrize("kind", [Clamped, Scaled])
@pytest.mark.filterwarnings("ignore::robench.DoubtWarning")
def test_survivors_behind_a_clamp_fall_to_gradients_from_around_them(kind: type[Scaled], data: Data) -> None:
    model = kind(small.ensemble(0).members[0], 1)
    dark = (data.test.images * 0.03).to(torch.uint8)
    with torch.no_grad():
        labels = model(to_images(dark)).argmax(dim=1)
    night = replace(data, test=Split(dark, labels), fingerprint="dark")
    outcomes = robench.evaluate(model, night, Whitebox(eps=(0.1,), restarts=1), samples=40)
    (found,) = (check for check in outcomes.checks if check.name == "survivors attacked again")
    assert found.status == ("fail" if kind is Clamped else "pass")
    assert found.evidence.endswith(f"what takes most here, {AROUND.label}") == (kind is Clamped)


def test_what_is_kept_of_a_sample_is_of_all_that_reports_count(
    make_model: MakeModel, data: Data, tmp_path: Path
) -> None:
    ordered = replace(data, test=replace(data.test, labels=torch.arange(40) // 10), fingerprint="ordered by class")
    evaluator = Evaluator(ordered, rows=lambda model: FolderRows(tmp_path))
    target = make_model(0)

    def said(samples: Tensor) -> list[str]:
        made = evaluator.run([target], WHITE, samples).checks
        kept = FolderRows(tmp_path).outcomes(target.identity).checks
        return [check.status for check in (*made, *kept) if check.name == "sample stands for the data"]

    assert said(torch.arange(10)) == ["fail", "fail"]
    assert said(torch.arange(3, 40, 7)) == ["pass", "warn"], "ten of the sixteen are of one class"


def test_an_image_that_is_there_many_times_is_said(make_model: MakeModel, data: Data) -> None:
    again = replace(data, test=Split(*(each[torch.arange(40) // 4] for each in (data.test.images, data.test.labels))))
    outcomes, _ = judged(replace(again, fingerprint="four times each"), make_model(0))
    (found,) = (check for check in outcomes.checks if check.name == "sample stands for the data")
    assert found.status == "warn"
    assert "30 of them are there before" in found.evidence


def test_a_test_image_that_is_a_training_image_is_said(make_model: MakeModel, data: Data) -> None:
    same = replace(data, train=data.test, fingerprint="one set for both")
    outcomes, _ = judged(same, make_model(0))
    (found,) = (check for check in outcomes.checks if check.name == "sample stands for the data")
    assert found.status == "warn"
    assert "40 of them are training images too" in found.evidence
    assert same.unseen(torch.arange(40)).tolist() == []
    assert data.unseen(torch.arange(40)).tolist() == list(range(40))


def test_from_python_what_does_not_pass_is_a_warning(data: Data, make_model: MakeModel) -> None:
    untrained = make_model(3).ensemble
    with pytest.warns(DoubtWarning, match="clean above chance"):
        outcomes = robench.evaluate(untrained, data, WHITE)
    assert {check.name for check in outcomes.checks} >= {"rows possible", "survivors attacked again", "gradient true"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = Whitebox(eps=(0.02, 0.05), attacks=(PGD(), PGD(loss="cw")))
        sound = robench.evaluate(make_model(0).ensemble, data, both)
    assert {check.status for check in sound.checks} == {"pass"}


def test_what_draws_is_said_and_its_verdicts_do_not_hang_on_torch_s_seed(make_model: MakeModel, data: Data) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(0).ensemble

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images + 0.2 * torch.rand_like(images))  # type: ignore[no-any-return]

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outcomes, _ = judged(data, Noisy())
        assert [check.status for check in outcomes.checks if check.name == "outputs repeat"] == ["fail"]
        found.append(outcomes.frame)
    pd.testing.assert_frame_equal(*found)
