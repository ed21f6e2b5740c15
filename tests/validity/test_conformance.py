"""Everything of ours keeps its contract, check by check, and what breaks one is told which: `robench check plugin`."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.cli import run
from robench.core.data import DATASETS, Split, load
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import MODELS
from robench.core.rng import Draws
from robench.defenses import DEFENSES, Batch, Defense, Terms
from robench.validity.conformance import Kind, examine, kinds, titles

PLUGINS: dict[Kind, list[str]] = {
    "attack": ATTACKS.names(),
    "defense": DEFENSES.names(),
    "model": ["resnet8", "wrn16-4", "torchvision/mobilenet_v3_small"],
    "dataset": ["digits"],
}
#: A check of a plug-in is a test: a failure names both.
OURS = [(kind, name, check) for kind, names in PLUGINS.items() for name in names for check in titles(kind)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("kind", "name", "check"), OURS, ids=["-".join(case) for case in OURS])
def test_ours_pass_without_a_doubt(kind: Kind, name: str, check: str) -> None:
    if name == "autoattack" and importlib.util.find_spec("torchattacks") is None:
        pytest.skip("torchattacks is not installed")
    (finding,) = examine(kind, name, only=check)
    assert (finding.name, finding.status) == (check, "pass"), finding


def test_a_plug_in_is_found_by_its_name_alone() -> None:
    assert all(kind in kinds(name) for kind, names in PLUGINS.items() for name in names)
    assert [finding.name for finding in examine("model", "resnet8")] == titles("model")


class _Base(Attack):
    """A sound attack, for the unsound ones to inherit from."""

    @property
    def stochastic(self) -> bool:
        return False

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return (images + eps.view(-1, 1, 1, 1) * (images < 0.5)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Sound(_Base):
    """Breaks nothing, though it does not look at the model."""


@dataclass(frozen=True, kw_only=True)
class Many(Sound):
    """Takes no fewer copies than it was made for."""

    copies: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 10:
            raise RobenchError(f"expected `copies` of attack {self.name!r} to be at least 10, got {self.copies}")


class Undecorated(_Base):
    """No dataclass of its own."""


@dataclass(frozen=True, kw_only=True)
class Listed(_Base):
    """A field that is no JSON."""

    choice: tuple[int, ...] = field(default=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Permissive(_Base):
    """Forgets to call its base."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Global(_Base):
    """Draws from torch."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images + eps.view(-1, 1, 1, 1) * (torch.rand_like(images) - 0.5)


@dataclass(frozen=True, kw_only=True)
class Restless(Sound):
    """Says that restarts differ."""

    @property
    def stochastic(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Sharing(_Base):
    """Images depend on their batch."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images + (images - images.mean(0)) * eps.view(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Vandal(_Base):
    """Changes weights and inputs, and leaves the ball."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return images.add_(3)


@dataclass(frozen=True, kw_only=True)
class Lazy(_Base):
    """Returns what it got, in another dtype where that is float64."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images.float()


ATTACK_FAULTS: dict[type[Attack], set[tuple[str, str]]] = {
    Sound: set(),
    Many: set(),
    Undecorated: {("fail", "is data")},
    Listed: {("fail", "is data")},
    Permissive: {("fail", "refuses wrong fields")},
    Global: {
        ("fail", "leaves the global generators alone"),
        ("fail", "is deterministic"),
        ("fail", "takes one eps per image"),
        ("fail", "does not depend on the batch"),
        ("fail", "restarts as it says"),
        ("warn", "stays in the ball and in the box by itself"),
    },
    Restless: {("fail", "restarts as it says")},
    Sharing: {("fail", "does not depend on the batch"), ("warn", "stays in the ball and in the box by itself")},
    Vandal: {
        ("fail", "leaves nothing on the model"),
        ("warn", "leaves its inputs alone"),
        ("warn", "stays in the ball and in the box by itself"),
    },
    Lazy: {
        ("fail", "returns images like those it got"),
        ("fail", "raises the loss"),
        ("fail", "does not depend on the batch"),
    },
}


def faults(kind: Kind, name: str) -> set[tuple[str, str]]:
    return {(each.status, each.name) for each in examine(kind, name) if each.status != "pass"}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers under ``faulty`` for the length of a test."""

    def add(registry: Any, item: Any) -> None:
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        registry.register("faulty")(item)

    return add


@pytest.mark.parametrize("attack", ATTACK_FAULTS, ids=lambda kind: kind.__name__)
def test_an_attack_is_told_what_it_breaks(attack: type[Attack], register: Any) -> None:
    register(ATTACKS, attack)
    found = faults("attack", "faulty")
    # Whether a change that ignores the model raises its loss is chance.
    assert found - {("warn", "raises the loss")} == ATTACK_FAULTS[attack]


def signed(images: Tensor, eps: Tensor) -> Tensor:
    """What `_Base` returns."""
    return (images + eps.view(-1, 1, 1, 1) * (images < 0.5)).clamp(0, 1)


@dataclass(frozen=True)
class Positional(_Base):
    """A field that can be given without its name."""

    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Misnamed(_Base):
    """Another name in its manifest."""

    def manifest(self) -> dict[str, object]:
        return {**super().manifest(), "name": "pgd"}


@dataclass(frozen=True, kw_only=True)
class Relabelled(_Base):
    """Another name in rows and figures."""

    @property
    def label(self) -> str:
        return "best"


@dataclass(frozen=True, kw_only=True)
class Unversioned(_Base):
    """A version that is none."""

    version: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Mumbling(_Base):
    """Refuses, and does not say what."""

    def __post_init__(self) -> None:
        if self.loss == "nonsense":
            raise RobenchError("no")


@dataclass(frozen=True, kw_only=True)
class Habit(_Base):
    """Does what its ``habit`` says."""

    habit: ClassVar[str] = ""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        crafted = signed(images, eps)
        match self.habit:
            case "crop":
                return images[:, :1]
            case "nan":
                return images * float("nan")
            case "far":
                return (images + 2 * eps.view(-1, 1, 1, 1)).clamp(0, 1)
            case "unboxed":
                return images + eps.view(-1, 1, 1, 1)
            case "idle":
                return images.clone()
            case "attribute":
                model.note = 1  # type: ignore[assignment]
            case "gradients":
                with torch.enable_grad():
                    model.requires_grad_(True)
                    model(images).sum().backward()
            case "statistics":
                model.train()(images)
            case "dtype":
                torch.set_default_dtype(torch.float64)
            case "no_grad":
                torch.set_grad_enabled(False)
            case "labels":
                labels.fill_(0)
            case "eps":
                eps.mul_(0.5)
            case "requires_grad":
                images.requires_grad_(True)
            case "numpy":
                np.random.rand()  # noqa: NPY002
            case "random":
                random.random()
            case "draws":
                return images + eps.view(-1, 1, 1, 1) * (draws.uniform("noise", images.shape[1:], images) - 0.5)
            case "order":
                place = torch.arange(len(images)).to(eps) / len(images)
                return signed(images, eps * place)
        return crafted


#: What breaks a check, by the title of the check: plug-ins, or habits of `Habit`; a doubt where it is put right.
ATTACK_BREAKS: list[tuple[str, str, type[Attack] | str]] = [
    *(("fail", "is data", each) for each in (Positional, Misnamed, Relabelled, Unversioned)),
    ("fail", "refuses wrong fields", Mumbling),
    *(("fail", "returns images like those it got", habit) for habit in ("crop", "nan")),
    *(("warn", "stays in the ball and in the box by itself", habit) for habit in ("far", "unboxed")),
    ("fail", "raises the loss", "idle"),
    *(
        ("fail", "leaves nothing on the model", habit)
        for habit in ("attribute", "gradients", "statistics", "dtype", "no_grad")
    ),
    *(("warn", "leaves its inputs alone", habit) for habit in ("labels", "eps", "requires_grad")),
    *(("fail", "leaves the global generators alone", habit) for habit in ("numpy", "random")),
    ("fail", "restarts as it says", "draws"),
    ("fail", "does not depend on the batch", "order"),
]


def named(breaks: list[tuple[str, str, Any]]) -> list[str]:
    return [f"{check}-{each if isinstance(each, str) else each.__name__}" for _, check, each in breaks]


@pytest.mark.parametrize(("status", "check", "plugin"), ATTACK_BREAKS, ids=named(ATTACK_BREAKS))
def test_a_check_finds_what_breaks_it(
    status: str, check: str, plugin: type[Attack] | str, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(plugin, str):
        monkeypatch.setattr(Habit, "habit", plugin)
        plugin = Habit
    register(ATTACKS, plugin)
    try:
        (finding,) = examine("attack", "faulty", only=check)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert finding.status == status, finding


class _Trained(Defense):
    """A sound defense, for the unsound ones to inherit from."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(batch.images), batch.labels)}


@dataclass(frozen=True, kw_only=True)
class Kept(_Trained):
    """Breaks nothing."""


@dataclass(frozen=True, kw_only=True)
class Partial(_Trained):
    """Forgets the last member."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        yield from list(super().loss(ensemble, batch))[:-1]


@dataclass(frozen=True, kw_only=True)
class Dropping(_Trained):
    """Draws from torch."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(F.dropout(batch.images, 0.5)), batch.labels)}


@dataclass(frozen=True, kw_only=True)
class Messy(_Trained):
    """Leaves eval mode and noise on the batch behind."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        ensemble.eval()
        batch.images.mul_(0.5)
        yield from super().loss(ensemble, batch)


@dataclass(frozen=True, kw_only=True)
class Unreduced(_Trained):
    """A loss per image, and a size that it does not refuse."""

    min_members: ClassVar[int] = 2

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(batch.images), batch.labels, reduction="none")}

    def check(self, *, members: int, classes: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Infinite(_Trained):
    """Divides by zero."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(batch.images), batch.labels) / 0}


@dataclass(frozen=True, kw_only=True)
class Pairs(_Trained):
    """Needs two members, and says nothing of it."""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        yield from super().loss(ensemble, batch)
        outputs = [member(batch.images).softmax(dim=1) for member in ensemble.members]
        yield {"pairs": torch.stack([F.mse_loss(one, other) for one, other in combinations(outputs, 2)]).mean()}


DEFENSE_FAULTS: dict[type[Defense], set[str]] = {
    Kept: set(),
    Partial: {"reaches every member", "trains as few members as it takes"},
    Dropping: {"is deterministic in training", "leaves the generators alone in training"},
    Messy: {"restores modes and flags", "leaves its batch alone"},
    Infinite: {"has a finite loss", "reaches every member", "trains as few members as it takes"},
    Unreduced: {
        "has a finite loss",
        "reaches every member",
        "is deterministic in training",
        "leaves its batch alone",
        "leaves the generators alone in training",
        "refuses too few members",
        "trains as few members as it takes",
    },
    Pairs: {"trains as few members as it takes"},
}


@pytest.mark.parametrize("defense", DEFENSE_FAULTS, ids=lambda kind: kind.__name__)
def test_a_defense_is_told_what_it_breaks(defense: type[Defense], register: Any) -> None:
    register(DEFENSES, defense)
    assert faults("defense", "faulty") == {("fail", check) for check in DEFENSE_FAULTS[defense]}


@dataclass(frozen=True)
class Unnamed(_Trained):
    """A field that can be given without its name."""

    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Tupled(_Trained):
    """A field that is no JSON."""

    choice: tuple[int, ...] = field(default=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Other(_Trained):
    """Another name in its manifest."""

    def manifest(self) -> dict[str, object]:
        return {**super().manifest(), "name": "gal"}


@dataclass(frozen=True, kw_only=True)
class Curt(_Trained):
    """Refuses, and does not say what."""

    min_members: ClassVar[int] = 2

    def check(self, *, members: int, classes: int) -> None:
        if members < 2:
            raise RobenchError("no")


@dataclass(frozen=True, kw_only=True)
class Picky(_Trained):
    """Refuses what it says it takes."""

    min_members: ClassVar[int] = 2

    def check(self, *, members: int, classes: int) -> None:
        if members < 3:
            raise RobenchError("expected `n` to be at least 3")


@dataclass(frozen=True, kw_only=True)
class Custom(_Trained):
    """Does what its ``habit`` says."""

    paired: ClassVar[bool] = True
    habit: ClassVar[str] = ""

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        first = next(ensemble.members[0].parameters())
        match self.habit:
            case "nothing":
                return
            case "no terms":
                yield {}
            case "one architecture":
                ensemble.members[-1].model.layer1  # type: ignore[union-attr]  # noqa: B018
            case "infinite slope":
                yield {"root": (first * 0).square().sum().sqrt()}
            case "no slope":
                yield {"none": 0 * sum(member(batch.images).sum() for member in ensemble.members)}  # type: ignore[misc]
                return
            case "statistics":
                for module in ensemble.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.running_mean.add_(torch.rand(()))  # type: ignore[union-attr]
            case "weights":
                with torch.no_grad():
                    first.add_(1)
            case "gradients":
                ensemble.members[2](batch.images).sum().backward()
            case "hooks":
                ensemble.register_forward_hook(lambda *_: None)
            case "flags":
                first.requires_grad_(False)
            case "tracking":
                ensemble.members[0].model.bn1.track_running_stats = False  # type: ignore[union-attr]
            case "labels":
                batch.labels.fill_(0)
            case "paired":
                assert batch.paired is not None
                batch.paired.mul_(0.5)
            case "requires_grad":
                batch.images.requires_grad_(True)
            case "numpy":
                np.random.rand()  # noqa: NPY002
            case "random":
                random.random()
        yield from super().loss(ensemble, batch)


DEFENSE_BREAKS: list[tuple[str, str, type[Defense] | str]] = [
    *(("fail", "is data", each) for each in (Unnamed, Tupled, Other)),
    *(("fail", "has a finite loss", habit) for habit in ("nothing", "no terms")),
    *(("fail", "reaches every member", habit) for habit in ("infinite slope", "no slope", "one architecture")),
    ("fail", "is deterministic in training", "statistics"),
    *(("fail", "restores modes and flags", habit) for habit in ("weights", "gradients", "hooks", "flags", "tracking")),
    *(("fail", "leaves its batch alone", habit) for habit in ("labels", "paired", "requires_grad")),
    *(("fail", "leaves the generators alone in training", habit) for habit in ("numpy", "random")),
    *(("fail", "refuses too few members", each) for each in (Curt, Picky)),
]


@pytest.mark.parametrize(("status", "check", "plugin"), DEFENSE_BREAKS, ids=named(DEFENSE_BREAKS))
def test_a_check_of_defenses_finds_what_breaks_it(
    status: str, check: str, plugin: type[Defense] | str, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(plugin, str):
        monkeypatch.setattr(Custom, "habit", plugin)
        plugin = Custom
    register(DEFENSES, plugin)
    (finding,) = examine("defense", "faulty", only=check)
    assert finding.status == status, finding


@pytest.mark.parametrize(("place", "kind"), [("pgd:PGD", "attacks"), ("gal:Gal", "defenses")])
def test_a_class_by_its_place_is_no_factory_of_a_model(place: str, kind: str) -> None:
    with pytest.raises(RobenchError, match=rf"is a class of {kind}, .*robench\.{kind}"):
        kinds(f"robench.{kind}.{place}")


@pytest.mark.parametrize(("registry", "kind"), [(ATTACKS, Habit), (DEFENSES, Custom)], ids=["attack", "defense"])
def test_without_a_habit_they_pass(registry: Any, kind: Any, register: Any) -> None:
    register(registry, kind)
    assert {found for found in faults(registry.kind, "faulty") if found != ("warn", "raises the loss")} == set()


class _Net(nn.Module):
    """A network on any channels; its last layer may have the wrong size, its forward pass a habit."""

    def __init__(self, classes: int, channels: int, habit: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, 4)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, classes)
        self.habit = habit

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "numpy" and self.training:
            x = x + float(np.random.rand())  # noqa: NPY002
        if self.habit == "batch":
            x = x - x.mean(0)
        y = self.conv(x)
        y = torch.relu(y) if self.habit == "functional" else self.act(y)
        return self.fc(y.mean(dim=(2, 3)))  # type: ignore[no-any-return]


MODEL_FAULTS: dict[str, set[str]] = {
    "none": set(),
    "ten": {"honours classes and channels"},
    "numpy": {"trains from its seed"},
    "batch": {"judges every image alone"},
    "functional": {"shows its layers"},
}


@pytest.mark.parametrize("habit", MODEL_FAULTS)
def test_a_model_is_told_what_it_breaks(habit: str, register: Any) -> None:
    def factory(*, num_classes: int, in_channels: int) -> nn.Module:
        return _Net(10 if habit == "ten" else num_classes, in_channels, habit)

    register(MODELS, factory)
    assert faults("model", "faulty") == {("fail", check) for check in MODEL_FAULTS[habit]}


def test_a_data_set_is_told_what_it_breaks(register: Any) -> None:
    digits = load("digits")
    made: list[int] = []

    def faulty(place: object) -> Any:
        made.append(0)
        return type(digits)(
            **{
                **vars(digits),
                "test": Split(digits.train.images.float(), digits.train.labels),
                "fingerprint": str(made),
            }
        )

    register(DATASETS, faulty)
    assert faults("dataset", "faulty") == {
        ("fail", "is a data set"),  # it calls itself digits
        ("fail", "holds images and labels"),
        ("fail", "is the same every time"),
    }


def test_the_exit_code_tells(register: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["check", "plugin", "resnet8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "model resnet8:"
    assert out[3] == "  pass  shows its layers: 8 layers"
    register(DEFENSES, Partial)
    assert run(["check", "plugin", "resnet8", "faulty"]) == 1
    out = capsys.readouterr().out
    assert "  fail  reaches every member: model.conv1.weight of member 3 gets no gradient" in out
    assert run(["check", "plugin", "resnet9"]) == 2
    assert "unknown plug-in 'resnet9'; did you mean resnet8" in capsys.readouterr().err
    pixels, labels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels[:2], y_test=labels[:2])
    assert run(["check", "plugin", f"npz:{tmp_path / 'd.npz'}"]) == 0
    assert "  warn  keeps test images apart: 2 test images are among the training images" in capsys.readouterr().out
