"""What is said of a model before the first attack, and what refused; sound ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.evaluation.soundness import examine, keyed_torch
from robench.evaluation.subjects import Subject

CPU = torch.device("cpu")
MakeSubject = Callable[[int], Subject]


class Wrapped(nn.Module):
    """A model of which a test replaces the forward pass."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.how = model, forward
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Any:
        return self.how(self, images)


def wrapped(make_subject: MakeSubject, forward: Callable[[Any, Tensor], Any]) -> Subject:
    return Subject.of_model(Wrapped(make_subject(0).ensemble, forward), CPU)


def counts(self: Any, images: Tensor) -> Tensor:
    self.seen += 1
    return self.model(images)  # type: ignore[no-any-return]


def trains(self: Any, images: Tensor) -> Tensor:
    self.model.train()
    return self.model(images)  # type: ignore[no-any-return]


def subtracts(self: Any, images: Tensor) -> Tensor:
    images -= 0.1
    return self.model(images)  # type: ignore[no-any-return]


def of_its_batch(self: Any, images: Tensor) -> Tensor:
    return self.model(images - images.mean(dim=0) + 0.5)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a tuple": (lambda self, x: (self.model(x), x), "model returns a tuple for images 16x1x8x8"),
    "a dict": (lambda self, x: {"logits": self.model(x)}, "returns a dict"),
    "squeeze": (lambda self, x: self.model(x).squeeze(), "returns .* for images 1x1x8x8, expected"),
    "classes": (lambda self, x: self.model(x).argmax(dim=1), "returns .* expected .*classes"),
    "integers": (lambda self, x: self.model(x).round().long(), "returns torch.int64, expected logits"),
    "other classes": (lambda self, x: self.model(x)[:, :3], "returns 3 outputs and the data have 4 classes"),
    "NaN": (lambda self, x: self.model(x) * float("nan"), "returns NaN or infinity"),
    "raises": (lambda self, x: self.model(x.view(len(x), -1)), "does not take images 16x1x8x8 of float32"),
    "counts": (counts, "changes its own 'seen' in a forward pass"),
    "train mode": (trains, "changes its own .* in a forward pass in eval mode"),
    "in place": (subtracts, "changes the images that it is given"),
    "of its batch": (of_its_batch, "another output in a batch of 1 than in one of 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused_in_a_line(name: str, make_subject: MakeSubject, data: Data) -> None:
    forward, says = REFUSED[name]
    with pytest.raises(RobenchError, match=says) as error:
        examine(wrapped(make_subject, forward), data, CPU)
    assert "\n" not in str(error.value)


def test_half_precision_is_refused_with_the_remedy(make_subject: MakeSubject, data: Data) -> None:
    with pytest.raises(RobenchError, match=r"weights are torch.float16: judge it in float32, model.float\(\)"):
        examine(Subject.of_model(make_subject(0).ensemble.members[0].half(), CPU), data, CPU)


class Detached(torch.autograd.Function):
    """The forward pass of a model with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0].flip(-1)


DOUBTED: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "noise": (lambda self, x: self.model(x + 0.1 * torch.rand_like(x)), "outputs repeat", "fail"),
    "dropout": (lambda self, x: nn.functional.dropout(self.model(x), 0.5), "outputs repeat", "fail"),
    "rounded": (lambda self, x: self.model((x * 15).round() / 15), "gradient true", "fail"),
    "straight through": (
        lambda self, x: self.model(x + ((x * 3).round() / 3 - x).detach()),
        "gradient true",
        "fail",
    ),
    "half detached": (lambda self, x: self.model(0.7 * x.detach() + 0.3 * x), "gradient true", "fail"),
    "another's": (lambda self, x: self.model(Detached.apply(x)), "gradient true", "fail"),
    "detached": (lambda self, x: self.model(x.detach()), "gradient true", "fail"),
}


@pytest.mark.parametrize("name", DOUBTED)
def test_what_misleads_an_attack_is_said(name: str, make_subject: MakeSubject, data: Data) -> None:
    forward, check, status = DOUBTED[name]
    found = {each.name: each.status for each in examine(wrapped(make_subject, forward), data, CPU).checks}
    assert found[check] == status


def shifted(self: Any, images: Tensor) -> Tensor:
    return self.model(images) - 1000  # type: ignore[no-any-return]


SOUND: dict[str, Callable[[Any, Tensor], Any]] = {
    "as it is": lambda self, x: self.model(x),
    "shifted": shifted,
    "tiny": lambda self, x: self.model(x) * 1e-6,
    "masked class": lambda self, x: self.model(x) - torch.tensor([0.0, 0.0, 0.0, 1e9]),
    "normalised": lambda self, x: self.model(((x - 0.4) / 0.2) * 0.2 + 0.4),
    "clamped": lambda self, x: self.model(x.clamp(0, 1)),
    "seeds": lambda self, x: (torch.manual_seed(3), self.model(x + 0.01 * torch.rand_like(x[:1])))[1],
    "probabilities": lambda self, x: self.model(x).softmax(dim=1),
    "channels last": lambda self, x: self.model(x.contiguous(memory_format=torch.channels_last)),
    "flips": lambda self, x: (self.model(x) + self.model(x.flip(-1))) / 2,
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name: str, make_subject: MakeSubject, data: Data) -> None:
    before = torch.random.get_rng_state()
    found = examine(wrapped(make_subject, SOUND[name]), data, CPU)
    assert {check.status for check in found.checks} == {"pass"}, list(map(str, found.checks))
    assert not found.draws
    assert not found.blind
    assert torch.equal(torch.random.get_rng_state(), before)


def test_huge_outputs_leave_cross_entropy_blind(make_subject: MakeSubject, data: Data) -> None:
    assert examine(wrapped(make_subject, lambda self, x: self.model(x) * 1e6), data, CPU).blind


def test_torch_s_generator_is_keyed_within_and_restored() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with keyed_torch(CPU, "a", 1):
        first = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    with keyed_torch(CPU, "a", 1):
        torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    with keyed_torch(CPU, "a", 2):
        assert not torch.equal(torch.rand(3), first)
