"""float32 is float32 wherever a number comes from, whatever torch's switches say: its default convolves in TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import robench
from robench.attacks import ATTACKS
from robench.core.data import Data, Split
from robench.core.ensemble import Ensemble
from robench.core.frozen import frozen
from robench.core.rng import Stream
from robench.evaluation.diversity import diversity
from robench.training.batches import batches
from robench.training.loop import make_optimizer, train_step
from robench.training.task import resolve

BACKENDS = torch.backends
FULL = {"ieee", "none"}  # none: as for float32 in general, which the fixture leaves at full
IMAGES = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


class Watching(nn.Module):
    """A network that notes what torch may compute its layers in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 4)
        self.found: list[str] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Watching:
        """What is crafted on is a copy; it notes in the same place."""
        copied = Watching()
        copied.load_state_dict(self.state_dict())
        copied.found = self.found
        return copied

    def forward(self, images: Tensor) -> Tensor:
        self.found += switches()
        with BACKENDS.cudnn.flags(enabled=True):  # as networks may: it reads torch's older switches
            self.found.append("tf32" if BACKENDS.cuda.matmul.allow_tf32 else "ieee")
        return self.fc(self.relu(self.conv(images)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def switches() -> list[str]:
    places = (
        BACKENDS.cudnn.conv,
        BACKENDS.cuda.matmul,
        BACKENDS.cudnn.rnn,
        BACKENDS.mkldnn.conv,
        BACKENDS.mkldnn.matmul,
    )
    return [str(place.fp32_precision) for place in places]


@pytest.fixture(autouse=True)
def _shortened() -> Iterator[None]:
    """As in a program that asked for speed; torch's own default has TF32 for convolutions alone."""
    assert BACKENDS.cudnn.conv.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("high")
    before = switches()
    assert before[:2] == ["tf32", "tf32"]
    yield
    assert switches() == before
    assert BACKENDS.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble([Watching(), Watching()])


@pytest.fixture
def data() -> Data:
    split = Split((IMAGES * 255).to(torch.uint8), LABELS)
    return Data("npz:x", split, split, (0.5,), (0.5,), ("a", "b", "c", "d"), "f", "digits")


def seen(ensemble: Ensemble) -> set[str]:
    found = {switch for member in ensemble.members for switch in member.found}  # type: ignore[union-attr]
    assert found
    return found


def test_an_attack(ensemble: Ensemble) -> None:
    ATTACKS.get("pgd")(steps=2)(ensemble, IMAGES, LABELS, 0.1)
    assert seen(ensemble) <= FULL


def test_crafting_and_verdicts(ensemble: Ensemble, data: Data) -> None:
    robench.evaluate(ensemble, data, robench.Whitebox(eps=(0.1,), restarts=1), samples=4)
    assert seen(ensemble) <= FULL


def test_diversity(ensemble: Ensemble) -> None:
    diversity(ensemble, IMAGES, LABELS, steps=2)
    assert seen(ensemble) <= FULL


def test_training(ensemble: Ensemble, data: Data) -> None:
    task = resolve(data, "dverge", 2, overrides={"batch_size": 4})
    batch = next(batches(data.train, task.recipe, Stream(("x",)), 0, paired=True))
    train_step(ensemble.train(), make_optimizer(task.recipe, ensemble), task, batch)
    assert seen(ensemble) <= FULL


def test_switches_come_back_after_an_error(ensemble: Ensemble) -> None:
    with pytest.raises(ZeroDivisionError), frozen(ensemble):
        raise ZeroDivisionError  # the fixture looks at the switches
