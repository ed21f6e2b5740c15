"""Modules and weights that no module owns are found; networks of well-kept packages have none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from robench.core.ensemble import Ensemble
from robench.core.hidden import unregistered
from robench.core.models import MODELS


class Holder(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.value = value


def closing_over(model: nn.Module) -> Callable[[Any], Any]:
    return lambda x: model(x)


LINEAR = nn.Linear(2, 2)
WEIGHT = torch.ones(3, requires_grad=True)
HIDDEN = {
    "a list": ([LINEAR], "value[0]"),
    "a tuple": ((1, LINEAR), "value[1]"),
    "a dict": ({"a": LINEAR}, "value['a']"),
    "nested": ({"a": [nn.Identity(), LINEAR]}, "value['a'][1]"),
    "a closure": (closing_over(LINEAR), "value()"),
    "a bound method": (LINEAR.forward, "value()"),
    "a partial": (partial(nn.functional.linear, weight=WEIGHT), "value()"),
    "an object": (SimpleNamespace(net=LINEAR), "value.net"),
    "BatchNorm alone": ([nn.BatchNorm2d(3, affine=False)], "value[0]"),
    "a trained tensor": (WEIGHT, "value"),
    "trained tensors": ([WEIGHT], "value[0]"),
}
WELL = {
    "constants": torch.ones(3),
    "names": ["a", "b"],
    "a class": nn.Linear,
    "a function": nn.functional.relu,
    "modules without weights": [nn.ReLU()],
    "an empty list": [],
    "a generator": torch.Generator(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_named(name: str) -> None:
    value, place = HIDDEN[name]
    assert unregistered(Holder(value)) == [place]
    assert unregistered(nn.Sequential(nn.ReLU(), Holder(value))) == [f"1.{place}"]


@pytest.mark.parametrize("name", WELL)
def test_what_is_no_weight_is_nobody_s_member(name: str) -> None:
    assert unregistered(Holder(WELL[name])) == []


def test_references_to_what_is_registered_are_none() -> None:
    holder = Holder(None)
    holder.value = [holder.own, holder.own.weight, {"self": holder}]
    assert unregistered(holder) == []
    holder.value = [holder.own]
    nn.utils.parametrizations.weight_norm(holder.own)
    assert unregistered(holder) == []
    compiled = torch.compile(holder)
    assert isinstance(compiled, nn.Module)
    assert unregistered(compiled) == []


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "wrn-16-4"])
def test_robench_s_own_have_none(name: str) -> None:
    if name not in MODELS.names():
        pytest.skip(f"no {name}")
    assert unregistered(Ensemble([MODELS.get(name)(num_classes=10, in_channels=3)])) == []


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "vit_b_32", "swin_t", "efficientnet_b0"])
def test_torchvision_s_have_none(name: str) -> None:
    with torch.device("meta"):
        model = importlib.import_module("torchvision.models").get_model(name, weights=None)
    assert unregistered(model) == []


@pytest.mark.parametrize(
    "name",
    ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050", "mixer_s32_224", "nf_resnet26"],
)
def test_timm_s_have_none(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert unregistered(model) == []
