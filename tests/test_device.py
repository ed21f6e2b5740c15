"""What only a GPU can show, with real tensors: it computes what the CPU computes, up to rounding.

Skipped where there is none; ``ROBENCH_TEST_DEVICE=cpu`` runs them on the CPU all the same, which tests the tests alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import robench
from robench.attacks import ATTACKS
from robench.attacks.base import images_of
from robench.core.data import Data, load, to_images
from robench.core.ensemble import Ensemble
from robench.core.fast import Precision, attackable, compiled, has_bfloat16
from robench.core.frozen import full_float32
from robench.core.losses import LOSSES
from robench.core.models import ModelSpec, build
from robench.core.rng import Draws, Stream
from robench.defenses import DEFENSES
from robench.evaluation.settings import Settings
from robench.session import Session
from robench.store.runs import Run, Runs
from robench.training.batches import batches
from robench.training.compiling import compiled_if_same
from robench.training.loop import ensure, make_optimizer, train_step
from robench.training.task import Task, resolve

pytestmark = pytest.mark.gpu

NAME = os.environ.get("ROBENCH_TEST_DEVICE", "cuda")
SPEC = ModelSpec(name="resnet20", num_classes=10, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
OWN = [name for name in ATTACKS.names() if not ATTACKS.get(name).batch_dependent and name != "autoattack"]
IMAGES = Stream(("device",)).uniform((16, 3, 32, 32), "images")
LABELS = torch.arange(16) % 10


@pytest.fixture(scope="module")
def device() -> torch.device:
    if NAME == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is false")
    return torch.device(NAME, torch.cuda.current_device()) if NAME == "cuda" else torch.device(NAME)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def run(digits: Data, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Baseline/2, trained on the device."""
    task = resolve(digits, "baseline", 2, models=["resnet8"], overrides={"epochs": 4})
    return ensure(task, digits, Runs(tmp_path_factory.mktemp("runs")), device=device)


def networks(count: int = 2) -> Ensemble:
    return Ensemble(build(SPEC, key) for key in range(count))


def steps(name: str, device: torch.device, digits: Data, **overrides: Any) -> list[float]:
    """The losses of three steps of ResNet-8s, from the same weights and images on every device."""
    task = resolve(digits, name, 2, models=["resnet8"], overrides={"batch_size": 64, **overrides})
    ensemble = Ensemble(build(member, key) for key, member in enumerate(task.members)).to(device).train()
    optimizer = make_optimizer(task.recipe, ensemble)
    source = batches(digits.train.to(device), task.recipe, Stream(("device",)), 0, task.defense.paired)
    with full_float32():
        return [float(sum(train_step(ensemble, optimizer, task, next(source)).values())) for _ in range(3)]


@pytest.mark.parametrize("name", DEFENSES.names())
def test_three_steps_of_training_have_the_losses_of_the_cpu(name: str, device: torch.device, digits: Data) -> None:
    found, wanted = steps(name, device, digits), steps(name, torch.device("cpu"), digits)
    assert found == pytest.approx(wanted, rel=0.02), "crafted images follow the sign of small gradients"
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES.names())
@pytest.mark.parametrize("name", OWN)
def test_an_attack_crafts_what_the_cpu_crafts(name: str, loss: str, device: torch.device) -> None:
    kind = ATTACKS.get(name)
    fewer = {key: 3 for key in ("steps", "queries") if hasattr(kind, key)}
    attack = kind(loss=loss, **fewer)
    crafted = []
    for where in (torch.device("cpu"), device):
        model = attackable(networks().eval().to(where), IMAGES.to(where), "float32")
        eps = torch.full((len(IMAGES),), 0.03, device=where)
        with full_float32():
            found = attack.perturb(model, IMAGES.to(where), LABELS.to(where), eps, Draws.of(range(len(IMAGES))))
        crafted.append(images_of(found).cpu())
    assert float((crafted[1] - IMAGES).abs().max()) <= 0.03 + 1e-6
    same = float(((crafted[0] - crafted[1]).abs() < 1e-4).float().mean())
    assert same > 0.97, f"{same:.1%} of pixels agree"


def test_float32_is_not_shortened(device: torch.device) -> None:
    with full_float32(), torch.no_grad():
        wanted = networks(1).eval().double()(IMAGES.double())
        found = networks(1).eval().to(device)(IMAGES.to(device))
    assert float((found.cpu() - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())  # TF32: some 1e-3


def test_draws_are_those_of_the_cpu(device: torch.device) -> None:
    draws = Draws.of(range(4), restart=1)
    there = draws.uniform("start", (3, 8, 8), torch.empty(0, device=device))
    assert torch.equal(there.cpu(), draws.uniform("start", (3, 8, 8), torch.empty(0)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_verdicts_are_those_of_the_cpu(run: Run, digits: Data, device: torch.device, precision: Precision) -> None:
    if precision == "bfloat16" and not has_bfloat16(device):
        pytest.skip(f"{device} does not compute bfloat16")
    threat = robench.Whitebox(eps=(0.05, 0.1), restarts=2, attacks=(ATTACKS.get("pgd")(steps=10),))
    scores = []
    for where, kind in ((torch.device("cpu"), "float32"), (device, precision)):
        how: Any = {"samples": 100, "device": where, "precision": kind}
        outcomes = robench.evaluate(list(run.load().members), digits, threat, **how)
        scores.append(outcomes.accuracy()["accuracy"].to_numpy())
    assert abs(scores[0] - scores[1]).max() <= 0.03, scores


def test_crafting_through_the_compiler_gives_the_same_outputs(device: torch.device) -> None:
    plain = attackable(networks().eval().to(device), IMAGES.to(device), "float32")
    near = IMAGES.to(device).contiguous(memory_format=torch.channels_last)
    with full_float32():
        fast, why = compiled(plain, near)
        assert not why, why
        with torch.no_grad():
            assert torch.allclose(fast(near), plain(near), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["baseline", "dverge"])
def test_training_through_the_compiler_is_the_plain_one(
    name: str, device: torch.device, digits: Data, told: list[str]
) -> None:
    layer = {"layer": 4, "layer_per": "epoch"} if name == "dverge" else {}
    task: Task = resolve(digits, name, 2, models=["resnet8"], overrides={"batch_size": 64, **layer})
    ensemble = Ensemble(build(member, key) for key, member in enumerate(task.members)).to(device).train()
    source = batches(digits.train.to(device), task.recipe, Stream(("device",)), 0, task.defense.paired)
    given = [next(source) for _ in range(3)]

    def step(each: Ensemble, optimizer: torch.optim.Optimizer, number: int) -> Any:
        return train_step(each, optimizer, task, given[number])

    make = lambda each: make_optimizer(task.recipe, each)  # noqa: E731
    with full_float32(), compiled_if_same(ensemble, make, step, "float32") as fast:
        assert fast, told


def test_torchs_own_state_is_left_alone(run: Run, digits: Data, device: torch.device) -> None:
    generators = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    threat = robench.Whitebox(eps=(0.2,), restarts=1, attacks=(ATTACKS.get("pgd")(steps=5),))
    robench.evaluate(list(run.load().members), digits, threat, samples=20, device=device)
    after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    assert all(torch.equal(one, other) for one, other in zip(generators, after, strict=True))


def test_a_run_trained_there_is_read_here(run: Run, digits: Data) -> None:
    model = run.load()
    assert next(model.parameters()).device.type == "cpu"
    assert torch.isfinite(model(to_images(digits.test.images[:8]))).all()


def test_a_store_holds_rows_of_both(run: Run, digits: Data, device: torch.device, tmp_path: Path) -> None:
    """Rows that a GPU wrote are taken up by a CPU, not made again."""
    threat = robench.Whitebox(eps=(0.05,), restarts=1, attacks=(ATTACKS.get("pgd")(steps=2),))
    store = Runs(run.folder.parent)
    first = Session(store, digits, Settings(device), 20).judge([run], threat)
    second = Session(store, digits, Settings(torch.device("cpu")), 20).judge([run], threat)
    assert first.where(threat="whitebox").accuracy().equals(second.where(threat="whitebox").accuracy())
