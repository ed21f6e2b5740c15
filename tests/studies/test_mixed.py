"""Members of different architectures in one ensemble, from training to attacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch import nn

from robench.cli import run
from robench.session import stored
from robench.store.runs import Runs


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 24 + 8 colour images of 32x32 pixels in three classes."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (32, 3, 32, 32), dtype=np.uint8), np.arange(32) % 3
    for label in range(3):
        images[labels == label, label] //= 3
    np.savez(tmp_path / "data.npz", x_train=images[:24], y_train=labels[:24], x_test=images[24:], y_test=labels[24:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


DATA = ["--dataset", "npz:data.npz", "--device", "cpu"]
TRAIN = ["--n", "2", "--epochs", "1", "--batch-size", "12", *DATA]


def test_a_small_resnet_and_one_of_torchvision_train_with_dverge_and_are_attacked(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["--model", "resnet8,torchvision/resnet18", "--set", "steps=2", *TRAIN]
    assert run(["train", "dverge", "--init", "scratch", *mixed]) == 0
    name = capsys.readouterr().out.splitlines()[-1]
    assert "resnet8_torchvision.resnet18-dverge-n2" in name
    trained = Runs("runs").get(name)
    assert [spec.name for spec in trained.specs] == ["resnet8", "torchvision/resnet18"]
    assert [type(member.model).__module__ for member in trained.load().members] == [
        "robench.core.models",
        "torchvision.models.resnet",
    ]
    limits = ["--eps", "0.1", "--samples", "8", "--steps", "2", "--restarts", "1", "--batch-size", "8"]
    attacks = ["--attacks", "pgd,mdi2,sgm", "--losses", "ce", "--format", "json"]
    assert run(["eval", name, "--threat", "whitebox", *attacks, *limits, *DATA]) == 0
    clean, _ = json.loads(capsys.readouterr().out)
    assert clean["accuracy"] > 0  # else there would be nothing to attack
    rows = stored([trained]).where(threat="whitebox").frame
    assert {label.partition(":")[0] for label in rows["attack"]} == {"pgd", "mdi2", "sgm"}
    # CW, which is added where logits are as small as here, leaves an image alone that is wrong already.
    moved = rows[rows["loss"] == "ce"]["linf"]
    assert 0 < moved.min() <= moved.max() <= 0.1 + 1e-6


def test_a_member_without_activation_modules_is_told_how_to_give_its_features(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("someones_code")
    module.linear = lambda *, num_classes, in_channels: nn.Sequential(  # type: ignore[attr-defined]
        nn.Flatten(), nn.Linear(in_channels * 32 * 32, num_classes)
    )
    monkeypatch.setitem(sys.modules, "someones_code", module)
    models = ["--model", "resnet8,someones_code:linear"]
    assert run(["train", "dverge", "--init", "scratch", *models, *TRAIN]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model Sequential has no activation modules" in error
    assert "give its class `features(x, layer)` and an attribute `depth`" in error


def test_a_network_that_is_not_there_names_its_neighbours(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "baseline", "--model", "torchvision/resnet81", *TRAIN]) == 2
    assert "unknown model 'torchvision/resnet81'; did you mean torchvision/resnet18" in capsys.readouterr().err
