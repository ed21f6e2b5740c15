"""What a GPU would run, without one: on torch's fake tensors, which have a device but no values, an operation on
tensors of two devices raises, and so does whatever waits for a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from robench.attacks import ATTACKS, survivors
from robench.attacks.base import images_of
from robench.core.data import Data, Split
from robench.core.ensemble import Ensemble
from robench.core.fast import attackable
from robench.core.losses import LOSSES
from robench.core.models import ModelSpec, build
from robench.core.rng import Draws, Stream
from robench.defenses import DEFENSES
from robench.training.batches import batches
from robench.training.loop import make_optimizer
from robench.training.task import resolve

pytestmark = pytest.mark.slow

GPU = torch.device("meta")  # the one device whose gradients torch computes without having it
SPEC = ModelSpec(name="resnet8", num_classes=10, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
OWN = [name for name in ATTACKS.names() if not ATTACKS.get(name).batch_dependent and name != "autoattack"]


class NothingComesBack(TorchDispatchMode):
    """Raises where a tensor is copied from the GPU: the host would wait for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [value for value in args if isinstance(value, Tensor) and value.device == GPU]
        if read and isinstance(result, Tensor) and result.device != GPU:
            raise AssertionError(f"{func} copies {tuple(result.shape)} to the host")
        return result


def moved(model: nn.Module) -> nn.Module:
    """``model``, its weights and buffers fakes on the GPU; in a `FakeTensorMode` alone."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty_like(weight, device=GPU)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=GPU)
    return model


def ensemble() -> Ensemble:
    return Ensemble(build(SPEC, key) for key in range(3))


@pytest.mark.parametrize("loss", LOSSES.names())
@pytest.mark.parametrize("name", OWN)
def test_an_attack_stays_on_the_device(name: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But between the parts of one that goes on with survivors: here all survive every part."""
    monkeypatch.setattr(survivors, "_standing", lambda taken: (torch.arange(4, device=GPU), np.arange(4)))
    kind = ATTACKS.get(name)
    few = ("steps", "queries", "copies", "neighbours", "mixtures", "scales")
    fewer = {key: 2 for key in few if hasattr(kind, key)} | ({"targets": 2} if getattr(kind, "targets", 0) > 2 else {})
    attack = kind(loss=loss, **fewer)
    fast = attackable(ensemble(), torch.rand(2, 3, 32, 32), "float32")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = moved(fast)
        images = torch.empty(4, 3, 32, 32, device=GPU).contiguous(memory_format=torch.channels_last)
        labels, eps = torch.empty(4, dtype=torch.int64, device=GPU), torch.empty(4, device=GPU)
        with NothingComesBack():
            crafted = images_of(attack.perturb(model, images, labels, eps, Draws.of(range(4))))
        assert crafted.device == GPU


@pytest.mark.parametrize("name", DEFENSES.names())
def test_a_training_step_stays_on_the_device(name: str) -> None:
    pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    split = Split(pixels, torch.zeros(8, dtype=torch.int64))
    names = tuple(map(str, range(10)))
    data = Data("npz:x", split, split, (0.5,) * 3, (0.25,) * 3, names, "f", "cifar10")
    task = resolve(data, name, 2, overrides={"batch_size": 4, "epochs": 1})
    learners = Ensemble(build(SPEC, key) for key in range(2)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved(learners)
        optimizer = make_optimizer(task.recipe, learners)
        there = Split(torch.empty_like(pixels, device=GPU), torch.empty_like(split.labels, device=GPU))
        batch = next(batches(there, task.recipe, Stream(("x",)), 0, task.defense.paired))
        with NothingComesBack():
            for terms in task.defense.loss(learners, batch):
                torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
        # Of those that are trained in turn, the first has its turn.
        trained = learners.members[:1] if task.defense.in_turn else learners
        assert all(weight.grad is not None and weight.grad.device == GPU for weight in trained.parameters())


@pytest.mark.parametrize(
    ("slip", "error"),
    [
        (lambda images: images + torch.ones(3, 32, 32), FakeTensorDeviceMismatchError),
        (lambda images: images if bool((images > 0).all()) else -images, DataDependentOutputException),
        (lambda images: images.cpu().to(GPU), AssertionError),
    ],
    ids=["two devices", "a value", "a copy"],
)
def test_a_slip_shows(slip: Callable[[Tensor], Tensor], error: type[Exception]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), NothingComesBack(), pytest.raises(error):
        slip(torch.empty(4, 3, 32, 32, device=GPU))
