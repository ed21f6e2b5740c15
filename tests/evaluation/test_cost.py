"""What is forecast is what is done: passes of a real run, counted in the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.attacks import distill
from robench.attacks.fgsm import FGSM
from robench.attacks.mdi2 import MDI2
from robench.attacks.members import Members
from robench.attacks.pgd import PGD
from robench.attacks.sgm import SGM
from robench.attacks.square import Square
from robench.core.data import Data, load
from robench.core.features import features
from robench.core.files import read_hashed
from robench.core.models import Normalized
from robench.defenses import DEFENSES
from robench.evaluation import cost, crafter, engine
from robench.evaluation.attacked import AttackedModel
from robench.evaluation.diversity import diversity
from robench.evaluation.engine import Evaluator, correct_for_all
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.images import Images
from robench.evaluation.rows import FolderRows
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Convergence, Threat, Transfer, Whitebox
from robench.store.runs import Runs
from robench.training.loop import ensure
from robench.training.task import resolve
from robench.validity.probe import attack_again

CPU = torch.device("cpu")
FEW = torch.arange(24)

MakeModel = Callable[[int], EvaluatedModel]


class Counter:
    """Passes of one image through one member: with a gradient one, without a third."""

    def __init__(self) -> None:
        self.passes = 0.0
        self.counts = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what goes through every network but where a model, or the copy that is attacked, is examined."""
    made = Counter()
    forward = Normalized.forward

    def counted(self: Normalized, images: Tensor) -> Tensor:
        if made.counts:
            learns = torch.is_grad_enabled() and (images.requires_grad or self.training)
            made.passes += len(images) * (1 if learns else cost.FORWARD)
        return forward(self, images)

    def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with made.paused():
                return function(*args, **kwargs)

        return called

    def part(model: nn.Module, images: Tensor, layer: int) -> Tensor:
        made.passes += len(images) * (1 if torch.is_grad_enabled() else cost.FORWARD)
        return features(model, images, layer)

    monkeypatch.setattr(Normalized, "forward", counted)
    monkeypatch.setattr(distill, "features", part)
    for module, name in ((engine, "examine"), (engine, "changed"), (crafter, "attackable")):
        monkeypatch.setattr(module, name, quiet(getattr(module, name)))
    monkeypatch.setattr(AttackedModel, "_alike", quiet(AttackedModel._alike))
    return made


def threats(make_model: MakeModel, eps: float) -> dict[str, Threat]:
    steps = PGD(steps=3)
    several = (PGD(steps=3, momentum=1.0), MDI2(steps=2), SGM(steps=2, loss="cw"), Square(queries=5))
    return {
        "whitebox": Whitebox(eps=(eps, 2 * eps), attacks=(steps, Square(queries=5)), restarts=3),
        "member by member": Whitebox(
            eps=(eps, 2 * eps), attacks=(steps, Members(steps=3), Square(queries=5)), restarts=3
        ),
        "convergence": Convergence(eps=(eps,), attacks=(FGSM(), steps)),
        "transfer": Transfer(eps=(eps,), attacks=(steps,), restarts=2),
        "blackbox": Blackbox(
            eps=(eps, 2 * eps), attacks=several, restarts=2, surrogates=(make_model(7), make_model(8))
        ),
    }


def measured(
    evaluator: Evaluator, target: EvaluatedModel, data: Data, threat: Threat, counter: Counter
) -> tuple[float, float]:
    """Passes that are forecast, and passes that are done."""

    def right(target: EvaluatedModel) -> Tensor:
        return correct_for_all(target, data, data.order("first"), 16, CPU)

    samples = right if isinstance(threat, Transfer) else FEW
    forecast = sum(part.passes for part in evaluator.forecast([target], threat, samples, again=True, timed=False))
    counter.passes = 0.0
    attack_again(evaluator, [target], threat, evaluator.run([target], threat, samples))
    return forecast, counter.passes


@pytest.mark.parametrize("name", ["member by member", "convergence", "transfer", "blackbox"])
def test_the_forecast_is_exact_where_no_image_falls_early(
    make_model: MakeModel, data: Data, counter: Counter, name: str
) -> None:
    threat = threats(make_model, 1e-6)[name]
    forecast, done = measured(Evaluator(data, Settings(CPU)), make_model(0), data, threat, counter)
    assert done == pytest.approx(forecast)


def test_of_mora_on_survivors_the_forecast_is_a_near_upper_bound(
    make_model: MakeModel, data: Data, counter: Counter
) -> None:
    threat = Whitebox(eps=(1e-6,), attacks=(PGD(steps=3),), restarts=1)
    forecast, done = measured(Evaluator(data, Settings(CPU)), make_model(0), data, threat, counter)
    assert 0.98 * forecast < done <= forecast


@pytest.mark.parametrize("name", ["whitebox", "transfer"])
def test_the_forecast_is_an_upper_bound_where_images_fall(
    make_model: MakeModel, data: Data, counter: Counter, name: str
) -> None:
    threat = threats(make_model, 0.2)[name]
    forecast, done = measured(Evaluator(data, Settings(CPU)), make_model(0), data, threat, counter)
    # Of a white-box result hardly an image is left to be attacked again.
    assert forecast / 5 < done < 0.98 * forecast


def test_black_box_is_exact_however_many_fall_and_counts_what_is_missing_alone(
    make_model: MakeModel, data: Data, counter: Counter, tmp_path: Path
) -> None:
    """The second target crafts nothing, the first again nothing at all."""
    threat = threats(make_model, 0.1)["blackbox"]

    def fresh() -> Evaluator:
        folders = [lambda model, at=at: FolderRows(tmp_path / at / model.name) for at in ("rows", "aside")]
        return Evaluator(data, Settings(CPU), rows=folders[0], aside=folders[1], images=Images(tmp_path / "images"))

    first = fresh().forecast([make_model(0)], threat, FEW, timed=False)
    forecast, done = measured(fresh(), make_model(0), data, threat, counter)
    assert done == pytest.approx(forecast)
    parts = (tmp_path / "images").glob("*/part*")
    kept = sum(tensors["images"].nbytes for tensors in (read_hashed(part)[0] for part in parts))
    assert sum(part.disk for part in first) == kept > 0
    second, done = measured(fresh(), make_model(1), data, threat, counter)
    assert done == pytest.approx(second)
    assert second < 0.2 * forecast
    assert measured(fresh(), make_model(0), data, threat, counter) == (0, 0)


def test_progress_ends_at_the_forecast(make_model: MakeModel, data: Data) -> None:
    told: list[tuple[int, int]] = []
    threat = threats(make_model, 0.03)["whitebox"]
    evaluator = Evaluator(data, Settings(CPU), progress=lambda done, total, what: told.append((done, total)))
    parts = evaluator.forecast([make_model(0)], threat, FEW, timed=False)
    evaluator.run([make_model(0)], threat, FEW)
    total = round(sum(part.passes for part in parts if part.cells))
    assert told[-1] == (total, total)
    assert {each for _, each in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(("defense", "exact"), [("baseline", True), ("advt", True), ("dverge", False)])
def test_a_training_takes_the_passes_that_are_forecast(
    tmp_path: Path, counter: Counter, defense: str, exact: bool
) -> None:
    """DVERGE's distillation ends at a layer: its passes are no more than whole ones."""
    data = load("digits")
    data = replace(data, train=replace(data.train, images=data.train.images[:70], labels=data.train.labels[:70]))
    task = resolve(data, defense, 2, init="scratch", overrides={"epochs": "2", "batch_size": "32", "steps": "2"}
                   if defense != "baseline" else {"epochs": "2", "batch_size": "32"})  # fmt: skip
    ensure(task, data, Runs(tmp_path), device=CPU)
    forecast = cost.training(DEFENSES.get(defense)(**({} if defense == "baseline" else {"steps": 2})), 2, 70, 2, 32)
    # Two images say whether each architecture takes them, and two more its layout.
    fixed = (2 + 2 * 2) * cost.FORWARD
    assert counter.passes - fixed == pytest.approx(forecast, rel=0.01 if exact else 0.5)


def test_the_diversity_takes_no_more_than_is_forecast(make_model: MakeModel, data: Data, counter: Counter) -> None:
    images, labels = data.test.images[:20].float() / 255, data.test.labels[:20]
    diversity(make_model(0).ensemble, images, labels, eps=0.05, steps=3)
    forecast = cost.diversity(2, 20, 3, 0)
    assert 0.5 * forecast < counter.passes <= forecast + 2


def test_seconds_are_passes_times_what_a_pass_takes(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    parts = Evaluator(data, Settings(CPU)).forecast([target], threats(make_model, 0.03)["whitebox"], FEW, again=True)
    paces = {round(part.seconds / part.passes, 12) for part in parts}
    assert len(paces) == 1
    assert 1e-6 < paces.pop() < 0.1
