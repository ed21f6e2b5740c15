"""What is said of a model before the first attack, and what refused; sound ones pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import DoubtWarning, Whitebox, evaluate
from robench.attacks import ATTACKS
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.soundness import examine, keyed_torch

CPU = torch.device("cpu")
MakeModel = Callable[[int], EvaluatedModel]


class Wrapped(nn.Module):
    """A model of which a test replaces the forward pass."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.how = model, forward
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Any:
        return self.how(self, images)


def wrapped(make_model: MakeModel, forward: Callable[[Any, Tensor], Any]) -> EvaluatedModel:
    return EvaluatedModel.of_model(Wrapped(make_model(0).ensemble, forward), CPU)


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
    "of its first": (lambda self, x: self.model(x + 0.3 * x[:1]), "another output in a batch of 1 than in one of 16"),
    "of its last": (lambda self, x: self.model(x + 0.3 * x[-1:]), "another output in a batch of 1 than in one of 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused_in_a_line(name: str, make_model: MakeModel, data: Data) -> None:
    forward, says = REFUSED[name]
    with pytest.raises(RobenchError, match=says) as error:
        examine(wrapped(make_model, forward), data, CPU)
    assert "\n" not in str(error.value)


def test_a_batch_s_range_is_found_where_clean_images_all_have_one(make_model: MakeModel, data: Data) -> None:
    def stretched(self: Any, images: Tensor) -> Tensor:
        return self.model((images - images.min()) / (images.max() - images.min()))  # type: ignore[no-any-return]

    pixels = data.test.images.clone()
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
    full = replace(data, test=replace(data.test, images=pixels), fingerprint="full range")
    with pytest.raises(RobenchError, match="another output in a batch of 1 than in one of 16"):
        examine(wrapped(make_model, stretched), full, CPU)


def test_weights_that_are_not_made_yet_are_asked_for() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(RobenchError, match=r"weights that its first batch makes, 'members.0.1.weight'; call it once"):
        EvaluatedModel.of_model(lazy, CPU)


def test_half_precision_is_refused_with_the_remedy(make_model: MakeModel, data: Data) -> None:
    with pytest.raises(RobenchError, match=r"weights are torch.float16: judge it in float32, model.float\(\)"):
        examine(EvaluatedModel.of_model(make_model(0).ensemble.members[0].half(), CPU), data, CPU)


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
    "clamped inside": (lambda self, x: self.model(x.clamp(0.2, 0.8)), "gradient at every pixel", "warn"),
    "thresholded": (lambda self, x: self.model(x * (x > 0.3)), "gradient at every pixel", "warn"),
    "above a level": (lambda self, x: self.model((x - 0.3).relu()), "gradient at every pixel", "warn"),
    "contrast cut": (lambda self, x: self.model((1.6 * x - 0.3).clamp(0, 1)), "gradient at every pixel", "warn"),
}


@pytest.mark.parametrize("name", DOUBTED)
def test_what_misleads_an_attack_is_said(name: str, make_model: MakeModel, data: Data) -> None:
    forward, check, status = DOUBTED[name]
    found = {each.name: each.status for each in examine(wrapped(make_model, forward), data, CPU).checks}
    assert found[check] == status


def shifted(self: Any, images: Tensor) -> Tensor:
    return self.model(images) - 1000  # type: ignore[no-any-return]


SOUND: dict[str, Callable[[Any, Tensor], Any]] = {
    "as it is": lambda self, x: self.model(x),
    "shifted": shifted,
    "masked class": lambda self, x: self.model(x) - torch.tensor([0.0, 0.0, 0.0, 1e9]),
    "normalised": lambda self, x: self.model(((x - 0.4) / 0.2) * 0.2 + 0.4),
    "clamped": lambda self, x: self.model(x.clamp(0, 1)),
    "seeds": lambda self, x: (torch.manual_seed(3), self.model(x + 0.01 * torch.rand_like(x[:1])))[1],
    "probabilities": lambda self, x: self.model(x).softmax(dim=1),
    "channels last": lambda self, x: self.model(x.contiguous(memory_format=torch.channels_last)),
    "maximum of neighbours": lambda self, x: self.model(nn.functional.max_pool2d(x, 2, 1)),
    "half the contrast": lambda self, x: self.model(0.5 * x + 0.25),
    "flips": lambda self, x: (self.model(x) + self.model(x.flip(-1))) / 2,
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name: str, make_model: MakeModel, data: Data) -> None:
    before = torch.random.get_rng_state()
    found = examine(wrapped(make_model, SOUND[name]), data, CPU)
    assert {check.status for check in found.checks} == {"pass"}, list(map(str, found.checks))
    assert not found.draws
    assert not found.blind
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("scale", "status", "says"),
    [
        (1e6, "warn", "so large that cross-entropy has no gradient"),
        (1e-2, "warn", "so small that cross-entropy pulls all other classes up alike"),
        (1e-9, "fail", "so small that float32 loses in a softmax which class is second; multiply its logits by 1e+10"),
    ],
)
def test_outputs_of_an_odd_scale_leave_cross_entropy_blind(
    scale: float, status: str, says: str, make_model: MakeModel, data: Data
) -> None:
    found = examine(wrapped(make_model, lambda self, x: self.model(x) * scale), data, CPU).blind
    assert found is not None
    assert found.status == status
    assert says in found.said


def test_a_refused_model_is_left_as_it_was(make_model: MakeModel, data: Data) -> None:
    model = wrapped(make_model, counts)
    before = {name: value.clone() for name, value in model.ensemble.state_dict().items()}
    with pytest.raises(RobenchError, match="changes its own"):
        examine(model, data, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.ensemble.state_dict().items())


def test_a_function_that_changes_while_it_is_judged_is_said(make_model: MakeModel, data: Data) -> None:
    calls = []

    def late(self: Any, images: Tensor) -> Tensor:
        calls.append(len(images))
        return self.model(images if len(calls) < 60 else images.flip(-1))  # type: ignore[no-any-return]

    model = wrapped(make_model, late).ensemble.members[0]
    calls.clear()
    threat = Whitebox(eps=(0.05,), restarts=2, attacks=(ATTACKS.get("pgd")(steps=40),))
    with pytest.warns(DoubtWarning, match="gives the same images other outputs than before"):
        found = evaluate(model, data, threat, probe=False)
    assert len(calls) > 60
    repeat = [check for check in found.checks if check.name == "outputs repeat"]
    assert [check.status for check in repeat] == ["fail"]


def test_a_model_that_takes_few_images_at_once_is_refused_in_a_line(make_model: MakeModel, data: Data) -> None:
    def few(self: Any, images: Tensor) -> Tensor:
        if len(images) > 16:
            raise ValueError("too many\nimages")
        return self.model(images)  # type: ignore[no-any-return]

    model = wrapped(make_model, few).ensemble.members[0]
    with pytest.raises(RobenchError, match=r"not \d+ at once \(ValueError: too many images\).*--batch-size"):
        evaluate(model, data, Whitebox(eps=(0.05,), attacks=(ATTACKS.get("pgd")(steps=2),)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_a_traced_model_is_judged(make_model: MakeModel, data: Data) -> None:
    traced = torch.jit.trace(make_model(0).ensemble.members[0], data.test.images[:2].float() / 255)
    assert {check.status for check in examine(EvaluatedModel.of_model(traced, CPU), data, CPU).checks} == {"pass"}


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
