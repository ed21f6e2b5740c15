"""Small ensembles and batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from robench.core.ensemble import Ensemble
from robench.core.models import ModelSpec, Normalized, build
from robench.core.rng import Stream
from robench.defenses import Batch

CLASSES = 10

MakeEnsemble = Callable[..., Ensemble]
MakeBatch = Callable[..., Batch]


def _resnet8(key: int) -> nn.Module:
    spec = ModelSpec(name="resnet8", num_classes=CLASSES, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    return build(spec, key)


def _torchvision(key: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return Normalized(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests of this folder."""


@pytest.fixture
def make_ensemble() -> MakeEnsemble:
    """(n, mixed) -> an ensemble in train mode: ResNet-8s, the last one a torchvision ResNet where ``mixed``."""

    def make(n: int = 3, mixed: bool = False) -> Ensemble:
        members = [_resnet8(key) for key in range(n - mixed)]
        return Ensemble([*members, _torchvision(n)] if mixed else members).train()

    return make


@pytest.fixture
def make_batch() -> MakeBatch:
    """(step, dtype) -> a batch of 8 colour images of 8x8 pixels, with pairs."""

    def make(step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        epoch = Stream(("test",)).within("epoch", 0)
        draws = epoch.within("step", step)
        images, paired = (draws.uniform((8, 3, 8, 8), name).to(dtype) for name in ("first", "second"))
        labels = draws.permutation(8, "labels")
        return Batch(images, labels, draws, epoch, paired, samples=torch.arange(8), train_size=8)

    return make
