"""Small networks and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.models import Normalized, ResNet
from robench.core.rng import Stream

CLASSES = 5


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests of this folder."""


def member(key: int, depth: int = 14) -> Normalized:
    """A narrow residual network, its BatchNorms as if it were trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        network = ResNet(depth, num_classes=CLASSES, in_channels=3, widths=(4, 6, 8))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
        # Confident, and of more than one opinion.
        network.fc.weight.data.mul_(4)
        network.fc.bias.data.zero_()
        return Normalized(network, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def make_ensemble() -> Callable[..., Ensemble]:
    """(n, depth, dtype) -> an ensemble in eval mode."""

    def make(n: int = 2, depth: int = 14, dtype: torch.dtype = torch.float32) -> Ensemble:
        return Ensemble(member(key, depth) for key in range(n)).to(dtype).eval()

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """(model, count, dtype) -> images of 8x8 pixels, with the labels that the model gives them."""

    def make(model: nn.Module, count: int = 6, dtype: torch.dtype = torch.float32) -> Batch:
        images = Stream(("test",)).uniform((count, 3, 8, 8), "images").to(dtype)
        with torch.no_grad():
            return Batch(images, model(images).argmax(dim=1))

    return make
