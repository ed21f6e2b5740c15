"""Models that draw at inference: attacked along means over draws, judged over draws, by both readings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench import Whitebox, evaluate
from robench.attacks.pgd import PGD
from robench.attacks.square import Square
from robench.core.data import Data, load, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.evaluation import cost
from robench.evaluation.cells import Cell
from robench.evaluation.craft import craft
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.predict import predict
from robench.evaluation.rows import FolderRows
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Queries, Threat, Transfer
from robench.reports import tables
from robench.studies import study
from robench.studies.summary import expectations
from robench.validity.probe import attack_again
from tests.small import assert_same_rows

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FAST = PGD(steps=3)
SAMPLES = torch.arange(24)

MakeModel = Callable[[int], EvaluatedModel]


class Noisy(nn.Module):
    """Images plus Gaussian noise."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images + self.sigma * torch.randn_like(images))
        return found


class Lottery(nn.Module):
    """A member drawn for every image."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        outputs = torch.stack([member(images) for member in self.members])
        return outputs[torch.randint(len(self.members), (len(images),)), torch.arange(len(images))]


def noisy(model: EvaluatedModel, sigma: float = 0.2) -> EvaluatedModel:
    members = [Noisy(member, sigma) for member in model.ensemble.members]
    return EvaluatedModel.of_model(members, CPU, name="noisy")


def run(data: Data, threat: Threat, target: EvaluatedModel, samples: Tensor = SAMPLES, **settings: Any) -> Outcomes:
    return Evaluator(data, Settings(CPU, **settings)).run([target], threat, samples)


# What several draws find


class Dropped(nn.Module):
    """A network that sees a tenth of the pixels, drawn anew for every image and pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(F.dropout(images, 0.9, training=True))
        return found


class Striped(nn.Module):
    """A network that sees one in four columns."""

    def __init__(self, net: nn.Module, first: int) -> None:
        super().__init__()
        self.net, self.first = net, first

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images[:, :, :, self.first :: 4])
        return found


def trained(model: nn.Module, data: Data) -> nn.Module:
    """The model after a few steps on digits, as it draws."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    images, labels = to_images(data.train.images), data.train.labels
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def network(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 48), nn.ReLU(), nn.Linear(48, 10))


def that_draws(kind: str, data: Data) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "dropped pixels":
            return trained(Dropped(network(64)), data)
        return Lottery([trained(Striped(network(16), first), data) for first in range(4)]).eval()


def expected(model: nn.Module, data: Data, draws: int, eps: float, count: int = 150) -> float:
    """Accuracy in expectation, over 60 draws, of images that were crafted along means over ``draws`` draws."""
    samples, labels = np.arange(count), data.test.labels[:count].numpy()
    images, radii = to_images(data.test.images[:count]), np.full(count, eps)
    made = craft(model, PGD(steps=5), images, labels, samples, radii, seed=0, restart=0, draws=draws)
    found = predict(Ensemble([model]), made.images, labels, draws=60, samples=samples)
    return float(found.expected[-1].mean())


@pytest.mark.parametrize("kind", ["dropped pixels", "a drawn member"])
def test_means_over_draws_find_what_one_draw_does_not(kind: str) -> None:
    """Measured at ε .12, in expectation: of 30.1 % right clean, one draw leaves 22.9 and twenty 10.6; of 75.6 % of an
    ensemble that draws a member, 48.1 and 13.7."""
    digits = load("digits")
    model = that_draws(kind, digits)
    one, twenty = (expected(model, digits, draws, 0.12) for draws in (1, 20))
    assert twenty < one - 0.1


# Rows


def test_rows_say_both_readings_and_all_or_nothing_is_the_accuracy(make_model: MakeModel, data: Data) -> None:
    target = noisy(make_model(0))
    threat = Whitebox(eps=(0.03, 0.1), attacks=(FAST,), restarts=2, draws=6)
    outcomes = run(data, threat, target)
    rows = outcomes.frame
    assert (rows["draws"] == 6).all()
    assert (rows["correct"] == (rows["expected"] == 1)).all()
    parts = rows["expected"] * 6
    np.testing.assert_allclose(parts, parts.round(), atol=1e-5)
    assert 0 < (parts.round() % 6 != 0).mean() < 1  # some draws disagree
    attacked = rows[rows["threat"] == "whitebox"].groupby("eps")
    found = outcomes.over_draws().set_index(["threat", "eps"])
    for eps, own in attacked:
        point = found.loc["whitebox", eps]
        assert point["every_draw"] == own["correct"].mean()
        assert point["expectation"] == pytest.approx(own["expected"].mean())
        assert point["every_draw"] < point["expectation"]
        assert point["low"] < point["expectation"] < point["high"]
    accuracy = outcomes.accuracy().set_index(["threat", "eps"])["accuracy"]
    assert accuracy.loc["whitebox", 0.03] == found.loc["whitebox", 0.03]["every_draw"]
    repeats = [check for check in outcomes.checks if check.name == "outputs repeat"]
    assert [check.status for check in repeats] == ["pass"]
    assert "over 6 draws" in repeats[0].evidence or "6 draws" in repeats[0].evidence


def test_verdicts_are_those_of_the_draws_one_by_one(make_model: MakeModel, data: Data) -> None:
    """Again by hand: the clean verdicts of every draw, from noise of the image's own keys."""
    from robench.core.drawn import row_key

    target = noisy(make_model(0))
    rows = run(data, Whitebox(eps=(0.1,), attacks=(FAST,), restarts=1, draws=5), target).frame
    clean = rows[rows["threat"] == "clean"].set_index("sample")["expected"]
    for sample in (0, 7, 23):
        image, label = to_images(data.test.images[sample : sample + 1]), int(data.test.labels[sample])
        right = 0
        for draw in range(5):
            probabilities = []
            for number, member in enumerate(make_model(0).ensemble.members):
                seed = row_key(("judge", draw), sample, number)
                noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    probabilities.append(member(image + 0.2 * noise).softmax(dim=1))
            right += int(torch.stack(probabilities).mean(dim=0).argmax()) == label
        assert clean[sample] == pytest.approx(right / 5)


@pytest.mark.parametrize("draws", [1, 3])
def test_batch_and_order_change_no_row_of_a_model_that_draws(make_model: MakeModel, data: Data, draws: int) -> None:
    target, surrogate = noisy(make_model(0)), replace(noisy(make_model(7)), name="drawing surrogate")
    few = (PGD(steps=2), Square(queries=3))
    how: dict[str, Any] = {"eps": (0.05, 0.1), "attacks": few, "restarts": 2, "draws": draws}
    for threat in (Whitebox(**how), Transfer(**how), Blackbox(**how, surrogates=(surrogate,))):
        whole = run(data, threat, target, SAMPLES[:9], precision="float64", batch_size=512).frame
        small = run(data, threat, target, SAMPLES[:9].flip(0), precision="float64", batch_size=4).frame
        assert_same_rows(whole, small, 1e-6)


def test_a_restart_counts_where_fewer_draws_survive_it(make_model: MakeModel, data: Data) -> None:
    target = noisy(make_model(0))
    parts = []
    for restarts in (1, 2, 3):
        rows = run(data, Whitebox(eps=(0.08,), attacks=(FAST,), restarts=restarts, draws=5), target).frame
        parts.append(rows[rows["threat"] == "whitebox"].set_index("sample"))
    for fewer, more in pairwise(parts):
        assert (more["expected"] <= fewer["expected"]).all()
        changed = more["expected"] < fewer["expected"]
        assert (more.loc[changed, "restart"] > fewer.loc[changed, "restart"]).all()
    assert (parts[2]["expected"] < parts[0]["expected"]).any()


# The rule that draws a member


def test_a_drawn_member_is_judged_over_draws_and_attacked_along_their_expectation(
    make_model: MakeModel, data: Data
) -> None:
    members = list(make_model(0).ensemble.members)
    target = EvaluatedModel.of_model(Ensemble(members, "random").eval(), CPU, name="drawn")
    one, many = (
        run(data, Whitebox(eps=(0.03,), attacks=(FAST,), restarts=1, draws=draws), target, torch.arange(40))
        for draws in (1, 300)
    )
    rows = many.frame[many.frame["threat"] == "clean"].set_index("sample")
    with torch.no_grad():
        logits = torch.stack([member(to_images(data.test.images)) for member in members])
    share = (logits.argmax(dim=-1) == data.test.labels).double().mean(dim=0)
    np.testing.assert_allclose(rows["expected"], share.numpy()[rows.index], atol=0.12)  # 300 draws
    assert (rows["correct"] == (share.numpy()[rows.index] == 1)).all()
    crafts = [{cell.craft.key for cell in each.cells.values() if cell.craft} for each in (one, many)]
    assert crafts[0] == crafts[1]  # the same images: their expectation is exact whatever the draws
    assert {cell.draws for cell in many.cells.values()} == {300}
    assert {cell.draws for cell in one.cells.values()} == {0}
    assert set(one.cells).isdisjoint(many.cells)


def test_what_draws_nothing_has_the_rows_that_it_had(make_model: MakeModel, data: Data) -> None:
    threats = [Whitebox(eps=(0.03,), attacks=(FAST,), restarts=1, draws=draws) for draws in (1, 20)]
    first, second = (run(data, threat, make_model(0)) for threat in threats)
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert (first.frame["draws"] == 1).all()
    assert second.over_draws().empty
    assert not expectations(second)
    assert all("draws" not in str(cell.recipe()) for cell in second.cells.values())


# Store, forecast, tables


def test_rows_of_draws_are_read_back_and_made_once(make_model: MakeModel, data: Data, tmp_path: Path) -> None:
    target = noisy(make_model(0))
    threat = Whitebox(eps=(0.05,), attacks=(FAST,), restarts=1, draws=3)
    whole = Evaluator(data, Settings(CPU), rows=lambda each: FolderRows(tmp_path / each.name)).run(
        [target], threat, SAMPLES
    )
    kept = FolderRows(tmp_path / "noisy")
    pd.testing.assert_frame_equal(kept.outcomes(target.identity).frame, whole.frame)
    for key in whole.cells:
        assert Cell.read(tmp_path / "noisy", key).draws == 3
    again = Evaluator(data, Settings(CPU), rows=lambda each: FolderRows(tmp_path / each.name))
    forecast = again.forecast([target], threat, SAMPLES, timed=False)
    assert sum(part.passes for part in forecast) == 0


def test_rows_of_before_are_of_one_draw(make_model: MakeModel, data: Data, tmp_path: Path) -> None:
    outcomes = run(data, Whitebox(eps=(0.05,), attacks=(FAST,), restarts=1), make_model(0))
    old = outcomes.frame.drop(columns=["expected", "draws"])
    pd.testing.assert_frame_equal(Outcomes(old).frame, outcomes.frame)


def test_a_forecast_counts_every_draw(make_model: MakeModel, data: Data) -> None:
    target = noisy(make_model(0))

    def passes(draws: int) -> float:
        threat = Whitebox(eps=(0.05,), attacks=(PGD(steps=60),), restarts=1, draws=draws)
        return sum(part.passes for part in Evaluator(data).forecast([target], threat, SAMPLES, timed=False))

    assert 9.5 < passes(10) / passes(1) <= 10
    still = Whitebox(eps=(0.05,), attacks=(FAST,), restarts=1, draws=10)
    first, second = (
        sum(each.passes for each in Evaluator(data).forecast([make_model(0)], threat, SAMPLES, timed=False))
        for threat in (still, still.model_copy(update={"draws": 1}))
    )
    assert first == second


def test_a_forecast_counts_every_draw_of_a_verdict(make_model: MakeModel, data: Data) -> None:
    """The surrogate draws nothing, so that an image is crafted once, and the target is asked ten times."""
    target, surrogate = noisy(make_model(0)), make_model(7)

    def passes(draws: int) -> float:
        threat = Blackbox(eps=(0.05,), attacks=(FAST,), restarts=1, draws=draws, surrogates=(surrogate,))
        return Evaluator(data).forecast([target], threat, SAMPLES, timed=False)[-1].passes

    assert passes(10) - passes(1) == pytest.approx(9 * len(SAMPLES) * target.n * cost.FORWARD)


def test_tables_and_lines_name_both_numbers(make_model: MakeModel, data: Data) -> None:
    target = noisy(make_model(0))
    threats = (
        Whitebox(eps=(0.05,), attacks=(FAST,), restarts=1, draws=4),
        Queries(eps=(0.05,), draws=4, attacks=(Square(queries=5),)),
    )
    outcomes = Outcomes.concat(run(data, threat, target) for threat in threats)
    points = tables.over_draws(outcomes.frame)
    assert points["threat"].tolist() == ["clean", "queries", "whitebox"]
    assert points["attack"].tolist() == ["", "square:queries=5", ""]
    headers = tables.over_draws_described(points).headers
    assert headers[-2:] == ["In every draw", "In expectation"]
    (clean, attacked) = expectations(outcomes)
    assert clean["eps"] == 0
    assert attacked["threat"] == "whitebox, in expectation over 4 draws"
    assert attacked["accuracy"] == pytest.approx(points["expectation"].iloc[2])
    assert "white-box, in expectation over 4 draws" in repr(outcomes)
    assert tables.over_draws(outcomes.frame.drop(columns=["expected", "draws"])).empty


def test_survivors_are_attacked_again_over_the_draws(make_model: MakeModel, data: Data) -> None:
    target = noisy(make_model(0), 0.05)
    threat = Whitebox(eps=(0.02,), attacks=(FAST,), restarts=1, draws=3)
    evaluator = Evaluator(data)
    outcomes = attack_again(evaluator, [target], threat, evaluator.run([target], threat, SAMPLES))
    assert any("survivors" in check.name for check in outcomes.checks)


# Wrong inputs


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", 20_000, None, float("nan"), (2, 3)])
def test_draws_that_are_no_count_are_refused_with_the_name(value: Any) -> None:
    with pytest.raises(RobenchError, match="draws") as error:
        Whitebox(eps=(0.1,), draws=value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0", '"20"', "2.5", "[5]"])
def test_a_study_names_the_field(value: str) -> None:
    text = (
        f'title = "t"\ndataset = "digits"\ndefenses = ["baseline"]\nsizes = [1]\n[threats.whitebox]\ndraws = {value}\n'
    )
    with pytest.raises(RobenchError, match=r"threats\.whitebox\.draws"):
        study.parse("own", text)


def test_an_attack_with_gradients_of_its_own_is_refused(make_model: MakeModel, data: Data) -> None:
    class Alone(PGD):
        over_draws = False

    threat = Whitebox(eps=(0.1,), attacks=(Alone(steps=2),), draws=5)
    with pytest.raises(
        RobenchError, match=r"noisy draws at inference, and `draws` does not reach attack 'pgd:steps=2'"
    ):
        run(data, threat, noisy(make_model(0)))
    run(data, threat, make_model(0))  # nothing is drawn: no matter
    with pytest.warns(Warning, match="--draws 20"):
        evaluate(noisy(make_model(0)), data, Whitebox(eps=(0.1,), attacks=(FAST,), restarts=1), samples=10)
